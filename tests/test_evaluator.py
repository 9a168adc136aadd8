"""The evaluation from files to printed lines: reading, Inception, references, and everything that can be wrong."""

import gzip
import io
import json
import os
import pickle
import re
import struct
import subprocess
import zipfile
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from test_copies import run_two

from benchmarks import bench_evaluate
from evaluations import evaluator, features, inception, reference, samples
from evaluations.images import ChosenImages, open_images
from evaluations.inception import WEIGHTS, Inception, find_weights
from evaluations.metrics import frechet_distance, precision_recall
from scripts.fetch import FILES

ENCODER = "test_vit"


def pictures(count, size=32, seed=0):
    """uint8 (N, H, W, 3): smooth random gradients, which any network tells apart."""
    rng = np.random.default_rng(seed)
    corners = rng.integers(0, 256, (count, 2, 2, 3))
    t = np.linspace(0, 1, size)
    rows = corners[:, 0, None] * (1 - t)[:, None, None] + corners[:, 1, None] * t[:, None, None]  # (N, size, 2, 3)
    return (rows[:, :, :1] * (1 - t)[:, None] + rows[:, :, 1:] * t[:, None]).astype(np.uint8)


def save_npz(path, images, **arrays):
    np.savez(path, arr_0=images, **arrays)
    return path


def save_folder(path, images):
    path.mkdir()
    for i, image in enumerate(images):
        Image.fromarray(image).save(path / f"{i:06d}.png")
    return path


def all_images(path, **options):
    images = open_images(path)
    return (
        torch.cat(list(images.batches(range(len(images)), **({"batch_size": 4} | options)))).permute(0, 2, 3, 1).numpy()
    )


@pytest.fixture(scope="session")
def inception_weights(tmp_path_factory):
    """Random weights in the layout of the published file, scaled so that activations neither vanish nor explode."""
    path = tmp_path_factory.mktemp("weights") / WEIGHTS
    bench_evaluate.make_weights(path)
    return path


@pytest.fixture(scope="session")
def network(inception_weights):
    return Inception(inception_weights)


@pytest.fixture(scope="session")
def encoder_weights(tmp_path_factory):
    """Random weights of a tiny transformer with 64 features."""
    path = tmp_path_factory.mktemp("weights") / "encoder.pth"
    torch.manual_seed(0)
    model = timm.create_model(ENCODER)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    torch.save(model.state_dict(), path)
    return path


@pytest.fixture
def evaluate(encoder_weights, capsys):
    """Run the command with the tiny encoder; returns printed lines by name and the JSON."""

    def run(ref, *arguments):
        out = ref.parent / "result.json"
        command = [str(ref), *map(str, arguments), "--encoder", ENCODER, "--encoder-weights", str(encoder_weights)]
        evaluator.main([*command, "--out", str(out)])
        lines = dict(line.split(": ", 1) for line in capsys.readouterr().out.splitlines() if ": " in line)
        return lines, json.loads(out.read_text())

    return run


# Inception


def test_images_are_resized_as_tensorflow_1_did(network):
    """Output pixel i reads position i · 2 / 299 of two pixels, without half-pixel centres, and holds the last one."""
    seen = []
    hook = network.network.Conv2d_1a_3x3.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    image = torch.tensor([[[10, 50], [90, 250]]], dtype=torch.uint8).expand(1, 3, 2, 2)
    network(image)
    hook.remove()
    resized = seen[0][0, 0] * 128 + 128  # (299, 299)
    position = 2 * 149 / 299  # between the two pixels, where half-pixel centres would read 0.4967
    assert resized.shape == (299, 299)
    assert resized[0, 0] == 10
    assert resized[0, 149].item() == pytest.approx(10 + 40 * position, abs=1e-4)
    assert resized[149, 0].item() == pytest.approx(10 + 80 * position, abs=1e-4)
    assert resized[149, 75].item() == pytest.approx(
        (1 - position) * (10 + 40 * 150 / 299) + position * (90 + 160 * 150 / 299), abs=1e-4
    )
    assert (resized[150:, 150:] == 250).all()  # no antialias, and nothing beyond the last pixel


def test_downsizing_reads_single_pixels_without_antialias(network):
    seen = []
    hook = network.network.Conv2d_1a_3x3.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    image = torch.zeros(1, 3, 598, 598, dtype=torch.uint8)
    image[..., 1::2] = 255  # every other column, which any filter would average to grey
    network(image)
    hook.remove()
    assert (seen[0] == -1).all()


