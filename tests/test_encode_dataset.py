"""The encode command: the same store whatever the source, the processes and the interruptions; nothing half-made."""

import errno
import gzip
import json
import os
import shutil
import subprocess
import tarfile
import traceback
import warnings
import zipfile
from collections import namedtuple
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file

from dataset import LatentDataset, layout
from models.autoencoder import load_codec
from models.encoder import load_encoder
from scripts import encode_dataset, store
from scripts.encode_dataset import blocks_to_do, check_finite, finite, main, name_fraction
from scripts.images import square
from scripts.sources import open_source

SIZE, COUNT = 16, 30
TINY = "test_vit@32"


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """Thirty structured colour images of one size in three classes."""
    path = tmp_path_factory.mktemp("source") / "images"
    for i in range(COUNT):
        coarse = np.random.default_rng(i).integers(256, size=(4, 4, 3), dtype=np.uint8)
        file = path / "abc"[i // 10] / f"{i:02d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(coarse).resize((30, 24), Image.Resampling.BICUBIC).save(file)
    return path


@pytest.fixture(scope="session")
def weights(tmp_path_factory):
    """A tiny vision transformer with random weights."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "vit.pth"
    torch.save(timm.create_model("test_vit").state_dict(), path)
    return path


@pytest.fixture(scope="session")
def encoded(folder, weights, tmp_path_factory):
    """A store with two views, features and patch tokens, and a held-out part."""
    path = tmp_path_factory.mktemp("stores") / "encoded"
    flags = ("--views", 2, "--holdout", 0.3, "--encoder", TINY, "--encoder-weights", weights, "--patches")
    run(folder, path, *flags)
    return path


def run(source, out, *flags, codec="pixels", size=SIZE):
    what = () if codec is None else ("--codec", codec, "--image-size", size)
    main([str(flag) for flag in (source, "--out", out, "--workers", 0, "--batch-size", 4, *what, *flags)])


def content(path, but=()):
    """All in a store by relative name, and meta.json by its keys, without what is named and where it was made."""
    files = {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}
    files |= json.loads(files.pop("meta.json"))
    return {name: value for name, value in files.items() if name not in (*but, "runs")}


def test_the_store_holds_the_cropped_images_in_both_views(folder, tmp_path):
    run(folder, tmp_path / "s", "--views", 2, "--keep-images")
    data, source = LatentDataset(tmp_path / "s", images=True), open_source(folder)
    expected = torch.from_numpy(np.stack([square(source.image(i), SIZE, 3, False) for i in range(COUNT)]))
    rows = np.arange(COUNT)
    for view, images in enumerate((expected, expected.flip(-1))):
        batch = data.fetch(rows, np.full(COUNT, view))
        assert torch.equal(batch["moments"], images)
        assert torch.equal(batch["image"], images)
    assert batch["label"].tolist() == [0] * 10 + [1] * 10 + [2] * 10
    assert (tmp_path / "s/files.txt").read_text().split() == source.names
    assert not (tmp_path / "s/progress").exists()
    meta = data.meta
    assert (meta["num_images"], meta["num_views"]) == (COUNT, 2)
    assert (meta["num_classes"], meta["class_names"], meta["image_channels"]) == (3, ["a", "b", "c"], 3)
    assert meta["codec"] == load_codec("pixels").meta(SIZE)


def test_zip_and_npz_give_the_same_arrays_as_the_folder(folder, tmp_path):
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        for file in folder.rglob("*.png"):
            archive.write(file, file.relative_to(folder))
    with tarfile.open(tmp_path / "images.tar", "w") as archive:
        archive.add(folder, "train")
        archive.add(folder.parent / "images/a/00.png", "train/a/.hidden.png")
    source = open_source(folder)
    np.savez(tmp_path / "images.npz", arr_0=[source.image(i) for i in range(COUNT)], labels=source.labels)
    for name in (folder, tmp_path / "images.zip", tmp_path / "images.npz"):
        run(name, tmp_path / f"from-{name.suffix}")
    run(tmp_path / "images.tar", tmp_path / "from-.tar", "--workers", 2)
    first, second, third = (content(tmp_path / f"from-{suffix}", ("source",)) for suffix in ("", ".zip", ".npz"))
    assert first == second  # names and hashes included
    different = ("source", "source_hash", "fingerprint", "files.txt")  # the folder's name is in the tar
    assert content(tmp_path / "from-.tar", different) == content(tmp_path / "from-", different)
    for file in ("latents.npy", "labels.npy"):
        assert first[file] == third[file]


def test_idx_images_stay_grey_and_get_a_frame(tmp_path):
    images = np.random.default_rng(0).integers(256, size=(9, 28, 28), dtype=np.uint8)
    header = np.array([0x803, *images.shape], ">u4").tobytes()
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(header + images.tobytes()))
    header = np.array([0x801, 9], ">u4").tobytes()
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(header + bytes(range(9)))
    run(tmp_path, tmp_path / "s", "--keep-images", size=32)
    data = LatentDataset(tmp_path / "s", images=True)
    framed = np.pad(images, ((0, 0), (2, 2), (2, 2)))[:, None]
    assert np.array_equal(data.latents[:, 0], framed)
    assert np.array_equal(data.images, framed)
    assert data.labels.tolist() == list(range(9))
    assert (data.meta["image_channels"], data.meta["num_classes"], data.meta["class_names"]) == (1, 9, None)


def test_small_images_that_are_enlarged_are_warned_of_once(folder, weights, tmp_path, capsys):
    """Those of 30×24 where the side of the store's is more than twice as long; not by --add, which cannot choose."""
    told = "warning: images are 30×24 and are enlarged to --image-size 64; --image-size 32 would be cheaper\n"
    for size in (64, 60):
        run(folder, tmp_path / f"{size}", size=size)
        assert capsys.readouterr().out.count(told) == (size == 64)
    run(folder, tmp_path / "64", "--add", TINY, "--encoder-weights", weights, codec=None)
    assert "warning" not in capsys.readouterr().out


def test_the_holdout_is_the_rest_and_does_not_depend_on_other_images(folder, tmp_path):
    run(folder, tmp_path / "s", "--holdout", 0.3)
    run(folder, tmp_path / "all")
    train, held = LatentDataset(tmp_path / "s"), LatentDataset(tmp_path / "s-holdout")
    names = [(data.path / "files.txt").read_text().split() for data in (train, held)]
    assert sorted(names[0] + names[1]) == open_source(folder).names
    assert all(name_fraction(name) >= 0.3 for name in names[0])
    assert all(name_fraction(name) < 0.3 for name in names[1])
    whole = dict(zip(open_source(folder).names, np.load(tmp_path / "all/latents.npy"), strict=True))
    for data, part in zip((train, held), names, strict=True):
        assert all(np.array_equal(whole[name], row) for name, row in zip(part, data.latents, strict=True))
        assert data.labels.tolist() == ["abc".index(name[0]) for name in part]
    assert train.meta["holdout"] == {"fraction": 0.3, "part": "training"}
    assert held.meta["holdout"] == {"fraction": 0.3, "part": "holdout"}
    assert train.meta["fingerprint"] != held.meta["fingerprint"] != LatentDataset(tmp_path / "all").meta["fingerprint"]
    run(folder, tmp_path / "large", size=2 * SIZE)
    assert LatentDataset(tmp_path / "large").meta["fingerprint"] != LatentDataset(tmp_path / "all").meta["fingerprint"]
    fractions = [name_fraction(f"{i:08d}") for i in range(4000)]
    assert abs(np.mean(np.array(fractions) < 0.05) - 0.05) < 4 * (0.05 * 0.95 / 4000) ** 0.5


def test_latents_features_and_patches_of_a_view_show_the_same_pixels(encoded, weights):
    data, encoder = LatentDataset(encoded, TINY, patches=TINY), load_encoder(TINY, weights)
    batch = data.fetch(np.arange(len(data)), np.arange(len(data)) % 2)
    features, patches = encoder(batch["moments"], return_patches=True)
    assert torch.allclose(batch["feature"].float(), features, atol=2e-3)
    assert torch.allclose(batch["patches"].float(), patches, atol=4e-3)
    other = encoder(batch["moments"].flip(-1))
    assert (batch["feature"].float() - other).abs().max() > 0.05  # the encoder does tell the views apart
    assert data.meta["encoders"][TINY] == encoder.meta()
    assert data.meta["patches"][TINY] == list(patches.shape[1:])


def test_an_encoder_added_later_equals_one_given_at_once(folder, encoded, weights, tmp_path):
    run(folder, tmp_path / "later", "--views", 2, "--holdout", 0.3)
    latents = tmp_path / "later/latents.npy"
    written = latents.stat().st_mtime_ns
    adding = ("--add", TINY, "--encoder-weights", weights)
    (tmp_path / "later/progress").mkdir()  # what a run leaves that is killed while it cleans up
    store.Progress(np.ones(COUNT, bool), {0: "stale"}).save(tmp_path / "later/progress/rows-7.json")
    run(folder, tmp_path / "later", *adding, codec=None)
    assert f"features/{TINY}.npy" in layout(LatentDataset(tmp_path / "later", TINY).meta)
    run(folder, tmp_path / "later", *adding, "--patches", codec=None)
    run(folder, tmp_path / "later", *adding, "--patches", codec=None)  # nothing is left to do
    assert latents.stat().st_mtime_ns == written
    for part in ("", "-holdout"):
        assert content(tmp_path / f"later{part}") == content(encoded.with_name(f"encoded{part}"))
    run(folder, tmp_path / "later", "--views", 2, "--holdout", 0.3)  # the original command still finds its store
    runs = LatentDataset(tmp_path / "later").meta["runs"]
    assert [made["files"] for made in runs] == [["latents.npy"], [f"features/{TINY}.npy"], [f"patches/{TINY}.npy"]]
    assert all(made["process_seconds"] > 0 and made["code"] and made["processes"] == 1 for made in runs)
    assert runs[1]["command"][1:4] == [str(folder), "--out", str(tmp_path / "later")]


@pytest.mark.parametrize("key", ["source_hash", "holdout", "precision", "upright", "encoders"])
def test_a_damaged_meta_file_is_named(folder, weights, tmp_path, key):
    """Also by the original command, of what it reads there before it compares."""
    run(folder, tmp_path / "s")
    meta = json.loads((tmp_path / "s" / "meta.json").read_text())
    (tmp_path / "s" / "meta.json").write_text(json.dumps({**meta, key: None}))
    with pytest.raises(ValueError, match=rf"meta\.json: {key} is None"):
        run(folder, tmp_path / "s", "--add", TINY, "--encoder-weights", weights, codec=None)
    with pytest.raises(ValueError, match=rf"{key}.* (is|was) None"):
        run(folder, tmp_path / "s")


def test_a_vae_store_holds_mean_and_std(folder, tmp_path):
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
    vae = AutoencoderKL(1, 1, **blocks, block_out_channels=(8, 8), latent_channels=4, norm_num_groups=4)
    vae.save_pretrained(tmp_path / "vae")
    run(folder, tmp_path / "s", codec=str(tmp_path / "vae"))
    data, source = LatentDataset(tmp_path / "s"), open_source(folder)
    grey = np.stack([square(source.image(i), SIZE, 1, False) for i in range(4)])  # the VAE takes one channel
    expected = load_codec(str(tmp_path / "vae")).encode(torch.from_numpy(grey))
    assert data.latents.shape == (COUNT, 1, 8, 8, 8)
    assert torch.equal(data.fetch(np.arange(4), np.zeros(4, int))["moments"], expected)


def test_published_names_need_only_the_weights_folder(folder, tmp_path, monkeypatch):
    """Files as fetch.sh leaves them, in their real formats and of reduced width, on a machine without a network."""
    from diffusers import AutoencoderKL

    monkeypatch.setenv("GMEM_WEIGHTS", str(tmp_path / "weights"))
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("asked the network"))
    torch.manual_seed(0)
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4}
    vae = AutoencoderKL(**blocks, block_out_channels=(8, 8, 8, 8), latent_channels=4, norm_num_groups=4)
    vae.save_pretrained(tmp_path / "weights/sd-vae-ft-mse")
    small = {"depth": 1, "embed_dim": 48, "num_heads": 2}
    create = timm.create_model
    network = create("vit_base_patch14_dinov2.lvd142m", **small)
    save_file(network.state_dict(), tmp_path / "weights/vit_base_patch14_dinov2.lvd142m.safetensors")
    monkeypatch.setattr("models.encoder.timm.create_model", lambda name, **options: create(name, **options, **small))
    run(folder, tmp_path / "s", "--encoder", "dinov2-vitb14", codec="sd-vae-ft-mse", size=32)
    data = LatentDataset(tmp_path / "s", "dinov2-vitb14")
    assert data.latents.shape == (COUNT, 1, 8, 4, 4)
    assert data.features.shape == (COUNT, 1, 48)
    assert (data.codec["name"], data.codec["scale"]) == ("sd-vae-ft-mse", 0.18215)
    shutil.rmtree(tmp_path / "weights")
    with pytest.raises(
        ValueError, match=rf"sd-vae-ft-mse'.* neither lie at {tmp_path}/weights/sd-vae-ft-mse.*fetch\.sh"
    ):
        run(folder, tmp_path / "t", "--encoder", "dinov2-vitb14", codec="sd-vae-ft-mse", size=32)
    with pytest.raises(ValueError, match=rf"neither lie at {tmp_path}/weights/vit_base_patch14_dinov2.*fetch\.sh"):
        run(folder, tmp_path / "t", "--encoder", "dinov2-vitb14")
    assert not (tmp_path / "t").exists()


