"""The shipped images, VAE and model are what assets/README.md says; the command that made them works at small size."""

import json
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import sample_ddp
from memory.bank import snippet_rules
from memory.files import sha256
from models.autoencoder import load_codec
from models.checkpoint import load_model
from models.encoder import load_encoder
from samplers import SNIPPET_DRAW, noise, uniform
from scripts.images import square
from scripts.make_assets import framed, main, measure, model_card, rows, standardise, statistics
from scripts.sources import open_source


@pytest.fixture(scope="module")
def images(root):
    """The shipped test images as the VAE sees them: (1000, 1, 32, 32) uint8."""
    return framed(rows(root / "assets/fashion-mnist", "t10k", "images-idx3"))


@pytest.fixture(scope="module")
def report(root):
    return json.loads((root / "assets/fashion-mnist-vae/report.json").read_text())


def test_images_are_the_first_rows_with_every_class(root):
    source = open_source(root / "assets/fashion-mnist")
    assert len(source.names) == 6000
    assert torch.bincount(torch.from_numpy(source.labels)).min() > 500
    assert source.labels[:10].tolist() == [9, 0, 0, 3, 0, 2, 7, 2, 5, 5]  # as in the full data
    assert len(rows(root / "assets/fashion-mnist", "t10k", "labels-idx1")) == 1000


def test_assets_are_small_and_licensed(root):
    sizes = {path: path.stat().st_size for path in (root / "assets").rglob("*") if path.is_file()}
    assert sum(sizes.values()) < 18e6
    assert sizes[root / "assets/gmem-fashion-mnist/model.safetensors"] < 12e6
    assert sum(size for path, size in sizes.items() if path.parent.name == "fashion-mnist") < 4e6
    assert sizes[root / "assets/fashion-mnist-vae/diffusion_pytorch_model.safetensors"] < 2e6
    assert "MIT" in (root / "assets/fashion-mnist/LICENSE").read_text()
    assert "MIT" in (root / "assets/README.md").read_text()


def test_vae_is_as_good_as_its_report(root, images, report):
    measured = measure(root / "assets/fashion-mnist-vae", images[:200])
    assert measured["mae"] < 1.1 * report["mae"]
    assert measured["psnr"] > report["psnr"] - 0.5
    assert measured["mae_sampled"] < 1.1 * report["mae_sampled"]
    for std in measured["latent_std"]:
        assert 0.9 < std < 1.1
    readme = (root / "assets/README.md").read_text()
    assert re.search(rf"\b{report['mae']:.2f} grey levels", readme)
    assert re.search(rf"\b{report['psnr']:.1f} dB", readme)