def test_the_three_outputs_are_what_adm_reads(network):
    """Spatial: 7 channels of Mixed_6d's 1×1 branch after its ReLU, channel fastest. Probabilities: without the bias."""
    seen = []
    branch = network.network.Mixed_6d.branch1x1
    hook = branch.conv.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    output = network(torch.from_numpy(pictures(2)).permute(0, 3, 1, 2))
    hook.remove()
    expected = torch.relu(branch.bn(branch.conv(seen[0])))  # (2, 192, 17, 17)
    assert output.spatial.shape == (2, 2023)
    assert (expected[:, :7] == 0).any()
    assert (expected[:, :7] > 0).any()
    maps = output.spatial.view(2, 17, 17, 7)
    torch.testing.assert_close(maps, expected[:, :7].permute(0, 2, 3, 1))
    assert maps[1, 3, 5, 6] == expected[1, 6, 3, 5]
    logits = output.pool @ network.network.fc.weight.T
    torch.testing.assert_close(output.probs, logits.softmax(1), rtol=1e-3, atol=1e-6)
    assert not torch.allclose(output.probs, (logits + network.network.fc.bias).softmax(1), rtol=0.1)
    assert output.pool.std() > 0.01


@pytest.mark.gpu
def test_the_gpu_gives_the_features_of_the_cpu(inception_weights, network, monkeypatch):
    """In its own memory layout, at another batch size, as the evaluator uses it, and after a training that allows TF32:
    an image's features as a whole, since single ones may be sums that nearly cancel."""
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", True)
    images = torch.from_numpy(pictures(6, size=64)).permute(0, 3, 1, 2)
    here, there = network(images), Inception(inception_weights, "cuda")
    for part in (slice(0, 6), slice(2, 5)):
        for one, two in zip(here, there(images[part].cuda()), strict=True):
            error = (two.cpu() - one[part]).norm(dim=1) / one[part].norm(dim=1)
            assert error.amax() <= 5e-5, error


