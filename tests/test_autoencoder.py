"""Codecs against diffusers itself, the pixels against exact arithmetic, and the errors a user can meet."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file
from torch._dynamo.utils import counters

from memory.files import sha256
from models.autoencoder import CONFIG, WEIGHTS, check_codec, codecs, latents_from_moments, load_codec, to_uint8
from models.hub import COMMITS


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Make an untrained VAE of two levels with `channels` image channels; returns its folder."""

    def make(channels: int, **config):
        torch.manual_seed(0)
        path = tmp_path_factory.mktemp("vae")
        blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
        AutoencoderKL(
            channels,
            channels,
            **blocks,
            block_out_channels=(8, 16),
            layers_per_block=1,
            latent_channels=3,
            norm_num_groups=4,
            **config,
        ).save_pretrained(path)
        return str(path)

    return make


def pixels(*shape):
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("channels", [1, 3])
def test_pixels_survive_exactly(channels):
    codec = load_codec("pixels", channels=channels)
    images = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16).repeat(2, channels, 1, 1)
    meta = codec.meta(16)
    moments = codec.encode(images)
    latents = latents_from_moments(moments, meta, torch.randn(2, channels, 16, 16))
    assert moments.dtype == torch.uint8
    assert list(moments.shape[1:]) == meta["moments_shape"] == meta["latent_shape"]
    assert latents.min() == -1
    assert latents.max() == 1
    assert torch.equal(to_uint8(codec.decode(latents)), images)


def test_grey_becomes_rgb_but_not_back():
    grey, rgb = pixels(2, 1, 8, 8), pixels(2, 3, 8, 8)
    assert torch.equal(load_codec("pixels").encode(grey), grey.repeat(1, 3, 1, 1))
    with pytest.raises(ValueError, match="1-channel images, got 3"):
        load_codec("pixels", channels=1).encode(rgb)


def test_vae_agrees_with_diffusers(folder):
    path = folder(3, scaling_factor=0.5, shift_factor=0.25)
    vae, codec = AutoencoderKL.from_pretrained(path).eval(), load_codec(path)
    images, meta = pixels(3, 3, 8, 12), codec.meta(8)
    with torch.no_grad():
        posterior = vae.encode(images.float() / 127.5 - 1).latent_dist
        moments = codec.encode(images)
        assert moments.dtype == torch.float16
        torch.testing.assert_close(moments.float(), torch.cat([posterior.mean, posterior.std], 1), rtol=1e-3, atol=1e-3)
        noise = torch.randn(3, 3, 4, 6)
        latents = latents_from_moments(moments, meta, noise)
        expected = (posterior.mean + posterior.std * noise - 0.25) * 0.5
        torch.testing.assert_close(latents, expected, rtol=2e-3, atol=2e-3)
        decoded = vae.decode(expected / 0.5 + 0.25).sample.clamp(-1, 1)
        torch.testing.assert_close(codec.decode(expected), decoded, rtol=1e-4, atol=1e-4)
    mean = latents_from_moments(moments, meta, None)
    torch.testing.assert_close(mean, latents_from_moments(moments, meta, torch.zeros_like(noise)))
    assert meta["latent_shape"] == [3, 4, 4]
    assert meta["moments_shape"] == [6, 4, 4]
    assert len(meta["sha256"]) == 64
    assert json.loads(json.dumps(meta)) == meta


def test_scale_and_shift_per_channel(folder):
    statistics = {"latents_mean": [0.5, -1.0, 2.0], "latents_std": [1.0, 2.0, 4.0], "scaling_factor": 1.0}
    codec = load_codec(folder(1, **statistics))
    meta = codec.meta(8)
    assert (meta["scale"], meta["shift"]) == ([1.0, 0.5, 0.25], [0.5, -1.0, 2.0])
    moments = codec.encode(pixels(2, 1, 8, 8))
    latents = latents_from_moments(moments, meta, None)
    for channel, (mean, std) in enumerate(zip(statistics["latents_mean"], statistics["latents_std"], strict=True)):
        torch.testing.assert_close(latents[:, channel], (moments[:, channel].float() - mean) / std)
    with torch.no_grad():
        direct = codec.vae.decode(moments[:, :3].float()).sample.clamp(-1, 1)
    torch.testing.assert_close(codec.decode(latents), direct, rtol=1e-4, atol=1e-4)