def test_photos_may_be_turned_upright(tmp_path, capsys):
    exif = Image.Exif()
    exif[0x0112] = 6
    pixels = np.random.default_rng(0).integers(256, size=(SIZE, SIZE, 3), dtype=np.uint8)
    (tmp_path / "photos").mkdir()
    Image.fromarray(pixels).save(tmp_path / "photos/a.png", exif=exif)
    run(tmp_path / "photos", tmp_path / "as-stored")
    assert "EXIF turns 32 of 32 images looked at" in capsys.readouterr().out
    run(tmp_path / "photos", tmp_path / "upright", "--upright")
    assert "EXIF" not in capsys.readouterr().out
    for name, expected in (("as-stored", pixels), ("upright", np.rot90(pixels, -1))):
        data = LatentDataset(tmp_path / name)
        assert np.array_equal(data.latents[0, 0], expected.transpose(2, 0, 1))
        assert data.meta["upright"] == (name == "upright")
    with pytest.raises(ValueError, match="upright was True, now False"):
        run(tmp_path / "photos", tmp_path / "upright")


def test_precision_is_kept_for_all_of_a_store(folder, weights, encoded, tmp_path, monkeypatch):
    flags = ("--views", 2, "--holdout", 0.3, "--encoder", TINY, "--encoder-weights", weights)
    run(folder, tmp_path / "s", *flags, "--precision", "bf16")
    exact, coarse = (np.load(path / f"features/{TINY}.npy").astype(np.float64) for path in (encoded, tmp_path / "s"))
    error = np.linalg.norm(exact - coarse) / np.linalg.norm(exact)
    assert 1e-4 < error < 0.03
    assert (LatentDataset(tmp_path / "s").meta["precision"], LatentDataset(encoded).meta["precision"]) == (
        "bf16",
        "fp32",
    )
    with pytest.raises(ValueError, match="precision was bf16, now fp32"):
        run(folder, tmp_path / "s", *flags)
    loaded = []
    load = encode_dataset.load_encoder
    monkeypatch.setattr(
        encode_dataset, "load_encoder", lambda *_, **options: (loaded.append(options), load(*_, **options))[1]
    )
    run(folder, tmp_path / "s", "--add", "test_vit@48", "--encoder-weights", weights, codec=None)
    assert loaded[0]["dtype"] == torch.bfloat16