def test_vae_has_the_shape_the_demo_trains_on(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # from anywhere by its name in assets/, which a model trained on it keeps
    meta = load_codec("assets/fashion-mnist-vae").meta(32)
    assert meta["latent_shape"] == [4, 8, 8]
    assert meta["image_channels"] == 1
    assert meta["scale"] == pytest.approx(1, abs=0.01)


def test_model_is_the_one_that_its_card_describes(root):
    """File, card and report say the same, and name no folder of the machine that made them."""
    folder = root / "assets/gmem-fashion-mnist"
    card, report = (folder / "README.md").read_text(), json.loads((folder / "report.json").read_text())
    assert sha256(folder / "model.safetensors") == report["file"]["sha256"]
    assert card == model_card(card.split("\n\n## Training")[0], report)
    model, config, bank = load_model(folder)
    assert f"{sum(parameter.numel() for parameter in model.parameters()):,} parameters" in card
    assert (len(bank), bank.dim, int(bank.freq.sum())) == (report["bank"]["k"], 1280, config["store"]["num_images"])
    assert (config["steps"], config["codec"]["name"]) == (report["training"]["steps"], "pixels")
    assert sha256(root / "benchmarks/miniature/fashion/metric.safetensors") == report["judge"]["sha256"]
    assert f"SHA-256 {report['judge']['sha256']}" in card
    assert not re.search(r"/(tmp|home|work|root)\b", json.dumps([card, report, config["args"], config["store"]]))


def test_readme_quotes_the_candidates(root):
    """The table of what the recipe made by other settings; the best of them, first in the record, is shipped."""
    folder = root / "assets/gmem-fashion-mnist"
    readme = (root / "assets/README.md").read_text()
    report, candidates = (json.loads((folder / f"{name}.json").read_text()) for name in ("report", "candidates"))
    judge, expected = report["judge"]["name"], []
    for candidate in candidates:
        training, scores = candidate["training"], candidate["scores"]
        assert candidate["judge"] == report["judge"]
        assert candidate["sampling"] == report["sampling"]
        assert scores["random training images"] == report["rows"]["random training images"]["metrics"]["held-out"]
        same = ("code", "steps", "batch_size", "lr", "seed", "images_trained_on", "device", "versions")
        assert {name: training[name] for name in same} == {name: report["training"][name] for name in same}
        cells = [f"`{training['variables'][name]}`" for name in ("CODEC", "MODEL", "SCALE")]
        copies = [f"{space['near_copies']:.2%}" for space in candidate["spaces"].values()]
        expected.append([*cells, *quoted_scores(scores["samples"], judge), *copies])
    held_out = [f"{space['near_copies_held_out']:.2%}" for space in candidates[0]["spaces"].values()]
    expected.append(["random training images", "", "", *quoted_scores(scores["random training images"], judge), "", ""])
    expected.append(["held-out images", "", "", "", "", "", "", *held_out])
    assert quoted_rows(readme, "### What it was chosen from")[1:] == expected
    shipped = candidates[0]
    assert shipped["sha256"] == report["file"]["sha256"]
    assert shipped["scores"]["samples"] == report["rows"]["samples"]["metrics"]["held-out"]
    assert shipped["training"] == report["training"]
    assert len({json.dumps(candidate["training"]["variables"]) for candidate in candidates}) == len(candidates) == 3
    assert min(candidates, key=lambda candidate: candidate["scores"]["samples"][f"FD-{judge}"]) == shipped
    assert not re.search(r"/(tmp|home|work|root)\b", json.dumps(candidates))
    training = report["training"]
    facts = (f"{training['seconds']} seconds", training["date"][:10], training["versions"]["torch"])
    for fact in (*facts, f"{training['steps']:,} steps of {training['batch_size']}"):
        assert fact in " ".join(readme.split()), fact


def quoted_scores(metrics: dict[str, float], judge: str) -> list[str]:
    """FD to three digits, precision and recall to three places, KD to two digits."""
    fd, precision, recall, kd = (metrics[f"{name}-{judge}"] for name in ("FD", "Precision", "Recall", "KD"))
    return [f"{fd:#.3g}", f"{precision:.3f}", f"{recall:.3f}", f"{kd:.2g}"]


def quoted_rows(readme: str, heading: str) -> list[list[str]]:
    """The cells of the tables under a heading of assets/README.md, row by row."""
    text = re.split(r"\n##+ ", readme.partition(f"\n{heading}\n")[2])[0]
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if "---" not in line]