def test_weights_are_found_by_flag_then_variable_then_cache(inception_weights, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.delenv(inception.VARIABLE, raising=False)
    with pytest.raises(
        ValueError, match=rf"{re.escape(WEIGHTS)} are missing.*--inception.*{inception.VARIABLE}.*{tmp_path}.*https"
    ):
        find_weights()
    cached = tmp_path / "checkpoints" / WEIGHTS
    cached.parent.mkdir()
    cached.touch()
    assert find_weights() == cached
    monkeypatch.setenv(inception.VARIABLE, str(inception_weights))
    assert find_weights() == inception_weights
    assert find_weights(cached) == cached
    with pytest.raises(ValueError, match=r"--inception nowhere\.pth: no such file"):
        find_weights("nowhere.pth")


class Payload:
    """Creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.mark.parametrize("kind", ["code", "truncated", "other network", "no weights"])
def test_wrong_weights_are_refused_and_never_run(kind, inception_weights, tmp_path):
    path = tmp_path / "weights.pth"
    if kind == "code":
        torch.save({"fc.weight": Payload(tmp_path / "ran")}, path)
    elif kind == "truncated":
        path.write_bytes(inception_weights.read_bytes()[:100_000])
    elif kind == "other network":
        torch.save({"fc.weight": torch.zeros(1000, 2048)}, path)
    else:
        torch.save([1, 2], path)
    with pytest.raises(ValueError, match=r"weights\.pth: not .*github\.com"):
        Inception(path)
    assert not (tmp_path / "ran").exists()


def test_weights_that_lack_layers_are_refused(tmp_path):
    names = {"fc.weight": (1008, 2048), "Mixed_6d.branch1x1.conv.weight": (192, 768, 1, 1)}
    torch.save({name: torch.zeros(1).expand(shape) for name, shape in names.items()}, tmp_path / "weights.pth")
    with pytest.raises(ValueError, match=r"weights\.pth: .*Missing key.*Conv2d_1a_3x3"):
        Inception(tmp_path / "weights.pth")


def test_adms_lines_from_adms_files(inception_weights, network, tmp_path, capsys):
    """REF as images once; then the saved reference in ADM's layout gives the same five numbers."""
    reals, fakes = pictures(6), pictures(5, seed=1)
    folder, samples = save_folder(tmp_path / "real", reals), save_npz(tmp_path / "x.npz", fakes)
    saved, options = tmp_path / "saved.npz", ["--inception", str(inception_weights), "--batch-size", "4"]
    evaluator.main([str(folder), "--save-reference", str(saved), *options])
    evaluator.main([str(saved), str(samples), *options])
    output = capsys.readouterr().out
    printed = dict(re.findall(r"^([\w ]+): (-?\d[\d.e+-]*)", output, re.M))
    assert list(printed)[:5] == ["Inception Score", "FID", "sFID", "Precision", "Recall"]
    assert "(N=5; below 10,000 samples FID is biased upward)" in output
    assert "not the published file" in output

    real, fake = (network(torch.from_numpy(x).permute(0, 3, 1, 2)) for x in (reals, fakes))
    expected = {}
    for name, x, y in (("FID", real.pool, fake.pool), ("sFID", real.spatial, fake.spatial)):
        x, y = x.double().numpy(), y.double().numpy()
        roots = np.linalg.norm((x - x.mean(0)) @ (y - y.mean(0)).T, "nuc") / (5 * 4) ** 0.5
        traces = x.var(0, ddof=1).sum() + y.var(0, ddof=1).sum()
        expected[name] = ((x.mean(0) - y.mean(0)) ** 2).sum() + traces - 2 * roots
    expected["Precision"], expected["Recall"] = precision_recall(real.pool, fake.pool)
    probs = fake.probs.double()
    expected["Inception Score"] = (probs * (probs / probs.mean(0)).log()).sum(1).mean().exp().item()
    for name, value in expected.items():
        assert float(printed[name]) == pytest.approx(value, rel=1e-4), name
    assert expected["FID"] > 0.1
    assert expected["sFID"] > 0.1

    with np.load(saved) as archive:
        assert {name: archive[name].shape for name in archive} == reference.MOMENTS | {"arr_0": (6, 32, 32, 3)}
        np.testing.assert_array_equal(archive["arr_0"], reals)
        np.testing.assert_allclose(archive["sigma"], np.cov(real.pool.double(), rowvar=False), rtol=1e-3, atol=1e-6)
    result = json.loads((tmp_path / "x.inception.json").read_text())
    assert result["metrics"]["FID"] == pytest.approx(expected["FID"], rel=1e-4)
    assert result["num_samples"] == 5
    assert len(result["reference"]["sha256"]) == 64


# The command with another encoder


def test_metrics_of_an_encoder_are_named_after_it_and_are_no_fid(evaluate, encoder_weights, tmp_path):
    real, fake = save_npz(tmp_path / "ref.npz", pictures(40)), save_npz(tmp_path / "x.npz", pictures(30, seed=1))
    lines, result = evaluate(real, fake)
    names = [f"{metric}-{ENCODER}" for metric in ("FD", "Precision", "Recall", "KD")]
    assert list(result["metrics"]) == names
    assert set(names) <= set(lines)
    assert not {"FID", "sFID", "Inception Score"} & set(lines)

    encoder = features.EncoderNetwork(ENCODER, encoder_weights, torch.device("cpu"))
    x, y = (
        encoder(torch.from_numpy(z).permute(0, 3, 1, 2)).pool.double() for z in (pictures(40), pictures(30, seed=1))
    )
    expected = frechet_distance(x.mean(0), x.T.cov(), y.mean(0), y.T.cov())
    assert result["metrics"][f"FD-{ENCODER}"] == pytest.approx(expected, rel=1e-6)
    assert expected > 1e-3
    pair = (result["metrics"][f"Precision-{ENCODER}"], result["metrics"][f"Recall-{ENCODER}"])
    assert pair == precision_recall(x, y)


@pytest.mark.parametrize(
    ("model", "side", "name"),
    [
        ("vit_large_patch14_dinov2.lvd142m", 224, "DINOv2"),
        ("vit_base_patch14_dinov2.lvd142m", 224, "DINOv2-B"),
        ("vit_giant_patch14_reg4_dinov2.lvd142m", 518, "DINOv2-G-reg4@518"),
        ("vit_base_patch16_dinov3.lvd1689m", 256, "given"),
        ("resnet50", 224, "given"),
    ],
)
def test_fd_dinov2_is_the_one_of_papers_and_other_sizes_are_named(model, side, name):
    assert features.name_in_papers({"name": "given", "model": model, "input_size": side}) == name
    assert timm.is_model(model.split(".")[0])
    assert samples.family(name if name != "given" else model) == samples.family(model)


def test_copies_of_few_references_are_precise_and_recall_little(evaluate, tmp_path):
    real = pictures(60)
    lines, _ = evaluate(save_npz(tmp_path / "ref.npz", real), save_npz(tmp_path / "x.npz", real[[5] * 20 + [9] * 20]))
    assert float(lines[f"Precision-{ENCODER}"].split()[0]) == 1
    assert float(lines[f"Recall-{ENCODER}"].split()[0]) < 0.1


def test_every_kind_of_reference_gives_the_same_numbers(evaluate, tmp_path):
    real, fake = pictures(24), save_npz(tmp_path / "x.npz", pictures(20, seed=1))
    real[..., 1:] = real[..., :1]  # grey, so that an idx file can hold it
    kinds = [save_npz(tmp_path / "ref.npz", real), save_folder(tmp_path / "folder", real)]
    with gzip.open(tmp_path / "ref-images-idx3-ubyte.gz", "wb") as file:
        file.write(struct.pack(">4I", 0x0803, 24, 32, 32) + real[..., 0].tobytes())
    with zipfile.ZipFile(tmp_path / "ref.zip", "w") as archive:
        for file in sorted((tmp_path / "folder").iterdir()):
            archive.write(file, f"some/class/{file.name}")
        archive.writestr("dataset.json", "{}")
    store = tmp_path / "store"
    store.mkdir()
    np.save(store / "images.npy", real.transpose(0, 3, 1, 2))
    (store / "meta.json").write_text(json.dumps({"complete": True}))
    results = [
        evaluate(kind, fake)[1]["metrics"]
        for kind in (*kinds, tmp_path / "ref-images-idx3-ubyte.gz", tmp_path / "ref.zip", store)
    ]
    for result in results[1:]:
        assert result == pytest.approx(results[0], rel=1e-12)


def test_reference_features_are_kept_beside_it_and_follow_its_content(evaluate, tmp_path, monkeypatch):
    real, fake = save_npz(tmp_path / "ref.npz", pictures(24)), save_npz(tmp_path / "x.npz", pictures(20, seed=1))
    computed, summarize = [], features.summarize
    monkeypatch.setattr(reference, "summarize", lambda *args: computed.append(args[0].path) or summarize(*args))
    first, again = (evaluate(real, fake)[1], evaluate(real, fake)[1])
    kept = list(tmp_path.glob("ref.npz.*.npz"))
    assert first.pop("run")["seconds"] > 0
    assert again.pop("run")["command"][1:3] == [str(real), str(fake)]
    assert again == first
    assert computed == [real]
    assert len(kept) == 1

    save_npz(real, pictures(24, seed=2))
    assert evaluate(real, fake)[1]["reference"]["sha256"] != first["reference"]["sha256"]
    assert computed == [real, real]

    evaluate(real, fake, "--no-cache")
    assert computed == [real, real, real]
    assert len(list(tmp_path.glob("ref.npz.*.npz"))) == 2

    for file in tmp_path.glob("ref.npz.*.npz"):
        file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"ref\.npz\.test_vit.*npz: .*cut short"):
        evaluate(real, fake)