def test_networks_are_compiled_where_it_pays_or_on_request(monkeypatch):
    calls = []
    network = SimpleNamespace(compile_encoder=lambda: calls.append("codec"), compile=lambda: calls.append("encoder"))
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    for compiled, images, device, expected in (
        (None, 10**6, cpu, 0),
        (True, 1, cpu, 2),
        (None, 10**6, cuda, 2),
        (None, 100, cuda, 0),
        (False, 10**6, cuda, 0),
    ):
        calls.clear()
        encode_dataset.speed_up(network, network, compiled, images, device)
        assert len(calls) == expected
    assert not torch.backends.cudnn.allow_tf32
    encode_dataset.speed_up(None, network, True, 1, cpu)
    assert calls == ["encoder"]


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_gpu_writes_the_cpus_store_up_to_rounding(folder, weights, tmp_path, precision, monkeypatch):
    """30 images in blocks of 8, the last of them filled up; compiled in bf16."""
    from accelerate.state import AcceleratorState
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
    vae = AutoencoderKL(3, 3, **blocks, block_out_channels=(32, 32), latent_channels=4, norm_num_groups=4)
    vae.save_pretrained(tmp_path / "vae")
    flags = ["--views", 2, "--encoder", TINY, "--encoder-weights", weights, "--patches", "--keep-images"]
    flags += ["--batch-size", 8, "--workers", 2, "--precision", precision]
    for name, more in (("gpu", ["--compile"] if precision == "bf16" else []), ("cpu", [])):
        AcceleratorState._reset_state(reset_partial_state=True)
        if name == "cpu":
            monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        run(folder, tmp_path / name, *flags, *more, codec=tmp_path / "vae")
    AcceleratorState._reset_state(reset_partial_state=True)
    tolerance = {"fp32": 2e-3, "bf16": 3e-2}[precision]
    for file, (shape, dtype) in layout(LatentDataset(tmp_path / "cpu").meta).items():
        one, two = (np.load(tmp_path / name / file).astype(np.float64) for name in ("cpu", "gpu"))
        assert one.shape == shape
        assert np.linalg.norm(one - two) <= tolerance * np.linalg.norm(one) * (dtype == np.float16), file
    assert LatentDataset(tmp_path / "gpu").meta["fingerprint"] == LatentDataset(tmp_path / "cpu").meta["fingerprint"]