def test_readme_quotes_the_record_of_scores(root):
    """Each figure of the record stands in the table as it is, and the record is of the files that are shipped."""
    folder = root / "assets/gmem-fashion-mnist"
    record, readme = json.loads((folder / "scores.json").read_text()), (root / "assets/README.md").read_text()
    assert record["model"]["sha256"] == sha256(folder / "model.safetensors")
    assert record["judge"]["sha256"] == sha256(root / record["judge"]["weights"])
    expected = []
    for row in record["rows"]:
        draws = f" ± {row['deviation']['fd']:#.2g}" if "deviation" in row else ""
        figures = [f"{row['fd']:#.3g}{draws}", *(f"{row[name]:.3f}" for name in ("precision", "recall"))]
        expected.append([row["images"], f"{row['num_images']:,}", *figures])
    for row in record["chance"]["rows"][:2]:
        assert f"{row['standard_error']:.2f} for {row['num_images']:,}" in readme, row["images"]
    for row in record["chance"]["rows"][2:]:
        assert f"{abs(row['more_than_euler']):.2f} ± {row['standard_error_of_it']:.2f}" in readme, row["images"]
    words = " ".join(readme.split())
    assert f"only go through it score FD {record['vae']['fd']:.2f} ({record['vae']['num_images']:,} of them" in words
    second = [f"{row['fd']:.0f} for {{}}" for row in record["second_judge"]["rows"]]
    told = "its FD is " + ", ".join(second[:2]) + " and " + second[2]
    assert told.format("the shipped model", "`SCALE=16` on latents", "training images") in words
    tied = [record["row_position_and_brightness"][rule]["row and brightness"] for rule in ("noise", "random")]
    correlations = "[{:.2f}, and {:.2f} with random rows]".format(*(value["correlation"] for value in tied))
    assert correlations in (root / "evaluations/miniature.md").read_text()
    pairs = ("row and brightness", "mean of the noise and brightness", "row and mean of the noise")
    for rule in ("noise", "random"):
        values = [record["row_position_and_brightness"][rule][pair] for pair in pairs]
        expected.append(
            [f"`{rule}`", *(f"{value['correlation']:.3f} ± {value['standard_error']:.3f}" for value in values)]
        )
    quoted = quoted_rows(readme, "### Scores to repeat")
    assert [cells for cells in quoted if re.search(r"\d", " ".join(cells[1:]))] == expected
    for fact in (record["run"]["date"][:10], f"torch {record['run']['versions']['torch']}", record["judge"]["encoder"]):
        assert fact in readme.partition("### Scores to repeat")[2], fact


def test_recorded_code_frames_images_as_the_store_does(root, tmp_path):
    """The record's lines, on the shipped images: reference and controls are what encode_dataset would have stored."""
    record = json.loads((root / "assets/gmem-fashion-mnist/scores.json").read_text())
    words = {"FOLDER": str(root / "assets/fashion-mnist"), "OUT": str(tmp_path), "2500": "16"}
    lines = "\n".join(record["commands"]["sets"])
    exec(re.sub("|".join(words), lambda found: words[found[0]], lines), {})
    for name, part in (("test", "t10k"), ("real-0", "train")):
        pixels = np.load(tmp_path / f"{name}.npz")["arr_0"]
        source = open_source(root / f"assets/fashion-mnist/{part}-images-idx3-ubyte.gz")
        stored = [square(source.image(row), 32, 3, source.on_black) for row in range(len(source.names))]
        assert len(pixels) == (1000 if name == "test" else 16)
        assert {image.tobytes() for image in pixels} <= {image.transpose(1, 2, 0).tobytes() for image in stored}
    decoded = np.load(tmp_path / "vae.npz")["arr_0"].astype(float)
    assert 0 < np.abs(decoded - pixels).mean() < 8  # pixels: of real-0


def test_recorded_rows_are_those_that_the_noise_points_to(root):
    """The record's correlation of row and noise, which needs no images, comes out again."""
    record = json.loads((root / "assets/gmem-fashion-mnist/scores.json").read_text())["row_position_and_brightness"]
    network, _, bank = load_model(root / "assets/gmem-fashion-mnist")
    images = torch.arange(record["noise"]["num_images"])
    z, u = noise(0, images, 0, network.latent_shape), uniform(0, images, SNIPPET_DRAW)
    for rule, choose in snippet_rules.items():
        pair = torch.stack([choose(bank, z, u).double(), z.double().mean((1, 2, 3))])
        recorded = record[rule]["row and mean of the noise"]["correlation"]
        assert torch.corrcoef(pair)[0, 1].item() == pytest.approx(recorded, abs=1e-3)