def test_places_that_cannot_be_written_do_not_stop_the_evaluation(
    evaluate, encoder_weights, tmp_path, monkeypatch, capsys
):
    real, fake = save_npz(tmp_path / "ref.npz", pictures(24)), save_npz(tmp_path / "x.npz", pictures(20, seed=1))

    def read_only(path, *args):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(reference, "atomic", read_only)
    monkeypatch.setattr(evaluator, "write_json", read_only)
    evaluator.main([str(real), str(fake), "--encoder", ENCODER, "--encoder-weights", str(encoder_weights)])
    output = capsys.readouterr().out
    assert output.count("not written: ") == 2
    assert f"FD-{ENCODER}: " in output
    with pytest.raises(PermissionError):  # but a file that was asked for must appear
        evaluate(real, fake)


def test_the_result_lies_beside_the_samples_under_their_whole_name(encoder_weights, tmp_path):
    """`guided-1.5` and `guided-1.8` must not be one file."""
    save_npz(tmp_path / "ref.npz", pictures(24))
    save_folder(tmp_path / "guided-1.5", pictures(5))
    network = ["--encoder", ENCODER, "--encoder-weights", str(encoder_weights), "--no-cache"]
    for name in ("guided-1.5", "ref.npz"):
        evaluator.main([str(tmp_path / "ref.npz"), str(tmp_path / name), *network])
    found = {path.name for path in tmp_path.glob("*.json")}
    assert found == {f"guided-1.5.{ENCODER}.json", f"ref.{ENCODER}.json"}


def test_more_seeds_give_mean_and_spread(evaluate, tmp_path):
    real = save_npz(tmp_path / "ref.npz", pictures(24))
    sets = [save_npz(tmp_path / f"{seed}.npz", pictures(20, seed=seed)) for seed in (1, 2, 3)]
    single = [evaluate(real, path)[1]["metrics"][f"FD-{ENCODER}"] for path in sets]
    lines, result = evaluate(real, sets[0], "--seeds", *sets[1:])
    assert result["metrics"][f"FD-{ENCODER}"] == pytest.approx(np.mean(single))
    assert result["spread"][f"FD-{ENCODER}"] == pytest.approx(np.std(single, ddof=1))
    assert float(lines[f"FD-{ENCODER}"].split()[0]) == pytest.approx(np.mean(single), rel=1e-5)
    assert "standard deviation of 3 seeds" in lines[f"FD-{ENCODER}"]
    for path in sets[:2]:
        path.with_suffix(".json").write_text(json.dumps({"num_images": 20, "settings": {"seed": 7}}))
    with pytest.raises(ValueError, match=r"--seeds.*\[7, 7\]"):
        evaluate(real, sets[0], "--seeds", *sets[1:])