def test_vae_repeats_grey_and_refuses_what_it_cannot_take(folder):
    three, one = load_codec(folder(3)), load_codec(folder(1))
    grey = pixels(2, 1, 8, 8)
    assert torch.equal(three.encode(grey), three.encode(grey.repeat(1, 3, 1, 1)))
    assert one.meta(8)["image_channels"] == 1
    with pytest.raises(ValueError, match="1-channel images, got 3"):
        one.encode(pixels(2, 3, 8, 8))
    with pytest.raises(ValueError, match="9 pixels is not a multiple of its downsampling factor 2"):
        one.meta(9)
    with pytest.raises(ValueError, match="9 pixels is not a multiple"):
        one.encode(pixels(2, 1, 8, 9))
    with pytest.raises(ValueError, match="takes uint8 images"):
        one.encode(grey.float())


def test_decoding_does_not_depend_on_the_batch(folder, monkeypatch):
    codec = load_codec(folder(1))
    latents = torch.randn(5, 3, 4, 4)
    whole = codec.decode(latents)
    monkeypatch.setattr("models.autoencoder.DECODED_PIXELS", 2 * 64)  # two images at a time
    torch.testing.assert_close(codec.decode(latents), whole)
    assert whole.abs().max() <= 1


def test_bfloat16_stays_close(folder):
    path = folder(1)
    images = pixels(2, 1, 8, 8)
    exact, coarse = load_codec(path), load_codec(path, dtype=torch.bfloat16)
    torch.testing.assert_close(coarse.encode(images).float(), exact.encode(images).float(), rtol=0.05, atol=0.05)
    assert coarse.decode(torch.randn(2, 3, 4, 4)).dtype == torch.float32


def test_two_ways_to_uint8():
    images = torch.tensor([-1.2, -1.0, 0.0, 0.999, 1.0, 1.2])
    assert to_uint8(images).tolist() == [0, 0, 128, 255, 255, 255]
    assert to_uint8(images, "truncate").tolist() == [0, 0, 127, 254, 255, 255]
    with pytest.raises(ValueError, match="--uint8 is 'floor'"):
        to_uint8(images, "floor")


def test_check_codec_shows_both_sides(folder):
    meta = load_codec(folder(1)).meta(8)
    check_codec({**meta, "name": "elsewhere"}, meta, "the store")
    with pytest.raises(ValueError, match=r"does not fit the store.*scale is 2, expected 0\.18215"):
        check_codec({**meta, "scale": 2}, meta, "the store")