def test_model_draws_clothes(root, tmp_path):
    """Its images lie nearer to shipped ones than those lie to each other, none is one of them, and they differ."""
    shipped = framed(rows(root / "assets/fashion-mnist", "train", "images-idx3"))[:, 0].float().flatten(1) / 255
    words = ["--checkpoint", "assets/gmem-fashion-mnist", "--num-images", "16", "--sampler", "euler", "--steps", "12"]
    sample_ddp.main([*words, "--format", "npz", "--out", str(tmp_path)])
    samples = torch.from_numpy(np.load(tmp_path / "samples.npz")["arr_0"])[..., 0].float().flatten(1) / 255
    among = torch.cdist(shipped[:500], shipped[500:]).min(1).values.mean()
    nearest = torch.cdist(samples, shipped).min(1).values
    assert nearest.mean() < 1.1 * among
    assert nearest.min() > 0.2 * among
    assert torch.pdist(samples).min() > 0.2 * among


def test_packaged_encoder_tells_clothes_apart(root):
    """5 nearest neighbours by cosine: 86% from 4,000 images at 160 px; here 600 at 64 px."""
    encoder = load_encoder("efficientnet-lite0@64")
    folder = root / "assets/fashion-mnist"
    features, labels = [], []
    for part, count in (("train", 600), ("t10k", 200)):
        images = torch.from_numpy(rows(folder, part, "images-idx3")[:count].copy())[:, None]
        features.append(F.normalize(torch.cat([encoder(batch) for batch in images.split(100)])))
        labels.append(torch.from_numpy(rows(folder, part, "labels-idx1")[:count].copy()))
    nearest = (features[1] @ features[0].T).topk(5).indices
    predicted = labels[0][nearest].mode(1).values
    assert (predicted == labels[1]).float().mean() > 0.72


def test_images_command_repeats_itself(root, tmp_path):
    for name in ("first", "second"):
        main(["images", "--source", str(root / "assets/fashion-mnist"), "--out", str(tmp_path / name), "--train", "50"])
    for path in (tmp_path / "first").iterdir():
        assert path.read_bytes() == (tmp_path / "second" / path.name).read_bytes()
    assert len(open_source(tmp_path / "first").names) == 50
    with pytest.raises(ValueError, match="--test is 0, expected 1 to 1000"):
        main(["images", "--source", str(root / "assets/fashion-mnist"), "--out", str(tmp_path), "--test", "0"])
    with pytest.raises(ValueError, match=r"no train-images-idx3-ubyte\.gz in"):
        main(["images", "--source", str(tmp_path)])


def test_vae_command_learns(root, tmp_path):
    """Twenty-five steps from nothing, and the network beats an untrained one; its latents come out standardised."""
    main(
        [
            "images",
            "--source",
            str(root / "assets/fashion-mnist"),
            "--out",
            str(tmp_path),
            "--train",
            "64",
            "--test",
            "32",
        ]
    )
    small = ["vae", "--source", str(tmp_path), "--widths", "8", "8", "8", "--batch-size", "8", "--lr", "2e-2"]
    reports = []
    for steps in ("1", "25"):
        main([*small, "--steps", steps, "--out", str(tmp_path / steps)])
        reports.append(json.loads((tmp_path / steps / "report.json").read_text()))
    untrained, trained = reports
    assert trained["mae"] < 0.8 * untrained["mae"]
    for std in trained["latent_std"]:
        assert 0.8 < std < 1.2


def test_standardising_keeps_every_reconstruction(root, images):
    vae = load_codec(str(root / "assets/fashion-mnist-vae")).vae
    batch = images[:8] / 127.5 - 1
    with torch.no_grad():
        before = vae.decode(vae.encode(batch).latent_dist.mean).sample
        spread = vae.encode(batch).latent_dist.std
        mean, std = torch.tensor([0.5, -1.0, 2.0, 0.0]), torch.tensor([2.0, 0.5, 1.0, 4.0])
        standardise(vae, mean, std)
        torch.testing.assert_close(vae.decode(vae.encode(batch).latent_dist.mean).sample, before, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(vae.encode(batch).latent_dist.std, spread / std.view(4, 1, 1), rtol=1e-3, atol=1e-5)
    standardise(vae, *statistics(vae, images[:64]))
    centre, width = statistics(vae, images[:64])
    torch.testing.assert_close(centre, torch.zeros(4).double(), rtol=0, atol=1e-3)
    torch.testing.assert_close(width, torch.ones(4).double(), rtol=0, atol=1e-3)