def sampled(folder, images, **made):
    """A folder as sample_ddp.py leaves it: npz, PNG, preview, samples.json."""
    save_folder(folder, images)
    Image.new("RGB", (99, 99)).save(folder / "preview.png")
    save_npz(folder / "samples.npz", images)
    settings = made.pop("settings", {})
    (folder / "samples.json").write_text(json.dumps({"num_images": len(images), "settings": settings} | made))
    return folder


def test_a_distance_in_the_family_of_the_snippets_is_marked(evaluate, tmp_path, capsys):
    assert samples.family("dinov2-vitb14@448") == samples.family("vit_small_patch14_dinov2.lvd142m") == "dinov2"
    assert samples.family("efficientnet-lite0") == samples.family("tf_efficientnet_b0") != samples.family("resnet50")
    assert samples.family("other@32") == samples.family("other") == "other"
    assert samples.family(None) is None
    real, fake = save_npz(tmp_path / "ref.npz", pictures(24)), pictures(20, seed=1)
    lines, result = evaluate(real, sampled(tmp_path / "a", fake, settings={"encoder": ENCODER}))
    assert result["same_family_as_snippets"]
    assert "snippet encoder" in lines["warning"]
    lines, result = evaluate(real, sampled(tmp_path / "b", fake, settings={"encoder": "dinov2-vitb14"}))
    assert not result["same_family_as_snippets"]
    assert "warning" not in lines


def test_arguments_that_look_exchanged_are_warned_of(evaluate, tmp_path):
    """A generated reference of a store, by either of its paths; not a store that is scored against a store."""
    real, made = pictures(24), sampled(tmp_path / "made", pictures(20, seed=1))
    store = tmp_path / "store"
    store.mkdir()
    np.save(store / "images.npy", real.transpose(0, 3, 1, 2))
    (store / "meta.json").write_text('{"complete": true}')
    for generated in (made, made / "samples.npz"):
        told = f"the reference {generated} was generated by sample_ddp.py and the samples are a store"
        lines, result = evaluate(generated, store)
        assert lines["warning"] == f"{told}: the reference comes first"
        assert result["warnings"] == [lines["warning"]]
    for arguments in ((store, made), (store, store), (made, save_npz(tmp_path / "other.npz", real))):
        assert "warning" not in evaluate(*arguments)[0]


def test_the_number_of_samples_must_be_what_their_maker_says(evaluate, tmp_path):
    real, folder = save_npz(tmp_path / "ref.npz", pictures(24)), sampled(tmp_path / "x", pictures(20, seed=1))
    _, whole = evaluate(real, folder)
    (folder / "samples.npz").unlink()
    _, files = evaluate(real, folder)
    assert files["metrics"] == whole["metrics"]
    (folder / "000003.png").unlink()
    with pytest.raises(ValueError, match=r"holds 19 images; .*samples\.json: 20"):
        evaluate(real, folder)
    fewer = save_npz(tmp_path / "fewer.npz", pictures(20, seed=1)[:8])
    _, first = evaluate(real, save_npz(tmp_path / "y.npz", pictures(20, seed=1)), "--num-samples", "8")
    assert first["metrics"] == evaluate(real, fewer)[1]["metrics"]
    with pytest.raises(ValueError, match="holds 8 images, 9 asked for; expected 4 to 8"):
        evaluate(real, fewer, "--num-samples", "9")
    with pytest.raises(ValueError, match="holds 2 images, 2 asked for; expected at least 4"):
        evaluate(real, save_npz(tmp_path / "two.npz", pictures(2)))


def test_a_result_beside_the_samples_is_not_what_their_maker_says(evaluate, tmp_path):
    """Where `--out` gave it the name that a maker's record would have, and evaluation runs again."""
    real, fake = save_npz(tmp_path / "ref.npz", pictures(24)), save_npz(tmp_path / "x.npz", pictures(20, seed=1))
    _, first = evaluate(real, fake)
    (tmp_path / "x.json").write_text(json.dumps(first))
    assert evaluate(real, fake)[1]["samples"] == first["samples"]


def test_processes_agree_whether_the_reference_is_known(evaluate, encoder_weights, tmp_path, monkeypatch):
    """Another command may keep its features between one process's look and the next one's."""
    ref, images = save_npz(tmp_path / "ref.npz", pictures(12)), save_npz(tmp_path / "x.npz", pictures(8, seed=1))
    _, alone = evaluate(ref, images)
    load = reference.load_summary
    late = lambda *given: None if os.environ.get("RANK") == "1" else load(*given)  # noqa: E731
    monkeypatch.setattr(reference, "load_summary", late)
    words = ["--encoder", ENCODER, "--encoder-weights", encoder_weights, "--out", tmp_path / "two.json"]
    run_two(evaluator.main, [*map(str, (ref, images, *words))])
    two = json.loads((tmp_path / "two.json").read_text())
    assert two["metrics"] == pytest.approx(alone["metrics"], rel=1e-3)