def die_after(monkeypatch, blocks):
    """Run nothing more after so many blocks: the process ends as if killed."""
    write, left = store.Writer.write, [blocks]

    def dying(self, begin, arrays):
        if left[0] == 0:
            os._exit(9)
        left[0] -= 1
        write(self, begin, arrays)

    monkeypatch.setattr(store.Writer, "write", dying)


def killed(monkeypatch, blocks, *arguments, **options):
    """Run the command in a forked child that is killed after so many blocks."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # a fork of a process with threads
        child = os.fork()
    if child == 0:
        try:
            torch.set_num_threads(1)
            monkeypatch.setattr(encode_dataset, "SAVE_SECONDS", 0)
            die_after(monkeypatch, blocks)
            run(*arguments, **options)
        finally:
            traceback.print_exc()
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9


def test_a_killed_run_continues_to_the_same_store(folder, tmp_path, monkeypatch, capsys):
    flags = ("--views", 2, "--holdout", 0.3, "--keep-images")
    run(folder, tmp_path / "whole", *flags)
    killed(monkeypatch, 3, folder, tmp_path / "s", *flags)
    with pytest.raises(ValueError, match="incomplete: run the same encode command again"):
        LatentDataset(tmp_path / "s")
    killed(monkeypatch, 4, folder, tmp_path / "s", *flags, "--batch-size", 3)  # now in the held-out part
    capsys.readouterr()
    written = []
    write = store.Writer.write
    monkeypatch.setattr(
        store.Writer, "write", lambda self, begin, arrays: (written.append(begin), write(self, begin, arrays))
    )
    run(folder, tmp_path / "s", *flags)
    assert "continuing" in capsys.readouterr().out
    assert len(written) < COUNT // 4
    for part in ("", "-holdout"):
        assert content(tmp_path / f"s{part}") == content(tmp_path / f"whole{part}")
    written.clear()
    run(folder, tmp_path / "s", *flags)
    assert "nothing to do" in capsys.readouterr().out
    assert not written


@pytest.mark.parametrize("ends", ["noting", "killed", "full"])
def test_a_run_that_ends_while_it_reserves_its_files_is_repeated(folder, encoded, weights, tmp_path, monkeypatch, ends):
    """In the first note or at the second of three files: killed, which leaves what there is; or on a full disk, which
    leaves nothing."""
    flags = ("--views", 2, "--holdout", 0.3, "--encoder", TINY, "--encoder-weights", weights, "--patches")
    reserve, reserved = store.reserve_array, []

    def second(path, *what):
        reserved.append(path.name)
        if len(reserved) == 2 and ends == "killed":
            os._exit(9)
        if len(reserved) == 2:
            raise ValueError("cannot reserve")
        reserve(path, *what)

    def note(path, value):
        with store.atomic(path) as part:
            part.write_text("half a no")
            os._exit(9)

    with monkeypatch.context() as patch:
        patch.setattr(store, "reserve_array", second)
        if ends == "noting":
            patch.setattr(store, "write_json", note)
        if ends == "full":
            with pytest.raises(ValueError, match="cannot reserve"):
                run(folder, tmp_path / "s", *flags)
            assert not [path for path in (tmp_path / "s").rglob("*") if path.is_file()]
        else:
            killed(monkeypatch, 0, folder, tmp_path / "s", *flags)
            assert (tmp_path / "s" / "latents.npy").exists() == (ends == "killed")
    run(folder, tmp_path / "s", *flags)
    for part in ("", "-holdout"):
        assert content(tmp_path / f"s{part}") == content(encoded.with_name(f"encoded{part}"))


def test_two_processes_continue_to_the_store_of_one(folder, encoded, weights, tmp_path, monkeypatch, environment, root):
    flags = ("--views", 2, "--holdout", 0.3, "--encoder", TINY, "--encoder-weights", weights, "--patches")
    write = store.Writer.write

    def stopped(self, begin, arrays):
        if begin == 8:
            raise KeyboardInterrupt
        write(self, begin, arrays)

    with monkeypatch.context() as patch:
        patch.setattr(encode_dataset, "SAVE_SECONDS", 0)
        patch.setattr(store.Writer, "write", stopped)
        with pytest.raises(KeyboardInterrupt):
            run(folder, tmp_path / "two", *flags)
    command = ["torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "scripts.encode_dataset", folder]
    command += ["--out", tmp_path / "two", "--codec", "pixels", "--image-size", SIZE, "--batch-size", 4, "--workers", 1]
    command = ["python", "-m", *map(str, command + list(flags))]
    output = subprocess.run(command, cwd=root, env=environment, check=True, capture_output=True, timeout=200).stdout
    assert b"continuing, 8 of 22 images are written" in output
    for part in ("", "-holdout"):
        one, two = encoded.with_name(f"encoded{part}"), tmp_path / f"two{part}"
        networks = (f"features/{TINY}.npy", f"patches/{TINY}.npy")
        for file in networks:  # equal but for the rounding of another number of threads
            assert np.allclose(np.load(one / file), np.load(two / file), atol=5e-3)
        assert content(one, networks) == content(two, networks)


@pytest.fixture
def damaged(folder, tmp_path):
    """A copy of the folder with three broken images, the last row among them."""
    path = shutil.copytree(folder, tmp_path / "damaged")
    whole = (path / "a/03.png").read_bytes()
    (path / "a/03.png").write_bytes(whole[: len(whole) // 2])
    (path / "b/15.png").write_bytes(b"")
    (path / "c/29.png").write_text("<html>not found</html>")
    return path


def test_broken_images_are_named_and_left_out_on_request(damaged, tmp_path, monkeypatch, capsys):
    message = r"3 of 30 images of .* cannot be read: a/03\.png \(.*b/15\.png \(.*c/29\.png .*add --skip-broken"
    with pytest.raises(ValueError, match=message):
        run(damaged, tmp_path / "s", "--keep-images")
    said = capsys.readouterr().out
    assert "cannot read a/03.png" in said
    assert "cannot read c/29.png (UnidentifiedImageError: cannot identify image file" in said
    with pytest.raises(ValueError, match="incomplete"):
        LatentDataset(tmp_path / "s")
    with monkeypatch.context() as patch:
        patch.setattr(store.Writer, "write", lambda *_: pytest.fail("encoded again"))
        run(damaged, tmp_path / "s", "--keep-images", "--skip-broken")
    data, source = LatentDataset(tmp_path / "s", images=True), open_source(damaged)
    names = (tmp_path / "s/files.txt").read_text().split()
    assert len(data) == len(names) == 27
    assert data.meta["skipped"] == 3
    assert set(names) == set(source.names) - {"a/03.png", "b/15.png", "c/29.png"}
    for name, image, latent, label in zip(names, data.images, data.latents, data.labels, strict=True):
        expected = square(source.image(source.names.index(name)), SIZE, 3, False)
        assert np.array_equal(image, expected)
        assert np.array_equal(latent[0], expected)
        assert label == "abc".index(name[0])
    assert (tmp_path / "s/latents.npy").stat().st_size == 128 + 27 * 3 * SIZE**2

    run(damaged, tmp_path / "direct", "--keep-images", "--skip-broken", "--batch-size", 7)
    assert content(tmp_path / "direct") == content(tmp_path / "s")


def test_leaving_out_can_be_interrupted_and_repeated(damaged, tmp_path, monkeypatch):
    run(damaged, tmp_path / "whole", "--keep-images", "--skip-broken")
    shorten, done = store.shorten, []

    def once(path, order):
        if done:
            raise KeyboardInterrupt
        done.append(shorten(path, order))

    with monkeypatch.context() as patch:
        patch.setattr(store, "shorten", once)
        with pytest.raises(KeyboardInterrupt):
            run(damaged, tmp_path / "s", "--keep-images", "--skip-broken")
    run(damaged, tmp_path / "s", "--keep-images", "--skip-broken")
    assert content(tmp_path / "s") == content(tmp_path / "whole")


@settings(max_examples=100, deadline=None)
@given(st.lists(st.booleans(), max_size=60), st.integers(1, 12))
def test_blocks_cover_what_is_not_done_within_fixed_batches(done, batch_size):
    done = np.array(done, bool)
    blocks = blocks_to_do(done, batch_size)
    rows = [row for begin, end in blocks for row in range(begin, end)]
    assert rows == np.flatnonzero(~done).tolist()
    assert all(begin // batch_size == (end - 1) // batch_size for begin, end in blocks)
    assert len(blocks_to_do(np.zeros_like(done), batch_size)) == -(-len(done) // batch_size)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.lists(st.booleans(), min_size=20, max_size=20), min_size=1, max_size=4))
def test_progress_of_all_processes_is_united(tmp_path_factory, parts):
    folder = tmp_path_factory.mktemp("progress")
    for rank, done in enumerate(parts):
        store.Progress(np.array(done), {rank: "torn"}, seconds=2.5).save(folder / f"rows-{rank}.json")
    (folder / ".rows-7.123.tmp.json").write_text("half")  # what a killed process may leave
    for _ in range(2):
        merged = store.Progress.merged(folder, 20)
        assert np.array_equal(merged.done, np.any(parts, axis=0))
        assert merged.broken == {rank: "torn" for rank in range(len(parts))}
        assert merged.seconds == 2.5 * len(parts)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--image-size", 8), "image_size was 16, now 8"),
        (("--views", 2), "num_views was 1, now 2"),
        (("--keep-images",), "has_images was False, now True"),
        (("--holdout", 0.5), "holdout.fraction was 0.0, now 0.5"),
    ],
)
def test_another_command_on_the_same_store_is_refused(folder, tmp_path, monkeypatch, flags, message):
    killed(monkeypatch, 1, folder, tmp_path / "unfinished")
    run(folder, tmp_path / "finished")
    for name in ("unfinished", "finished"):
        with pytest.raises(ValueError, match=f"{name} was begun by a different command: .*{message}"):
            run(folder, tmp_path / name, *flags)


def test_another_source_encoder_or_folder_is_refused(folder, weights, tmp_path):
    run(folder, tmp_path / "s")
    with pytest.raises(ValueError, match="source_hash was"):
        run(folder / "a", tmp_path / "s")
    with pytest.raises(ValueError, match=r"encoders.*--add to add an encoder"):
        run(folder, tmp_path / "s", "--encoder", TINY, "--encoder-weights", weights)
    with pytest.raises(ValueError, match="made from other images"):
        run(folder / "a", tmp_path / "s", "--add", TINY, "--encoder-weights", weights, codec=None)
    run(folder, tmp_path / "s", "--add", TINY, "--encoder-weights", weights, codec=None)
    torch.manual_seed(1)
    torch.save(timm.create_model("test_vit").state_dict(), tmp_path / "other.pth")
    with pytest.raises(ValueError, match="has features of another 'test_vit@32'"):
        run(folder, tmp_path / "s", "--add", TINY, "--encoder-weights", tmp_path / "other.pth", codec=None)
    with pytest.raises(ValueError, match="no store at"):
        run(folder, tmp_path / "absent", "--add", TINY, "--encoder-weights", weights, codec=None)
    with pytest.raises(ValueError, match="neither empty nor a store"):
        run(folder, folder)


def test_values_that_are_not_finite_name_the_image(folder, weights, tmp_path):
    state = torch.load(weights, weights_only=True)
    torch.save(state | {"norm.bias": torch.full_like(state["norm.bias"], 1e5)}, tmp_path / "large.pth")
    names = ", ".join([name for name in open_source(folder).names if name_fraction(name) >= 0.5][:4])
    with pytest.raises(
        ValueError, match=rf"features/{TINY}\.npy: NaN, infinity or a value beyond float16 for {names}\. "
    ):
        run(folder, tmp_path / "s", "--holdout", 0.5, "--encoder", TINY, "--encoder-weights", tmp_path / "large.pth")
    values = torch.zeros(20, 2, 3)
    values[4, 1, 2], values[7, 0, 0] = torch.nan, -torch.inf
    with pytest.raises(ValueError, match=r"for 4, 7\. Look"):
        check_finite({"latents.npy": finite(values)}, [str(i) for i in range(20)])
    with pytest.raises(ValueError, match="9 and 10 more"):
        check_finite({"latents.npy": finite(values + torch.nan)}, [str(i) for i in range(20)])


def test_the_disk_is_checked_and_reserved_before_anything_is_written(folder, tmp_path, monkeypatch, capsys):
    usage = namedtuple("usage", "free")
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: usage(1000))
        with pytest.raises(ValueError, match=r"0\.000 GB free: make room"):
            run(folder, tmp_path / "s", "--keep-images")
    assert "disk needed: 0.000 GB" in capsys.readouterr().out
    assert not (tmp_path / "s").exists()

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", full)
        with pytest.raises(ValueError, match=r"cannot reserve .* for .*latents.npy: No space left on device"):
            run(folder, tmp_path / "s")
    assert [path for path in (tmp_path / "s").rglob("*") if path.is_file()] == []
    run(folder, tmp_path / "s")


def test_reserved_files_have_their_blocks(tmp_path):
    store.reserve_array(tmp_path / "x.npy", (1000, 3), np.dtype("float32"))
    assert np.array_equal(np.load(tmp_path / "x.npy"), np.zeros((1000, 3), np.float32))
    assert (tmp_path / "x.npy").stat().st_blocks * 512 >= 12000


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--codec", "pixels", "--add", TINY), "not allowed with argument"),
        ((), "one of the arguments --codec --add is required"),
        (("--add", TINY, "--views", "2", "--holdout", "0.1"), "leave out --views, --holdout"),
        (("--add", TINY, "--upright", "--precision", "fp32"), "leave out --upright, --precision"),
        (("--codec", "pixels", "--patches"), "need --encoder"),
        (("--codec", "pixels", "--batch-size", "0"), "must be at least 1"),
        (("--codec", "pixels", "--holdout", "1"), "--holdout 1: expected a fraction of at least 0 and"),
        (("--codec", "pixels", "--holdout", "-0.1"), "-0.1: expected a fraction of at least 0 and below 1, as 0.05"),
    ],
)
def test_bad_flags_are_refused(folder, tmp_path, capsys, flags, message):
    with pytest.raises(SystemExit):
        main([str(folder), "--out", str(tmp_path / "s"), *flags])
    assert message in capsys.readouterr().err


def test_impossible_requests_are_refused(folder, tmp_path):
    with pytest.raises(ValueError, match="codec 'unknown' is none of"):
        run(folder, tmp_path / "s", codec="unknown")
    with pytest.raises(ValueError, match="leaves no holdout image"):
        run(folder, tmp_path / "s", "--holdout", 1e-6)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no images"):
        run(tmp_path / "empty", tmp_path / "s")
    assert not (tmp_path / "s").exists()
