"""The authors' files, laid out as they wrote them with small random weights: each must give the function that the
authors' code computes, written out here from the tensors alone; and what must not be taken for one of them."""

import argparse
import json
import math
import os
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from safetensors import safe_open

import sample_ddp
from memory.bank import MemoryBank
from memory.files import sha256
from models.autoencoder import SD_SCALE, check_codec, load_codec
from models.checkpoint import init_weights, load_model, read_any
from models.published import ALLOWED, convert, hub_file, read_file, recognise
from models.sit import SiT, SiT_models
from samplers import euler_sampler, noise
from scripts import export

WIDTH, DEPTH, HEADS, SIDE, DIM, CLASSES = 64, 10, 2, 8, 12, 5
FREQ = [3, 0, 5, 1]


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """A size that is small but deep enough for the published place of the alignment heads, after block 8."""
    make = partial(SiT, name="SiT-Test/2", depth=DEPTH, width=WIDTH, num_heads=HEADS, patch_size=2)
    monkeypatch.setitem(SiT_models, "SiT-Test/2", make)


def published_state(condition, out_channels=4, heads=(), seed=0):
    """A state dict with the names, order and shapes of the authors' SiT classes, small."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"pos_embed": (1, (SIDE // 2) ** 2, WIDTH), "x_embedder.proj": (WIDTH, 4, 2, 2)}
    shapes |= {"t_embedder.mlp.0": (WIDTH, 256), "t_embedder.mlp.2": (WIDTH, WIDTH)}
    if condition == "label":
        shapes["y_embedder.embedding_table.weight"] = (CLASSES + 1, WIDTH)
    else:
        shapes["condition_projection.linear"] = (WIDTH, DIM)
    for i in range(DEPTH):
        for name, rows, columns in (("attn.qkv", 3, 1), ("attn.proj", 1, 1), ("mlp.fc1", 4, 1), ("mlp.fc2", 1, 4)):
            shapes[f"blocks.{i}.{name}"] = (rows * WIDTH, columns * WIDTH)
        shapes[f"blocks.{i}.adaLN_modulation.1"] = (6 * WIDTH, WIDTH)
    for j, dim in enumerate(heads):
        shapes |= {f"projectors.{j}.0": (2048, WIDTH), f"projectors.{j}.2": (2048, 2048)}
        shapes[f"projectors.{j}.4"] = (dim, 2048)
    shapes |= {"final_layer.linear": (4 * out_channels, WIDTH), "final_layer.adaLN_modulation.1": (2 * WIDTH, WIDTH)}
    state = {}
    for name, shape in shapes.items():
        scale = 0.5 if "embed" in name else 1 / math.sqrt(math.prod(shape[1:]))
        scale *= 0.3 if "adaLN" in name else 1  # larger ones amplify the rounding of float32 from block to block
        tensor = scale * torch.randn(shape, generator=generator)
        if name == "pos_embed" or name.endswith("weight"):
            state[name] = tensor
        else:
            state[f"{name}.weight"] = tensor
            state[f"{name}.bias"] = 0.1 * torch.randn(shape[0], generator=generator)
    return state


def reference(state, x, t, cond):
    """The authors' forward pass in float64, from the tensors: output (B, all channels, H, W)."""
    state = {name: tensor.double() for name, tensor in state.items()}

    def linear(name, value):
        return value @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def norm(value, shift, scale):
        value = (value - value.mean(-1, keepdim=True)) / (value.var(-1, keepdim=True, correction=0) + 1e-6).sqrt()
        return value * (1 + scale[:, None]) + shift[:, None]

    frequencies = torch.tensor([10_000 ** (-i / 128) for i in range(128)], dtype=torch.float64)
    angles = t.double()[:, None] * frequencies
    c = linear("t_embedder.mlp.2", F.silu(linear("t_embedder.mlp.0", torch.cat([angles.cos(), angles.sin()], 1))))
    if cond.ndim == 1:
        c = c + state["y_embedder.embedding_table.weight"][cond]
    else:
        c = c + linear("condition_projection.linear", F.normalize(cond.double(), dim=-1))
    batch, side = len(x), x.shape[-1] // 2
    patches = x.double().unfold(2, 2, 2).unfold(3, 2, 2)  # (B, C, h, w, p, q)
    patches = patches.permute(0, 2, 3, 1, 4, 5).reshape(batch, side * side, -1)
    h = patches @ state["x_embedder.proj.weight"].flatten(1).T + state["x_embedder.proj.bias"] + state["pos_embed"]
    for i in range(DEPTH):
        modulation = linear(f"blocks.{i}.adaLN_modulation.1", F.silu(c)).chunk(6, 1)
        qkv = linear(f"blocks.{i}.attn.qkv", norm(h, modulation[0], modulation[1]))
        q, k, v = qkv.reshape(batch, -1, 3, HEADS, WIDTH // HEADS).permute(2, 0, 3, 1, 4)
        attention = (q @ k.transpose(-1, -2) / math.sqrt(WIDTH // HEADS)).softmax(-1) @ v
        mixed = attention.transpose(1, 2).reshape(batch, -1, WIDTH)
        h = h + modulation[2][:, None] * linear(f"blocks.{i}.attn.proj", mixed)
        hidden = F.gelu(linear(f"blocks.{i}.mlp.fc1", norm(h, modulation[3], modulation[4])), approximate="tanh")
        h = h + modulation[5][:, None] * linear(f"blocks.{i}.mlp.fc2", hidden)
    out = linear("final_layer.linear", norm(h, *linear("final_layer.adaLN_modulation.1", F.silu(c)).chunk(2, 1)))
    out = torch.einsum("nhwpqc->nchpwq", out.reshape(batch, side, side, 2, 2, -1))
    return out.reshape(batch, -1, 2 * side, 2 * side)


def sit_velocity(state, x, t, cond):
    """SiT's output at SiT's time: the first half of the channels, data − noise."""
    return reference(state, x, t, cond).chunk(2, dim=1)[0]


def inputs(condition, batch=3):
    generator = torch.Generator().manual_seed(1)
    x, t = torch.randn(batch, 4, SIDE, SIDE, generator=generator), torch.tensor([0.0, 0.37, 1.0])[:batch]
    cond = torch.tensor([0, CLASSES, 2])[:batch] if condition == "label" else torch.randn(batch, DIM)
    return x, t, cond


def namespace(**changes):
    """Arguments as the authors' scripts leave them in a checkpoint, a NumPy number among them."""
    args = {"path_type": "linear", "prediction": "v", "encoder_depth": 4, "exp_name": "a", "lr": np.float64(1e-4)}
    return argparse.Namespace(**{**args, **changes})


SNIPPETS = torch.randn(len(FREQ), DIM, generator=torch.Generator().manual_seed(2))


def gmem(path):
    state = published_state("snippet", heads=(7,))
    torch.save({"network": state, "memorybank": SNIPPETS, "memoryfreq": FREQ}, path)
    return state


def gmem_with_files(path):
    state = published_state("snippet", heads=(7,))
    torch.save({"ema": state}, path)
    torch.save(SNIPPETS, path.with_name("bank.pth"))
    torch.save(FREQ, path.with_name("bank.freq"))
    return state


def repa(path):
    state = published_state("label")
    torch.save(state, path)
    return state


def repa_training(path):
    state = published_state("label", heads=(7, 9))
    other = {name: tensor + 1 for name, tensor in state.items()}
    content = {"model": other, "ema": state, "opt": {"state": {}, "param_groups": []}, "args": namespace()}
    torch.save({**content, "steps": 400}, path)
    return state


def repa_old(path, depth=8):
    state = published_state("label", heads=(7,))
    old = {}
    for name, tensor in state.items():
        parts = name.split(".")
        if parts[0] == "blocks" and int(parts[1]) >= depth:
            parts[:2] = "decoder_blocks", str(int(parts[1]) - depth)
        old[".".join(parts)] = tensor
    torch.save({"ema": old}, path)
    return state


def sit(path):
    state = published_state("label", out_channels=8)
    torch.save(state, path, _use_new_zipfile_serialization=False)
    return state


def sit_training(path):
    state = published_state("label", out_channels=8)
    args = namespace(path_type="Linear", prediction="velocity", vae="ema")
    del args.encoder_depth
    torch.save({"model": state, "ema": state, "opt": {}, "args": args}, path)
    return state


FORMATS = [gmem, gmem_with_files, repa, repa_training, repa_old, sit, sit_training]


@pytest.mark.parametrize("write", FORMATS)
def test_a_published_file_gives_its_authors_function(tmp_path, write):
    path = tmp_path / "0000400.pt"
    state = write(path)
    model, config, bank = load_model(path)
    x, t, cond = inputs(model.condition)
    with torch.no_grad():
        ours = model(x, t, cond).double()
    theirs = -sit_velocity(state, x, 1 - t, cond) if write in (sit, sit_training) else reference(state, x, t, cond)
    assert theirs.std() > 0.5, "the reference must not be trivial"
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert config["image_size"] == 64
    assert (config["encoder"], config["store"], config["codec"]["sha256"]) == (None, None, None)
    assert (config["codec"]["scale"], config["codec"]["latent_shape"]) == (SD_SCALE, [4, SIDE, SIDE])
    assert config["codec"]["name"] == ("sd-vae-ft-mse" if write in (gmem, gmem_with_files) else "sd-vae-ft-ema")
    assert (config["args"]["interpolant"], config["args"]["snippet_from"]) == ("linear", None)
    assert config["steps"] == 400
    if model.condition == "snippet":
        assert torch.equal(bank.snippets, SNIPPETS)
        assert bank.freq.tolist() == FREQ
    else:
        assert bank is None
        assert model.config["num_classes"] == CLASSES


def test_alignment_heads_keep_their_place(tmp_path):
    for depth in (8, 4):
        state = repa_old(tmp_path / "old.pt", depth)
        old = load_model(tmp_path / "old.pt")[0]
        assert old.config["align_depth"] == depth
        assert all(torch.equal(tensor, state[name]) for name, tensor in old.state_dict().items())
    repa_training(tmp_path / "new.pt")
    model, config, _ = load_model(tmp_path / "new.pt")
    assert (model.config["align_depth"], model.config["align_dims"]) == (4, [7, 9])
    assert (config["args"]["lr"], config["args"]["exp_name"]) == (1e-4, "a")
    assert torch.equal(load_model(tmp_path / "new.pt", "model")[0].pos_embed, model.pos_embed + 1)
    repa(tmp_path / "plain.pt")
    with pytest.raises(ValueError, match="without 'model' weights"):
        load_model(tmp_path / "plain.pt", "model")


def test_heads_of_a_network_with_fewer_than_eight_blocks_read_the_last(tmp_path):
    model = SiT_models["SiT-Ti/2"](input_size=SIDE, snippet_dim=DIM, align_dims=(7,), align_depth=6)
    torch.save({"network": model.state_dict(), "memorybank": SNIPPETS, "memoryfreq": FREQ}, tmp_path / "a.pth")
    assert load_model(tmp_path / "a.pth")[0].config["align_depth"] == 6


@pytest.mark.parametrize("write", [gmem_with_files, repa_old, sit_training])
def test_names_that_a_wrapped_network_gave_are_read(tmp_path, write):
    """A copy whose author saved DistributedDataParallel itself: "module." stands before every name."""
    write(tmp_path / "a.pt")
    plain, contents = load_model(tmp_path / "a.pt")[0].state_dict(), read_file(tmp_path / "a.pt")
    for key in contents.keys() & {"ema", "model"}:
        contents[key] = {f"module.{name}": tensor for name, tensor in contents[key].items()}
    torch.save(contents, tmp_path / "b.pt")
    wrapped = load_model(tmp_path / "b.pt")[0].state_dict()
    assert all(torch.equal(tensor, wrapped[name]) for name, tensor in plain.items())


def test_the_path_of_sit_is_followed_from_noise_to_data(tmp_path):
    state = sit(tmp_path / "SiT-Ti-2.pt")
    model, _, _ = load_model(tmp_path / "SiT-Ti-2.pt")
    z, labels = torch.randn(2, 4, SIDE, SIDE).double(), torch.tensor([1, 3])
    x = z
    for i in range(5):  # SiT's own direction
        x = x + sit_velocity(state, x, torch.full((2,), i / 5), labels) / 5
    with torch.no_grad():
        ours = euler_sampler(lambda x, t: model(x.float(), t.float(), labels), z, 5)
    torch.testing.assert_close(ours, x, rtol=1e-4, atol=1e-4)


def test_the_cosine_path_of_sit_is_ours(tmp_path):
    args = namespace(path_type="GVP", prediction="velocity")
    checkpoint = convert({"ema": published_state("label", 8), "args": args}, tmp_path / "a.pt")
    assert checkpoint["args"]["interpolant"] == "cosine"


@pytest.mark.parametrize("freq", [FREQ, torch.tensor(FREQ), np.array(FREQ), [np.int64(f) for f in FREQ]])
def test_frequencies_come_as_lists_tensors_and_arrays(tmp_path, freq):
    content = {"network": published_state("snippet"), "memorybank": SNIPPETS, "memoryfreq": freq}
    torch.save(content, tmp_path / "a.pth")
    assert load_model(tmp_path / "a.pth")[2].freq.tolist() == FREQ


def test_a_bank_beside_the_file_is_needed_and_replaceable(tmp_path):
    path = tmp_path / "ours" / "gmem.pth"
    path.parent.mkdir()
    gmem_with_files(path)
    MemoryBank(torch.randn(3, DIM), [1, 1, 1]).save(tmp_path / "other" / "bank.pth")
    assert len(load_model(path, bank=tmp_path / "other")[2]) == 3
    path.with_name("bank.freq").unlink()
    with pytest.raises(ValueError, match=r"bank\.freq is missing"):
        load_model(path)
    path.with_name("bank.pth").unlink()
    with pytest.raises(ValueError, match=r"ours/bank\.pth, which the checkpoint names, is not there: pass its place"):
        load_model(path)
    gmem(path)
    assert len(load_model(path, bank=tmp_path / "other")[2]) == 3
    assert load_model(path, bank=False)[2] is None


@pytest.mark.parametrize("name", [name for name in SiT_models if name != "SiT-Test/2"])
def test_sizes_are_read_from_the_shapes(name):
    patch, depth = (SiT_models[name].keywords[key] for key in ("patch_size", "depth"))
    options = {"align_dims": (768, 32), "align_depth": min(8, depth), "qk_norm": patch == 4, "in_channels": 2 * patch}
    if patch > 2:
        options |= {"input_size": 64, "condition": "label", "num_classes": 10}
    else:
        options |= {"snippet_dim": 640}
    with torch.device("meta"):
        model = SiT_models[name](**options)
    found, _ = recognise(model.state_dict())
    assert found == {key: model.config[key] for key in found}
    assert found.keys() >= options.keys() - {"align_depth"} | {"model", "input_size"}


def test_the_published_size():
    with torch.device("meta"):
        found, form = recognise(SiT_models["SiT-XL/2"](align_dims=(768,)).state_dict())
        rebuilt = SiT_models[found.pop("model")](**found)
    assert sum(parameter.numel() for parameter in rebuilt.parameters()) == 682_975_248
    assert form == "GMem's first release"


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    """An untrained VAE of Stable Diffusion's factors: 3 channels, 8 pixels a latent, 4 latent channels."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("vae")
    AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(4, 4, 8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=4,
        scaling_factor=SD_SCALE,
    ).save_pretrained(folder)
    return folder


def sample(checkpoint, out, vae, *flags):
    command = ["--checkpoint", checkpoint, "--out", out, "--codec", vae, "--num-images", 2, "--steps", 3, *flags]
    sample_ddp.main([str(part) for part in command])
    facts = json.loads((out / "samples.json").read_text())
    return np.load(out / "samples.npz")["arr_0"], facts["settings"]


@pytest.mark.parametrize("write", FORMATS)
def test_every_format_samples(tmp_path, vae, write):
    path = tmp_path / "weights.pt"
    write(path)
    images, settings = sample(path, tmp_path / "samples", vae)
    assert images.shape == (2, 64, 64, 3)
    assert not np.array_equal(images[0], images[1])
    assert (settings["checkpoint"], settings["encoder"]) == (sha256(path), None)
    if write is gmem:
        assert settings["bank"] == {"checkpoint": sha256(path)}
    elif write is gmem_with_files:
        assert settings["bank"].keys() == {"bank.pth", "bank.freq"}
    else:
        assert settings["bank"] is None


def test_the_bank_inside_the_file_answers_the_noise(tmp_path, vae):
    gmem(tmp_path / "one.pth")
    generator = sample_ddp.Generator(
        sample_ddp.parse(["--checkpoint", str(tmp_path / "one.pth"), "--out", "x", "--codec", str(vae)]),
        torch.device("cpu"),
    )
    images = torch.arange(4)
    z = noise(0, images, 0, (4, SIDE, SIDE), "cpu")
    u = torch.special.ndtr(z.double().mean((1, 2, 3)) * 16)
    rows = [min(int((np.cumsum(FREQ) / sum(FREQ) <= value.item()).sum()), 3) for value in u]
    torch.testing.assert_close(generator.labels_and_snippets(images, z)["snippet"], F.normalize(SNIPPETS[rows], dim=1))


def test_published_networks_guide_and_initialise(tmp_path, vae):
    state = sit(tmp_path / "sit.pt")
    repa(tmp_path / "repa.pt")
    guided = sample(tmp_path / "repa.pt", tmp_path / "a", vae, "--guide", tmp_path / "sit.pt", "--guidance-scale", 2)
    assert guided[1]["guidance"]["by"] == sha256(tmp_path / "sit.pt")
    sample(tmp_path / "repa.pt", tmp_path / "b", vae, "--guide", "null", "--guidance-scale", 1.5)
    network = SiT_models["SiT-Test/2"](input_size=SIDE, condition="label", num_classes=CLASSES)
    assert init_weights(network, tmp_path / "sit.pt") == []
    x, t, cond = inputs("label")
    with torch.no_grad():
        velocity = network.eval()(x, t, cond).double()
    torch.testing.assert_close(velocity, -sit_velocity(state, x, 1 - t, cond), rtol=1e-4, atol=1e-5)


class Evil:
    """A pickle of this runs a command when it is loaded carelessly."""

    def __init__(self, function, *arguments):
        self.reduced = function, arguments

    def __reduce__(self):
        return self.reduced


@pytest.mark.parametrize(
    "evil",
    [
        Evil(os.mkdir, "MARK"),
        Evil(exec, "import os; os.mkdir('MARK')"),
        Evil(np.fromfile, "MARK"),
        Evil(np.load, "MARK"),
        Evil(getattr, argparse.Namespace, "__init__"),
        Evil(argparse.ArgumentParser),
        np.array([Evil(os.mkdir, "MARK")], dtype=object),
        np.array([1], dtype=object),
        argparse.Namespace(deep=[{"x": Evil(os.mkdir, "MARK")}]),
    ],
    ids=lambda evil: type(evil).__name__,
)
def test_hostile_files_are_refused_unrun(tmp_path, monkeypatch, evil):
    monkeypatch.chdir(tmp_path)
    state = published_state("label")
    for content in ({"ema": state, "args": evil}, {"network": state, "memorybank": SNIPPETS, "memoryfreq": evil}):
        torch.save(content, "a.pt")
        with pytest.raises(ValueError, match=r"a\.pt cannot be read as a torch.save file of plain values") as error:
            load_model("a.pt")
        assert "weights_only" not in str(error.value), "no advice to load it unsafely"
    assert not os.path.exists("MARK")


def test_the_allow_list_is_the_shortest():
    names = {item[1] if isinstance(item, tuple) else f"{item.__module__}.{item.__qualname__}" for item in ALLOWED}
    others = {name for name in names if not name.startswith("numpy.dtypes.")}
    modules = [f"numpy.{core}.multiarray.{name}" for core in ("core", "_core") for name in ("_reconstruct", "scalar")]
    assert others == {"argparse.Namespace", "numpy.ndarray", "numpy.dtype", *modules}
    assert not {"ObjectDType", "VoidDType", "StrDType"} & {name.split(".")[-1] for name in names}


def test_arrays_and_numbers_of_numpy_are_read(tmp_path):
    before = set(torch.serialization.get_safe_globals())
    content = {"a": np.arange(6.0).reshape(2, 3), "b": np.float32(2), "c": np.int64(7), "d": argparse.Namespace(e=[1])}
    torch.save(content, tmp_path / "a.pt")
    found = read_file(tmp_path / "a.pt")
    assert np.array_equal(found["a"], content["a"])
    assert (found["b"], found["c"], found["d"]) == (2, 7, argparse.Namespace(e=[1]))
    assert set(torch.serialization.get_safe_globals()) == before, "the list holds while a file is read, not after"
    data = (tmp_path / "a.pt").read_bytes()
    with pytest.raises(ValueError, match="numpy"):
        read_file(tmp_path / "a.pt", allowed=())
    (tmp_path / "a.pt").write_bytes(data[:-100])
    with pytest.raises(ValueError, match="cannot be read"):
        read_file(tmp_path / "a.pt")


def broken(state, *removed, **changed):
    return {name: changed.get(name, tensor) for name, tensor in state.items() if name not in removed}


def test_what_does_not_fit_is_listed_short(tmp_path):
    state = published_state("label", 8)
    state = broken(state, "x_embedder.proj.bias", "t_embedder.mlp.0.weight")
    state |= {f"blocks.{i}.attn.qkv.weight": torch.zeros(2, 2) for i in range(DEPTH)} | {"extra": torch.zeros(3)}
    torch.save(state, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=r"\(by its tensors SiT's own, time reversed\) does not fit") as error:
        load_model(tmp_path / "a.pt")
    lines = str(error.value).splitlines()
    assert f"({DEPTH + 3} differences)" in lines[0]
    assert "  missing     x_embedder.proj.bias (64,)" in lines
    assert "  missing     t_embedder.mlp.0.weight (64, 256)" in lines
    assert "  unexpected  extra (3,)" in lines
    assert "  mis-shaped  blocks.*.attn.qkv.weight: the file has (2, 2), the network (192, 64), 10 times" in lines
    assert len(lines) == 5


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"quant_conv.weight": torch.zeros(8, 8, 1, 1), "encoder.conv_in.bias": torch.zeros(2)}, "a VAE: pass it as"),
        ({"feat_rope.freqs_cos": torch.zeros(4, 4)}, "LightningDiT"),
        ({"ema": {"Mixed_5b.branch1x1.conv.weight": torch.zeros(2)}}, "the Inception network"),
        (torch.zeros(4, 12), r"holds Tensor \(a bank's snippets\?"),
        ([1, 2, 3], r"holds list \(a bank's frequencies\?"),
        ({"state": {}, "param_groups": []}, "an optimizer's state"),
        ({"state_dict": {}}, "a dictionary of state_dict"),
        ({}, "a dictionary of nothing"),
        ({"ema": {}}, "a dictionary of ema"),
        ({"ema": {"shadow": [torch.zeros(2)]}}, "a dictionary of ema"),
        ({"network": {}, "memorybank": SNIPPETS}, "GMem's has memoryfreq too"),
    ],
)
def test_what_a_wrong_file_is_taken_for(tmp_path, content, said):
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=said) as error:
        load_model(tmp_path / "a.pt")
    assert str(tmp_path / "a.pt") in str(error.value)
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("args", "said"), [({"path_type": "VP"}, "path_type 'VP'; .* linear, cosine"), ({"prediction": "noise"}, "'noise'")]
)
def test_other_predictions_are_refused(tmp_path, args, said):
    torch.save({"ema": published_state("label", 8), "args": namespace(**args)}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=said):
        load_model(tmp_path / "a.pt")


def test_a_dit_is_known_by_its_name_only(tmp_path):
    sit(tmp_path / "DiT-XL-2-256x256.pt")
    with pytest.raises(ValueError, match="one of DiT's by its name: it predicts noise"):
        load_model(tmp_path / "DiT-XL-2-256x256.pt")
    repa(tmp_path / "dit-repa.pt")  # 4 channels: no DiT of that kind
    assert load_model(tmp_path / "dit-repa.pt")[0].condition == "label"


def test_a_codec_of_unknown_hash_fits(tmp_path):
    codec = convert(published_state("label"), tmp_path / "a.pt")["codec"]
    check_codec({**codec, "name": "folder", "sha256": "1"}, codec, "the checkpoint")
    check_codec(codec, {**codec, "sha256": "1"}, "the guide")
    with pytest.raises(ValueError, match="sha256 is 1, expected 2"):
        check_codec({**codec, "sha256": "1"}, {**codec, "sha256": "2"}, "the checkpoint")
    with pytest.raises(ValueError, match="scale is 1, expected"):
        check_codec({**codec, "sha256": "1", "scale": 1}, codec, "the checkpoint")


def test_a_bad_bank_inside_names_the_file(tmp_path):
    content = {"network": published_state("snippet"), "memorybank": SNIPPETS, "memoryfreq": [1, 2]}
    torch.save(content, tmp_path / "a.pth")
    with pytest.raises(ValueError, match=r"a\.pth, its memory bank: freq"):
        load_model(tmp_path / "a.pth")


def test_the_hub_needs_a_pinned_revision_and_says_what_is_missing(tmp_path):
    file = "GMem_XL_2Miter_ImageNet-1K_K640000_5epo.pth"
    for name in (f"hf:Tangentone/GMem/{file}", f"hf:Tangentone/GMem/{file}@main", "hf:GMem@" + "0" * 40):
        with pytest.raises(ValueError, match="expected hf:ORGANISATION/REPOSITORY/FILE@REVISION"):
            hub_file(name)
    with pytest.raises(ValueError, match=f"{file} of hub repository 'Tangentone/GMem' at 012345678901 neither lie at"):
        load_model(f"hf:Tangentone/GMem/{file}@{'0123456789' * 4}")


def test_a_cached_file_of_the_hub_is_used(tmp_path, monkeypatch):
    revision = "0123456789" * 4
    folder = tmp_path / "models--some--where" / "snapshots" / revision / "sub"
    folder.mkdir(parents=True)
    repa(folder / "last.pt")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert load_model(f"hf:some/where/sub/last.pt@{revision}")[0].condition == "label"


def test_an_export_is_the_same_model(tmp_path, vae, capsys):
    gmem(tmp_path / "gmem.pth")
    model, _, bank = load_model(tmp_path / "gmem.pth")
    export.main([str(tmp_path / "gmem.pth"), "--out", str(tmp_path / "st")])
    assert {path.name for path in (tmp_path / "st").iterdir()} >= {"model.safetensors", "README.md", "bank.pth"}
    assert len({path.stat().st_mode for path in (tmp_path / "st").iterdir()}) == 1  # who reads one reads all
    (tmp_path / "st").rename(tmp_path / "moved")
    export.main([str(tmp_path / "moved"), "--out", str(tmp_path / "pt"), "--format", "pt"])
    for folder in ("moved", "pt"):
        loaded, config, its_bank = load_model(tmp_path / folder)
        assert loaded.config == model.config == config["model_config"]
        assert all(torch.equal(a, b) for a, b in zip(loaded.state_dict().values(), model.state_dict().values()))  # noqa: B905
        assert torch.equal(its_bank.snippets, bank.snippets)
        assert its_bank.freq.tolist() == FREQ
    first, _ = sample(tmp_path / "gmem.pth", tmp_path / "a", vae)
    assert np.array_equal(sample(tmp_path / "moved", tmp_path / "b", vae)[0], first)
    with safe_open(tmp_path / "moved" / "model.safetensors", "pt") as file:
        assert json.loads(file.metadata()["config"])["bank"]["path"] == "bank.pth"
    card = (tmp_path / "moved" / "README.md").read_text()
    for fact in ("SiT-Test/2", "gmem.pth", sha256(tmp_path / "gmem.pth"), "4 snippets of 12", "| not known |"):
        assert fact in card
    assert card in capsys.readouterr().out


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("condition", ["snippet", "label+snippet", "label", "none"])
def test_the_cards_code_loads_an_export_with_one_file_of_this_project(root, tmp_path, monkeypatch, half, condition):
    """As a stranger runs it: in the export's folder, with a copy of models/sit.py."""
    model = SiT_models["SiT-Ti/2"](input_size=SIDE, condition=condition, snippet_dim=DIM, num_classes=CLASSES)
    torch.nn.init.normal_(model.final_layer.linear.weight)
    MemoryBank(SNIPPETS, FREQ).save(tmp_path / "bank.pth")
    named = {"path": str(tmp_path / "bank.pth"), "sha256": sha256(tmp_path / "bank.pth")}
    facts = {"bank": named if "snippet" in model.reads else None, "store": None}
    facts |= {"codec": {"name": "pixels", "scale": 1.0}, "image_size": 64, "encoder": None, "steps": 3}
    facts |= {"model_config": model.config, "args": {"interpolant": "linear", "snippet_from": "nearest"}}
    torch.save({"ema": model.state_dict(), **facts}, tmp_path / "a.pt")
    export.main([str(tmp_path / "a.pt"), "--out", str(tmp_path / "st"), *(["--half"] if half else [])])
    code = (tmp_path / "st" / "README.md").read_text().split("```python\n")[1].split("```")[0]
    (tmp_path / "sit").mkdir()
    (tmp_path / "sit" / "sit.py").write_text((root / "models" / "sit.py").read_text())
    monkeypatch.syspath_prepend(tmp_path / "sit")
    monkeypatch.chdir(tmp_path / "st")
    loaded, names = load_model(tmp_path / "st")[0], {}
    exec(code, names)
    assert all(torch.equal(tensor, loaded.state_dict()[key]) for key, tensor in names["network"].state_dict().items())
    if "snippet" in model.reads:
        assert torch.equal(names["snippets"].float(), SNIPPETS.half().float() if half else SNIPPETS)
        assert list(names["freq"]) == FREQ


def test_half_an_export_is_one_file(tmp_path, vae):
    """Weights and bank in float16 in the file of weights: sampled as it is, and half the size."""
    gmem(tmp_path / "gmem.pth")
    model, _, bank = load_model(tmp_path / "gmem.pth")
    for name, flags in (("full", []), ("half", ["--half"])):
        export.main([str(tmp_path / "gmem.pth"), "--out", str(tmp_path / name), *flags])
    assert {path.name for path in (tmp_path / "half").iterdir()} == {"model.safetensors", "README.md"}
    sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("half", "full")]
    assert sizes[0] < 0.55 * sizes[1]
    (tmp_path / "half").rename(tmp_path / "moved")
    loaded, _, its_bank = load_model(tmp_path / "moved")
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor.half().float()), name
    assert torch.equal(its_bank.snippets, bank.snippets.half().float())
    assert its_bank.freq.tolist() == FREQ
    whole, halved = (sample(tmp_path / name, tmp_path / f"of-{name}", vae)[0].astype(int) for name in ("full", "moved"))
    assert 0 < abs(whole - halved).max() <= 2


def test_half_refuses_what_float16_cannot_hold(tmp_path):
    state = gmem(tmp_path / "gmem.pth")
    state["x_embedder.proj.weight"][0, 0, 0, 0] = 1e5
    torch.save({"network": state, "memorybank": SNIPPETS, "memoryfreq": FREQ}, tmp_path / "gmem.pth")
    with pytest.raises(ValueError, match=r"--half: x_embedder\.proj\.weight has numbers beyond"):
        export.main([str(tmp_path / "gmem.pth"), "--out", str(tmp_path / "half"), "--half"])
    with pytest.raises(SystemExit):
        export.parse(["gmem.pth", "--out", "half", "--half", "--format", "pt"])


def test_an_export_does_not_tell_the_folders_of_its_maker(tmp_path):
    """Names of the files that a run was made from stay; where they lay on the machine goes."""
    model = SiT_models["SiT-Test/2"](input_size=SIDE, snippet_dim=DIM)
    facts = {"interpolant": "linear", "snippet_from": "nearest", "store": "/home/anna/data/x", "out": None, "steps": 3}
    facts |= {"holdout": "/home/anna/data/x-holdout", "bank": "/home/anna/banks/x"}
    meta = {"store": "/home/anna/data/x", "run": {"command": ["--store", "/home/anna/data/x"], "seconds": 2.0}}
    MemoryBank(SNIPPETS, FREQ, meta=meta).save(tmp_path / "bank.pth")
    named = {"path": str(tmp_path / "bank.pth"), "sha256": sha256(tmp_path / "bank.pth")}
    checkpoint = {"ema": model.state_dict(), "model_config": model.config, "steps": 3, "args": facts, "bank": named}
    checkpoint |= {"store": {"path": "/home/anna/data/x", "fingerprint": "f"}, "image_size": 64, "encoder": "toy"}
    torch.save(checkpoint | {"codec": {"name": "pixels", "scale": 1.0}}, tmp_path / "0000003.pt")
    export.main([str(tmp_path / "0000003.pt"), "--out", str(tmp_path / "st")])
    with safe_open(tmp_path / "st" / "model.safetensors", "pt") as file:
        config = file.metadata()["config"]
    written = [(tmp_path / "st" / name).read_text() for name in ("README.md", "bank.json")]
    assert "anna" not in config + "".join(written)
    assert json.loads(written[1]).items() >= {"store": "x", "run": {"seconds": 2.0}}.items()
    assert json.loads(config)["args"] == facts | {"store": "x", "holdout": "x-holdout", "bank": "x"}
    assert json.loads(config)["store"] == {"path": "x", "fingerprint": "f"}


def test_an_exported_codec_is_known_by_name_and_hash(tmp_path, vae, monkeypatch):
    """And found in the weights folder, or by --codec; one of other weights is refused."""
    model, codec = SiT_models["SiT-Test/2"](input_size=SIDE, condition="none"), load_codec(str(vae)).meta(64)
    facts = {"model_config": model.config, "steps": 3, "args": {"interpolant": "linear", "snippet_from": "own"}}
    facts |= {"bank": None, "store": None, "encoder": None, "image_size": 64}
    monkeypatch.chdir(tmp_path)
    for folder in ("assets", "weights-here"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / vae.name).symlink_to(vae)
    names = {name: name for name in (f"assets/{vae.name}", "organisation/repository")}
    names |= dict.fromkeys((f"weights-here/{vae.name}", f"../{vae.name}", str(vae)), vae.name)
    for published, (given, kept) in zip((tmp_path / letter for letter in "abcde"), names.items(), strict=True):
        torch.save({"ema": model.state_dict(), "codec": codec | {"name": given}, **facts}, tmp_path / "a.pt")
        export.main([str(tmp_path / "a.pt"), "--out", str(published)])
        assert load_model(published)[1]["codec"] == codec | {"name": kept}
        assert codec["sha256"] in (published / "README.md").read_text()

    words = ["--checkpoint", str(published), "--num-images", "2", "--steps", "3", "--out"]
    with pytest.raises(ValueError, match=rf"codec '{vae.name}' is none of .*: give its folder by --codec"):
        sample_ddp.main([*words, str(tmp_path / "x")])
    monkeypatch.setenv("GMEM_WEIGHTS", str(vae.parent))
    sample_ddp.main([*words, str(tmp_path / "x")])
    found = np.load(tmp_path / "x" / "samples.npz")["arr_0"]
    assert np.array_equal(found, sample(published, tmp_path / "y", vae)[0])
    other = AutoencoderKL.from_pretrained(vae)
    torch.nn.init.ones_(other.quant_conv.weight)
    other.save_pretrained(tmp_path / "weights" / vae.name)
    monkeypatch.setenv("GMEM_WEIGHTS", str(tmp_path / "weights"))
    with pytest.raises(ValueError, match=f"sha256 is .*, expected {codec['sha256']}"):
        sample_ddp.main([*words, str(tmp_path / "z")])


def test_an_export_refuses_a_used_folder_and_can_leave_the_bank(tmp_path):
    gmem_with_files(tmp_path / "gmem.pth")
    with pytest.raises(ValueError, match="is there and not empty"):
        export.main([str(tmp_path / "gmem.pth"), "--out", str(tmp_path)])
    export.main([str(tmp_path / "gmem.pth"), "--out", str(tmp_path / "st"), "--no-bank"])
    with pytest.raises(ValueError, match=r"st/bank\.pth, which the checkpoint names, is not there: pass its place"):
        load_model(tmp_path / "st")
    assert len(load_model(tmp_path / "st", bank=tmp_path / "bank.pth")[2]) == len(FREQ)


def test_other_safetensors_are_state_dicts(tmp_path):
    """An author's weights are read from them, and what they are mistaken for is said as of torch's files."""
    state = published_state("label", 8)
    torch.save(state, tmp_path / "a.pt")
    export.save_file({name: tensor.contiguous() for name, tensor in state.items()}, tmp_path / "a.safetensors")
    expected, loaded = (load_model(tmp_path / name)[0].state_dict() for name in ("a.pt", "a.safetensors"))
    assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.items())
    export.save_file({"quant_conv.weight": torch.zeros(8, 8, 1, 1)}, tmp_path / "a.safetensors")
    taken_for = r"a VAE: pass it as --codec, as a folder in diffusers' format"
    with pytest.raises(ValueError, match=rf"a\.safetensors is, by its tensors, {taken_for}$"):
        load_model(tmp_path / "a.safetensors")
    export.save_file({}, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="a dictionary of nothing"):
        load_model(tmp_path / "a.safetensors")
    (tmp_path / "a.safetensors").write_bytes(b"short")
    with pytest.raises(ValueError, match="cannot be read as a safetensors file"):
        read_any(tmp_path / "a.safetensors")