def test_missing_files_are_named(tmp_path, folder, monkeypatch):
    with pytest.raises(ValueError, match="is none of pixels, sd-vae-ft-mse"):
        load_codec("sd-vae")
    with pytest.raises(ValueError, match=rf"no {CONFIG} in {tmp_path}"):
        load_codec(str(tmp_path))
    (tmp_path / CONFIG).write_text("{}")
    with pytest.raises(ValueError, match=rf"no {WEIGHTS} in {tmp_path}"):
        load_codec(str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for name in ("sd-vae-ft-mse", "sd-vae-ft-ema", "organisation/repository"):
        message = (
            rf"{WEIGHTS} of hub repository '\w+/[\w-]+'.* neither lie at weights/[\w-]+, nor in the cache .*fetch\.sh"
        )
        with pytest.raises(ValueError, match=message):
            load_codec(name)


def test_names_are_looked_for_in_the_weights_folder_first(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("GMEM_WEIGHTS", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *_, **__: pytest.fail("asked the hub"))
    for name in ("sd-vae-ft-mse", "repository"):
        Path(folder(3, scaling_factor=0.9)).rename(tmp_path / name)
    codec = load_codec("sd-vae-ft-mse")
    assert codec.meta(8)["scale"] == 0.18215
    assert codec.sha256 == sha256(tmp_path / "sd-vae-ft-mse" / WEIGHTS)
    assert load_codec("organisation/repository").meta(8)["scale"] == 0.9
    (tmp_path / "sd-vae-ft-mse" / WEIGHTS).unlink()  # a download that was interrupted
    with pytest.raises(ValueError, match=rf"no {WEIGHTS} in {tmp_path}/sd-vae-ft-mse.*bash scripts/fetch\.sh"):
        load_codec("sd-vae-ft-mse")


def test_the_hubs_cache_is_read_without_a_network(folder, tmp_path, monkeypatch):
    """Files laid out as the hub's client keeps them, on a machine with HF_HUB_OFFLINE=1."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    repository, commit = tmp_path / "models--stabilityai--sd-vae-ft-ema", COMMITS["stabilityai/sd-vae-ft-ema"]
    (repository / "refs").mkdir(parents=True)
    (repository / "snapshots").mkdir()
    (repository / "refs/main").write_text(commit)
    Path(folder(3)).rename(repository / "snapshots" / commit)
    assert load_codec("sd-vae-ft-ema").meta(8)["sha256"] == sha256(repository / "snapshots" / commit / WEIGHTS)


def test_what_suits_a_gpu_changes_only_rounding(folder, monkeypatch):
    path, images = folder(3), pixels(2, 3, 16, 16)
    exact, fast = load_codec(path), load_codec(path)
    fast.suit_gpu()
    expected = exact.encode(images)
    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.functional, "scaled_dot_product_attention", lambda *_, **__: pytest.fail("fused"))
        moments = fast.encode(images)
    torch.testing.assert_close(moments, expected, rtol=1e-2, atol=1e-3)
    assert moments.is_contiguous()
    assert fast.vae.encoder.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    latents = torch.randn(2, 3, 4, 4)
    torch.testing.assert_close(fast.decode(latents), exact.decode(latents), rtol=1e-4, atol=1e-4)
    compiled = []
    monkeypatch.setattr("torch.nn.Module.compile", lambda module, **options: compiled.append((module, options)))
    fast.compile_encoder()
    assert compiled == [(fast.vae.encoder, {"dynamic": False})]
    load_codec("pixels").compile_encoder()
    assert len(compiled) == 1


def test_the_compiled_decoder_makes_the_same_pixels(monkeypatch):
    """By a real compiler; the parts of a batch are of one size, so it compiles once."""
    monkeypatch.setattr("models.autoencoder.DECODED_PIXELS", 2 * 32**2)  # two images at a time
    codec = load_codec("assets/fashion-mnist-vae")
    latents = torch.randn(4, *codec.meta(32)["latent_shape"], generator=torch.Generator().manual_seed(1))
    expected = to_uint8(codec.decode(latents)).int()
    torch._dynamo.reset()
    counters.clear()
    codec.compile_decoder()
    decoder, called = codec.vae.decoder, []
    compiled = decoder._compiled_call_impl
    decoder._compiled_call_impl = lambda *given, **more: called.append(len(given[0])) or compiled(*given, **more)
    decoded = to_uint8(codec.decode(latents)).int()
    assert called == [2, 2]
    assert counters["stats"]["unique_graphs"] == 1
    assert counters["inductor"], "not compiled by inductor"
    assert (decoded - expected).abs().max() <= 1
    assert expected.float().std() > 10, "images that are flat would agree anyhow"


def test_hub_codecs_read_the_cached_folder(folder, monkeypatch):
    path, asked = folder(3, scaling_factor=0.9), {}

    def download(repository, file, revision):
        asked[repository] = revision
        return f"{path}/{file}"

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    scales = {
        name: load_codec(name).meta(8)["scale"] for name in [*codecs, "organisation/repository"] if name != "pixels"
    }
    assert scales == {"sd-vae-ft-mse": 0.18215, "sd-vae-ft-ema": 0.18215, "organisation/repository": 0.9}
    assert asked.pop("organisation/repository") is None
    assert asked == {name: commit for name, commit in COMMITS.items() if name in asked}


def test_weights_that_lack_a_tensor_are_refused(folder):
    """diffusers would draw it at random. Published VAEs name their attention's layers by older names, which count."""
    path = Path(folder(3))
    weights = load_file(path / WEIGHTS)
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    older = {name: next((name.replace(*pair) for pair in names.items() if pair[0] in name), name) for name in weights}
    assert any("query" in name for name in older.values())
    save_file({older[name]: tensor for name, tensor in weights.items()}, path / WEIGHTS)
    read = load_codec(str(path)).vae.state_dict()
    assert all(torch.equal(read[name], tensor) for name, tensor in weights.items())
    del weights["decoder.conv_in.bias"]
    save_file(weights, path / WEIGHTS)
    with pytest.raises(ValueError, match=r"codec .*: diffusion_pytorch_model\.safetensors lacks decoder\.conv_in"):
        load_codec(str(path))