def test_two_processes_give_the_numbers_of_one(evaluate, encoder_weights, environment, tmp_path, root):
    real, fake = save_npz(tmp_path / "ref.npz", pictures(25)), save_npz(tmp_path / "x.npz", pictures(21, seed=1))
    alone = evaluate(real, fake, "--no-cache")[1]["metrics"]
    options = ["--encoder", ENCODER, "--encoder-weights", encoder_weights, "--out", tmp_path / "two.json", "--no-cache"]
    launcher = ["python", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*launcher, "-m", "evaluations.evaluator", real, fake, "--batch-size=4", *options]
    subprocess.run(command, cwd=root, check=True, timeout=120, env=environment)
    assert json.loads((tmp_path / "two.json").read_text())["metrics"] == pytest.approx(alone, rel=1e-6)


def test_the_benchmark_times_the_real_command(tmp_path, monkeypatch, capsys):
    ran = []

    def run(command, check, env):
        assert env["CUDA_VISIBLE_DEVICES"] == ""
        ran.append(command[command.index("evaluations.evaluator") + 1 :])
        evaluator.main(ran[-1])

    monkeypatch.setattr(bench_evaluate, "subprocess", SimpleNamespace(run=run))
    bench_evaluate.main(["--cpu-images", "5", "--work", str(tmp_path / "w"), "--out", str(tmp_path / "out.json")])
    result = json.loads((tmp_path / "out.json").read_text())
    assert [row["images"] for row in result["rows"]] == [5, 5]
    assert len(ran) == 2
    assert ran[0] == ran[1], "the second finds what the first has kept"
    assert list((tmp_path / "w").glob("reference.npz.inception.*.npz"))
    assert result["metrics"][0] == result["metrics"][1]
    assert result["metrics"][0].keys() == {"Inception Score", "FID", "sFID", "Precision", "Recall", "KID"}
    assert all(row["host_memory_gb"] > 0.1 and row["seconds"] > 0 for row in result["rows"])
    alone = result["embedding"]
    assert alone["operations_an_image"] == pytest.approx(2 * 5.71e9, rel=0.01), "torchvision's GMACs of Inception v3"
    assert alone["tflops"] == pytest.approx(alone["images_per_second"] * alone["operations_an_image"] / 1e12)
    for kind in ("ceiling", "float32_ceiling"):
        assert alone[f"share_of_{kind}"] == pytest.approx(alone["tflops"] / alone[f"{kind}_tflops"])
    for row, embedded in zip(result["rows"], (10, 5), strict=True):
        took = embedded / alone["images_per_second"]
        assert row["embedding_share"] == pytest.approx(took / row["seconds_of_work"], abs=1e-3)
    printed = capsys.readouterr().out
    assert "| the reference's features kept |" in printed
    assert "share_of_float32_ceiling" in printed


# Statistics without images, arguments, sizes


def moments():
    return {name: np.zeros(shape, np.float32) for name, shape in reference.MOMENTS.items()}


@pytest.mark.parametrize(
    ("changed", "warnings", "good"),
    [({}, [], True), ({"FID": 3.96}, [], False), ({"Recall": 0.5349}, [], False), ({}, ["other weights"], False)],
)
def test_the_self_check_compares_with_adms_figures(root, tmp_path, changed, warnings, good):
    """Its script, with the files there and an evaluator that notes its words and answers with ADM's figures."""
    adms = {"Inception Score": 215.84, "FID": 3.943, "sFID": 6.14, "Precision": 0.8265, "Recall": 0.5309}
    (tmp_path / "weights").mkdir()
    result = json.dumps({"metrics": adms | changed, "warnings": warnings})
    (tmp_path / "weights" / "selfcheck.json").write_text(result)
    torchrun = tmp_path / "torchrun"
    torchrun.write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" >{tmp_path}/words\n')
    torchrun.chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHON": "true"}
    words = ["bash", root / "evaluations" / "selfcheck.sh", tmp_path / "weights"]
    done = subprocess.run(words, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode == 0) == good, done.stdout + done.stderr
    assert done.stdout.count("good") == 5 - len(changed)
    words = (tmp_path / "words").read_text().split("\n")[:-1]
    args = evaluator.parse(words[words.index("evaluations.evaluator") + 1 :])
    fetched = {file.name: str(tmp_path / "weights" / file.path) for file in FILES}
    assert [str(args.reference), str(args.samples)] == [fetched["reference-256"], fetched["admnet-256"]]
    assert args.inception == fetched["inception"]
    assert args.out == tmp_path / "weights" / "selfcheck.json"


def test_statistics_without_images_need_the_flag_that_says_so(inception_weights, tmp_path):
    fake, statistics = save_npz(tmp_path / "x.npz", pictures(8)), tmp_path / "stats.npz"
    np.savez(statistics, **moments())
    with pytest.raises(ValueError, match=r"stats\.npz: holds no images.*--no-precision-recall"):
        evaluator.main([str(statistics), str(fake), "--inception", str(inception_weights)])
    found = reference.Reference(statistics, use_moments=True, use_images=False)
    assert found.images is None
    assert found.moments["sigma_s"].dtype == torch.float64


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mu_s": None, "sigma_s": None}, "holds mu but not mu_s, sigma_s"),
        ({"mu": np.zeros(64)}, r"mu is float64 \(64,\), expected floats \(2048,\)"),
        ({"mu_s": np.full(2023, None)}, "Object arrays cannot be loaded"),
    ],
)
def test_statistics_that_are_not_adms_are_refused(change, message, tmp_path):
    arrays = {name: value for name, value in (moments() | change).items() if value is not None}
    np.savez(tmp_path / "stats.npz", **arrays)
    with pytest.raises(ValueError, match=rf"stats\.npz: .*{message}"):
        reference.Reference(tmp_path / "stats.npz", use_moments=True, use_images=False)


@pytest.mark.parametrize(
    "arguments", [[], ["--encoder-weights", "w"], ["--encoder", "e", "--inception", "i"], ["--batch-size", "0"]]
)
def test_arguments_that_do_not_go_together(arguments):
    with pytest.raises(SystemExit):
        evaluator.parse(["ref", *arguments] if not arguments else ["ref", "samples", *arguments])


def test_images_of_different_sizes_are_not_compared(evaluate, tmp_path):
    real, fake = save_npz(tmp_path / "ref.npz", pictures(8)), save_npz(tmp_path / "x.npz", pictures(8, size=28))
    with pytest.raises(ValueError, match=r"x\.npz: its images are \(28, 28\).*\(32, 32\)"):
        evaluate(real, fake)


def test_a_large_reference_keeps_evenly_spread_images(tmp_path, monkeypatch):
    monkeypatch.setattr(reference, "MOST_IMAGES", 5)
    found = reference.Reference(save_npz(tmp_path / "ref.npz", pictures(12)), use_moments=True, use_images=True)
    assert found.kept == [0, 2, 4, 7, 9]
    chosen = torch.cat(list(found.images.batches(found.kept, 2))).permute(0, 2, 3, 1)
    np.testing.assert_array_equal(chosen, pictures(12)[found.kept])


# Reading images


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("order", ["C", "F"])
def test_npz_is_streamed_however_it_was_written(save, order, tmp_path):
    images = pictures(11)
    save(tmp_path / "x.npz", first=np.zeros(1000), arr_0=np.asarray(images, order=order), arr_1=np.arange(11))
    np.testing.assert_array_equal(all_images(tmp_path / "x.npz"), images)
    assert len(open_images(tmp_path / "x.npz")) == 11


def test_any_rows_of_a_store_in_any_order(tmp_path):
    images = pictures(9)
    np.save(tmp_path / "images.npy", images.transpose(0, 3, 1, 2))
    (tmp_path / "meta.json").write_text('{"complete": true}')
    chosen = ChosenImages(tmp_path, [5, 2, 2, 8, 0])
    assert len(chosen) == 5
    read = torch.cat(list(chosen.batches(range(1, 5), 3))).permute(0, 2, 3, 1)
    np.testing.assert_array_equal(read, images[[2, 2, 8, 0]])


def npy(descr, shape, content=b"", fortran=False):
    """An npy file with any header."""
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": descr, "fortran_order": fortran, "shape": shape})
    return file.getvalue() + content


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (npy("<f4", (2, 4, 4, 3), bytes(384)), "dtype float32, expected uint8"),
        (npy("|u1", (2, 3, 4, 4), bytes(96)), r"shape \(2, 3, 4, 4\), expected \(N, H, W, 3\)"),
        (npy("|u1", (2, 4, 4, 1), bytes(32)), "grey repeated to 3"),
        (npy("|u1", (0, 4, 4, 3)), "N > 0"),
        (npy("|u1", (-2, -4, 4, 3), bytes(96)), "N > 0"),
        (npy("|u1", (2, 4, 4, 3), bytes(95)), "declares 96 bytes of images and holds 95"),
        (npy("|u1", (10**9, 4, 4, 3), bytes(96)), "declares 48,000,000,000 bytes"),
        (b"\x93NUMPY\x01\x00\xff\xff{'descr'", "array header"),
        (b"no array", "magic string"),
        (b"\x93NUMPY\x09\x00rest", r"npy format \(9, 0\)"),
    ],
)
def test_npz_with_a_wrong_array_is_refused_before_it_is_read(content, message, tmp_path):
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
        archive.writestr("arr_0.npy", content)
    with pytest.raises(ValueError, match=rf"x\.npz: .*{message}"):
        open_images(tmp_path / "x.npz")


def test_pickled_objects_in_an_npz_are_not_run(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
        archive.writestr("arr_0.npy", npy("|O", (2, 4, 4, 3), pickle.dumps(Payload(tmp_path / "ran"))))
    with pytest.raises(ValueError, match="dtype object, expected uint8"):
        open_images(tmp_path / "x.npz")
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
        archive.writestr("mu.npy", npy("|O", (2048,), pickle.dumps(Payload(tmp_path / "ran"))))
    with pytest.raises(ValueError, match=r"x\.npz"):
        reference.Reference(tmp_path / "x.npz", use_moments=True, use_images=False)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_damaged_npz_is_named(save, tmp_path):
    path = tmp_path / "x.npz"
    save(path, arr_0=np.random.default_rng(0).integers(0, 256, (20, 32, 32, 3), np.uint8))
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"x\.npz: .*cut short"):
        open_images(path)
    path.write_bytes(content[:30_000] + bytes([content[30_000] ^ 1]) + content[30_001:])
    with pytest.raises(ValueError, match=r"x\.npz: .*damaged"):
        all_images(path)
    np.savez(path, other=np.zeros(3))
    with pytest.raises(ValueError, match=r"x\.npz: holds no images; expected arr_0"):
        open_images(path)


def test_folders_of_any_colour_mode(tmp_path):
    colour = Image.fromarray(pictures(1)[0])
    (tmp_path / "deep" / "er").mkdir(parents=True)
    for i, mode in enumerate(["RGB", "L", "RGBA", "P", "1"]):
        colour.convert(mode).save(tmp_path / "deep" / "er" / f"{i}.png")
    colour.convert("CMYK").save(tmp_path / "z.jpg", quality=95)
    (tmp_path / "notes.txt").write_text("no image")
    images = all_images(tmp_path)
    assert images.shape == (6, 32, 32, 3)
    np.testing.assert_array_equal(images[2], images[0])
    np.testing.assert_array_equal(images[1], np.asarray(colour.convert("L"))[..., None].repeat(3, 2))
    assert np.abs(images[5].astype(int) - images[0]).mean() < 8


def test_folders_that_cannot_be_evaluated(tmp_path):
    with pytest.raises(ValueError, match="nowhere: no such file or folder"):
        open_images(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="no images in it"):
        open_images(tmp_path)
    folder = save_folder(tmp_path / "x", pictures(3))
    Image.new("RGB", (31, 32)).save(folder / "000001.png")
    with pytest.raises(ValueError, match=r"000001\.png has \(32, 31\).*crop and resize"):
        open_images(folder)
    (folder / "000001.png").write_bytes((folder / "000000.png").read_bytes()[:200])
    with pytest.raises(ValueError, match=r"000001\.png"):
        all_images(folder)
    (folder / "000001.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"000001\.png: cannot identify"):
        open_images(folder)


def test_broken_idx_zip_and_store_are_named(tmp_path):
    path = tmp_path / "images.gz"
    path.write_bytes(gzip.compress(struct.pack(">4I", 0x0801, 3, 4, 4)))
    with pytest.raises(ValueError, match=r"images\.gz: not an idx file of images: starts with 0x00000801"):
        open_images(path)
    path.write_bytes(gzip.compress(struct.pack(">4I", 0x0803, 3, 4, 4) + bytes(40)))
    with pytest.raises(ValueError, match=r"images\.gz: ends in image 2 of 3"):
        all_images(path)
    path.write_bytes(b"no gzip")
    with pytest.raises(ValueError, match=r"images\.gz: .*damaged"):
        open_images(path)
    (tmp_path / "x.zip").write_bytes(b"no zip")
    with pytest.raises(ValueError, match=r"x\.zip: .*damaged"):
        open_images(tmp_path / "x.zip")
    store = tmp_path / "store"
    store.mkdir()
    (store / "meta.json").write_text("{}")
    with pytest.raises(ValueError, match="store: this store is not complete"):
        open_images(store)
    (store / "meta.json").write_text('{"complete": true}')
    with pytest.raises(ValueError, match="--keep-images"):
        open_images(store)
    np.save(store / "images.npy", np.zeros((2, 4, 4, 3), np.uint8))
    with pytest.raises(ValueError, match=r"images\.npy is uint8 \(2, 4, 4, 3\)"):
        open_images(store)
