"""The copy audit and the control rows: planted copies are found, real images that nobody trained on are not accused."""

import gzip
import json
import math
import multiprocessing
import os
import socket
import statistics
import struct

import numpy as np
import pytest
import timm
import torch
from accelerate import PartialState
from PIL import Image

from evaluations import card, controls, copies
from evaluations.copies import Finding
from evaluations.search import FeatureSpace, LatentSpace, nearest
from memory import build_bank
from memory.bank import MemoryBank
from memory.files import sha256
from samplers import noise
from scripts import encode_dataset

ENCODER = "test_vit@32"
FRESH = 300  # real images outside the store
SPACES = (ENCODER, "latent")


@pytest.fixture(scope="module")
def clothes(root):
    """Real images (1300, 28, 28) of Fashion-MNIST, all different."""
    with gzip.open(root / "assets" / "fashion-mnist" / "train-images-idx3-ubyte.gz") as file:
        file.read(16)
        return np.frombuffer(file.read(1300 * 28 * 28), np.uint8).reshape(-1, 28, 28)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A tiny vision transformer with random weights."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "vit.pth"
    torch.save(timm.create_model("test_vit").state_dict(), path)
    return path


@pytest.fixture(scope="module")
def store(clothes, weights, tmp_path_factory):
    """A store of about 750 real images with two views, and about 250 held out."""
    folder = tmp_path_factory.mktemp("data")
    kept = clothes[FRESH:]
    (folder / "source").mkdir()
    with gzip.open(folder / "source" / "train-images-idx3-ubyte.gz", "wb", compresslevel=1) as file:
        file.write(struct.pack(">4I", 0x0803, *kept.shape) + kept.tobytes())
    with gzip.open(folder / "source" / "train-labels-idx1-ubyte.gz", "wb") as file:
        file.write(struct.pack(">2I", 0x0801, len(kept)) + bytes(len(kept)))
    options = f"--codec pixels --image-size 28 --views 2 --holdout 0.25 --keep-images --encoder {ENCODER} --workers 0"
    command = [str(folder / "source"), "--out", str(folder / "clothes"), "--encoder-weights", str(weights)]
    encode_dataset.main([*command, *options.split()])
    return folder / "clothes"


@pytest.fixture
def audit(store, weights, tmp_path, capsys):
    """Run the command on grey images (M, 28, 28); returns what it printed and its JSON."""

    def run(images, *more, settings=None, store=store):
        np.savez(tmp_path / "x.npz", arr_0=np.repeat(images[..., None], 3, 3))
        if settings:
            made = {"num_images": len(images), "settings": settings}
            (tmp_path / "x.json").write_text(json.dumps(made))
        command = ["--store", store, "--samples", tmp_path / "x.npz", "--out", tmp_path / "out", *more]
        copies.main(list(map(str, command)))
        return capsys.readouterr().out, json.loads((tmp_path / "out" / "copies.json").read_text())

    return run


@pytest.fixture
def both(weights):
    return ["--encoder", ENCODER, "--encoder-weights", str(weights)]


def test_planted_copies_are_found(audit, both, clothes, store):
    """Exact, mirrored and slightly noisy copies among real images; each is traced to its row and view."""
    training = np.load(store / "images.npy")[:, 0]
    rows = np.arange(30) * 20
    planted = training[rows].copy()
    planted[10:20] = planted[10:20, :, ::-1]
    noise = np.random.default_rng(0).integers(-2, 3, planted[20:].shape)
    planted[20:] = (planted[20:].astype(int) + noise).clip(0, 255)
    samples = np.concatenate([clothes[:60], planted])
    _, result = audit(samples, *both)
    for name in SPACES:
        space = result["spaces"][name]
        found = {pair["sample"]: pair for pair in space["suspicious"]}
        for i, row in enumerate(rows):
            pair = found[60 + i]
            assert pair["training_row"] == row
            assert pair["view"] == ("mirrored" if 10 <= i < 20 else "original")
            assert pair["distance"] <= space["threshold"]
        first, order = space["suspicious"][:30], [pair["sample"] for pair in space["suspicious"]]
        assert sorted(order[:20]) == list(range(60, 80))  # whose features in another batch may differ in the last digit
        assert sorted(order[20:30]) == list(range(80, 90))
        distances = [pair["distance"] for pair in first]
        assert distances == sorted(distances)
        assert distances[19] < 0.1 * distances[20]
        assert space["near_copies"] >= 1 / 3
        assert space["excess"] > 5 * space["standard_error"]
        assert space["exact"] == distances.count(0) / 90
    assert result["spaces"]["latent"]["exact"] == 20 / 90
    assert result["spaces"]["latent"]["suspicious"][0]["file"] == (store / "files.txt").read_text().split("\n")[0]


def test_real_images_are_not_accused(audit, both, clothes):
    _, result = audit(clothes[:FRESH], *both)
    for name in SPACES:
        space = result["spaces"][name]
        assert abs(space["excess"]) < 3 * space["standard_error"]
        assert space["near_copies"] < 0.04
        assert space["authenticity"] == pytest.approx(space["authenticity_held_out"], abs=0.1)
        assert 0.4 < space["authenticity"] < 0.9


def test_training_images_themselves_are_neither_new_nor_authentic(audit, store):
    _, result = audit(np.load(store / "images.npy")[:50, 0])
    space = result["spaces"]["latent"]
    assert (space["near_copies"], space["exact"], space["authenticity"]) == (1, 1, 0)


def brute_force(queries, points, exclude, views):
    """The first of the nearest points, straight from the definition, in exact integers of the grid."""
    q, p = (np.rint(x.numpy().astype(np.float64) * 2**24).astype(object) for x in (queries, points))
    found = []
    for i, x in enumerate(q):
        squares = ((p - x) ** 2).sum(1)
        allowed = [j for j in range(len(p)) if exclude is None or j // views != exclude[i]]
        found.append(min(allowed, key=lambda j: (squares[j], j)))
    return np.array(found)


@pytest.mark.parametrize("excluding", [False, True])
def test_nearest_equals_brute_force_whatever_the_chunks(excluding):
    """With many equal points, so that ties must go to the lowest row and view."""
    rng = np.random.default_rng(0)
    stored = rng.standard_normal((40, 2, 6)).astype(np.float16)
    stored[20:] = stored[:20]
    stored[3] = stored[3, 0]
    space = FeatureSpace("any")
    points = space.points(torch.from_numpy(stored).flatten(0, 1))
    queries = torch.cat([points[::3], space.points(torch.from_numpy(rng.standard_normal((9, 6))))])
    own = torch.arange(len(queries)) * 3 // 2  # the row that each of the first queries is
    exclude = own % 40 if excluding else None
    expected = brute_force(queries, points, exclude, 2)
    distances = []
    for values in (1, 40, 333, 2**24):
        found = nearest(queries, stored, space, exclude, values=values)
        np.testing.assert_array_equal(found.rows * 2 + found.views, expected)
        distances.append(found.distances)
        assert torch.equal(distances[0], distances[-1])
    torch.testing.assert_close(
        distances[0], (queries.double() - points[expected].double()).norm(dim=1), rtol=1e-7, atol=1e-12
    )
    if not excluding:
        assert (distances[0][: len(points[::3])] == 0).all()


def test_features_are_compared_by_their_angle():
    """Whatever their lengths, and a feature without a direction is refused."""
    rng = np.random.default_rng(0)
    stored = (rng.standard_normal((30, 1, 8)) * rng.uniform(0.1, 10, (30, 1, 1))).astype(np.float16)
    query = torch.from_numpy(rng.standard_normal((5, 8)))
    space = FeatureSpace("any")
    found = nearest(space.points(7 * query), stored, space)
    cosine = torch.cosine_similarity(query[:, None], torch.from_numpy(stored[:, 0]).double(), dim=2)
    assert torch.equal(found.rows, cosine.argmax(1))
    torch.testing.assert_close(found.distances, (2 - 2 * cosine.amax(1)).sqrt(), rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="features of any"):
        space.points(0 * query)


def test_latents_are_compared_by_their_scaled_means():
    """A VAE's std and shift play no part in a distance, its scale does."""
    meta = {"latent_shape": [2, 1, 1], "scale": 0.5, "shift": 3.0}
    rng = np.random.default_rng(0)
    stored = rng.standard_normal((30, 1, 4, 1, 1)).astype(np.float16)
    query = torch.from_numpy(rng.standard_normal((5, 4, 1, 1))).half()
    space = LatentSpace(meta)
    found = nearest(space.points(query), stored, space)
    expected = 0.5 * torch.cdist(query[:, :2].flatten(1).double(), torch.from_numpy(stored[:, 0, :2, 0, 0]).double())
    assert torch.equal(found.rows, expected.argmin(1))
    torch.testing.assert_close(found.distances, expected.amin(1), rtol=0, atol=2e-5)


def test_the_figures_by_hand():
    """Columns: distance, row, view, the neighbour's own distance; 200 held-out distances 1 … 200, of which 1% is 2."""
    samples = torch.tensor([[0, 5, 0, 0], [2, 5, 0, 1], [3, 6, 0, 3], [9, 7, 1, 4]], dtype=torch.float64)
    held_out = torch.arange(1, 201, dtype=torch.float64)[:, None] * torch.tensor([1, 0, 0, 2], dtype=torch.float64)
    held_out[:2, 3] = 1
    finding = Finding("any", samples, held_out)
    result = finding.result()
    assert result["threshold"] == 2
    assert (result["near_copies"], result["near_copies_held_out"], result["exact"]) == (0.5, 0.01, 0.25)
    assert result["excess"] == 0.49
    assert result["standard_error"] == pytest.approx((0.25 / 4 + 0.01 * 0.99 / 200) ** 0.5)
    assert (result["wide_threshold"], result["wide_near_copies"], result["wide_near_copies_held_out"]) == (10, 1, 0.05)
    assert result["wide_excess"] == 0.95
    assert result["wide_standard_error"] == pytest.approx((0.05 * 0.95 / 200) ** 0.5)
    assert result["authenticity"] == 0.5  # 2 > 1 and 9 > 4, but neither 0 > 0 nor 3 > 3
    assert result["authenticity_held_out"] == 0.005  # 2 > 1, but neither 1 > 1 nor any other
    assert finding.suspicious().tolist() == [0, 1, 2, 3]


def test_a_few_twins_do_not_hide_copies():
    """2% of the held-out images have a twin at 0.1, the others are 8 to 12 from any; half of the samples are at 5."""
    held_out, samples = torch.zeros(1000, 4, dtype=torch.float64), torch.zeros(100, 4, dtype=torch.float64)
    held_out[:, 0] = torch.cat([torch.full((20,), 0.1), torch.linspace(8, 12, 980)])
    samples[:, 0] = torch.tensor([5.0, 10.0]).repeat(50)
    result = Finding("any", samples, held_out).result()
    assert (result["threshold"], result["excess"]) == (pytest.approx(0.1), -0.02)
    assert (result["wide_near_copies"], result["wide_excess"]) == (0.5, 0.45)


def test_the_sheets_show_each_sample_beside_its_neighbour(audit, clothes, store, tmp_path):
    audit(clothes[:5])
    images, out = np.load(store / "images.npy"), tmp_path / "out"
    pairs = json.loads((out / "copies.json").read_text())["spaces"]["latent"]["suspicious"]
    assert [pair["distance"] for pair in pairs] == sorted(pair["distance"] for pair in pairs)
    first = sorted(pairs, key=lambda pair: pair["sample"])
    assert first != pairs
    for name, order in (("neighbours", first), ("suspicious-latent", pairs)):
        sheet = np.asarray(Image.open(out / f"{name}.png"))
        for place, pair in enumerate(order):
            shown = sheet[4:60, 4 + 116 * place : 116 * (place + 1)][::2, ::2, 0]  # zoom 2, frames of 4
            neighbour = images[pair["training_row"], 0][:, :: -1 if pair["view"] == "mirrored" else 1]
            np.testing.assert_array_equal(shown, np.hstack([clothes[pair["sample"]], neighbour]))
    assert (out / "distances.png").exists()


def test_without_stored_images_the_sheet_is_decoded(audit, clothes, store, tmp_path):
    audit(clothes[:5])
    kept = (tmp_path / "out" / "neighbours.png").read_bytes()
    bare = tmp_path / "bare"
    for name in ("bare", "bare-holdout"):
        source = store.with_name(store.name + name.removeprefix("bare"))
        (tmp_path / name).mkdir()
        for file in ("latents.npy", "labels.npy"):
            (tmp_path / name / file).symlink_to(source / file)
        meta = json.loads((source / "meta.json").read_text()) | {"has_images": False, "encoders": {}}
        (tmp_path / name / "meta.json").write_text(json.dumps(meta))
    audit(clothes[:5], store=bare)
    assert (tmp_path / "out" / "neighbours.png").read_bytes() == kept


def test_an_encoder_of_the_snippets_family_is_marked(audit, both, clothes):
    text, result = audit(clothes[:5], *both, settings={"encoder": "test_vit@32"})
    assert result["spaces"][ENCODER]["same_family_as_snippets"]
    assert not result["spaces"]["latent"]["same_family_as_snippets"]
    assert f"{ENCODER} (of the family of the snippets: proves nothing)" in text
    assert f"warning: {ENCODER} is of the family of the snippet encoder" in text
    text, result = audit(clothes[:5], *both, settings={"encoder": "dinov2-vitb14"})
    assert not result["spaces"][ENCODER]["same_family_as_snippets"]
    assert "proves nothing" not in text
    assert "warning: no samples.json" not in text


def test_an_unknown_snippet_encoder_is_said(audit, clothes):
    text, _ = audit(clothes[:5])
    assert "warning: no samples.json" in text
    assert "held-out images: the threshold is uncertain below 1,000" in text


def run_rank(main, rank, port, command):
    """One of two processes, forked with everything imported, and so without a GPU."""
    torch.cuda.is_available = lambda: False
    PartialState._reset_state()
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    main(command)


def run_two(main, command):
    """A command on two processes that share their work."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    fork = multiprocessing.get_context("fork")
    ranks = [fork.Process(target=run_rank, args=(main, rank, port, command), daemon=True) for rank in range(2)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(60)
    assert [rank.exitcode for rank in ranks] == [0, 0]


def test_two_processes_find_what_one_finds(audit, both, clothes, store, tmp_path):
    _, alone = audit(clothes[:21], *both)
    places = ["--store", store, "--samples", tmp_path / "x.npz", "--out", tmp_path / "two"]
    run_two(copies.main, [*map(str, places), *both, "--batch-size=4"])
    two = json.loads((tmp_path / "two" / "copies.json").read_text())
    assert two["spaces"]["latent"] == alone["spaces"]["latent"]
    one = alone["spaces"][ENCODER]
    assert two["spaces"][ENCODER]["quantiles_held_out"] == one["quantiles_held_out"]
    assert two["spaces"][ENCODER]["quantiles"] == pytest.approx(one["quantiles"], rel=1e-2)  # a network's rounding


def test_what_cannot_be_audited_is_refused(audit, both, clothes, store, weights, tmp_path):
    with pytest.raises(ValueError, match=r"--store .*source: no held-out images.*--holdout"):
        copies.open_holdout(store.with_name("source"), None)
    with pytest.raises(ValueError, match=r"its images are \(14, 14\), those of .*clothes \(28, 28\)"):
        audit(clothes[:5, ::2, ::2])
    with pytest.raises(ValueError, match=r"no features of encoder 'resnet18'.*--add resnet18"):
        audit(clothes[:5], "--encoder", "resnet18")
    torch.manual_seed(1)
    torch.save(timm.create_model("test_vit").state_dict(), tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"--encoder test_vit@32: sha256 is .*--encoder-weights"):
        audit(clothes[:5], "--encoder", ENCODER, "--encoder-weights", tmp_path / "other.pth")
    for wrong in (["--encoder-weights", "w"], ["--batch-size", "0"]):
        with pytest.raises(SystemExit):
            copies.parse(["--store", "s", "--samples", "x", "--out", "o", *wrong])


# Control rows and the card


@pytest.fixture(scope="module")
def bank(store, tmp_path_factory):
    out = tmp_path_factory.mktemp("banks") / "clothes"
    build_bank.main(["--store", str(store), "--out", str(out), "--k", "40", "--passes", "2"])
    return out


@pytest.fixture
def sampled(bank, clothes, tmp_path):
    """Thirty "samples" with the samples.json of a draw from the bank."""
    np.savez(tmp_path / "s.npz", arr_0=np.repeat(clothes[:30, ..., None], 3, 3))
    settings = {"snippets": "noise", "seed": 3, "encoder": ENCODER, "training_steps": 800, "sampler": "sde"}
    settings |= {"evaluations": 250, "guidance": None}
    settings["bank"] = {file: sha256(bank / file) for file in ("bank.pth", "bank.freq")}
    run = {"images_per_second": 2.5, "processes": 1, "device": "a machine"}
    write_made(tmp_path, settings, run)
    return tmp_path / "s.npz", settings


def write_made(folder, settings, run=None):
    (folder / "s.json").write_text(json.dumps({"num_images": 30, "settings": settings, "run": run}))


def control(sampled, store, bank, weights, *more):
    out = sampled.with_name("controls.json")
    command = [store, sampled, "--store", store, "--bank", bank, "--out", out, "--encoder", "test_vit"]
    controls.main([*map(str, command), "--encoder-weights", str(weights), "--no-cache", *more])
    return json.loads(out.read_text())


def test_control_rows_and_the_card(sampled, store, bank, weights, capsys, tmp_path):
    samples, _ = sampled
    result = control(samples, store, bank, weights)
    rows = result["rows"]
    assert [row["num_images"] for row in rows.values()] == [30] * 4
    assert result["same_family_as_snippets"]
    assert rows["held-out images"]["metrics"].keys() == {"training"}
    against = {title: row["metrics"]["training"] for title, row in rows.items()}
    for title in ("random training images", "training images of the snippets"):
        assert against[title]["Precision-test_vit"] == 1  # they lie among the references
    assert all(np.isfinite(value) for metrics in against.values() for value in metrics.values())

    memory = MemoryBank.load(bank)
    z = noise(3, torch.arange(30), 0, (1, 28, 28), "cpu")
    features = torch.from_numpy(np.load(store / "features" / f"{ENCODER}.npy")).float()  # (N, 2, F)
    cosines = torch.nn.functional.normalize(features, dim=2) @ memory[memory.indices_from_noise(z)].T  # (N, 2, 30)
    assert result["different_copies"] == len(cosines.amax(1).argmax(0).unique())
    assert 1 < result["different_copies"] < 30

    copies.main(["--store", str(store), "--samples", str(samples), "--out", str(tmp_path)])
    capsys.readouterr()
    names = ["--controls", tmp_path / "controls.json", "--copies", tmp_path / "copies.json", "--bank", bank]
    card.main([*map(str, names), "--out", str(tmp_path / "card.md")])
    page = (tmp_path / "card.md").read_text()
    assert page.strip() == capsys.readouterr().out.strip()
    assert page.index("## Not for comparison") < page.index("| random training images ")
    for part in ("| latent ", "Bank of 40 snippets", "800 training steps; sde with 250 evaluations", "below 10,000"):
        assert part in page
    other = json.loads((tmp_path / "copies.json").read_text()) | {"samples": {"made": {}}}
    (tmp_path / "copies.json").write_text(json.dumps(other))
    with pytest.raises(ValueError, match="different samples"):
        card.main([*map(str, names), "--out", str(tmp_path / "card.md")])
    names[1], names[3] = names[3], names[1]
    with pytest.raises(ValueError, match=r"--controls .* is no result of evaluations\.controls: it has no references"):
        card.main([*map(str, names), "--out", str(tmp_path / "card.md")])


def test_several_draws_of_training_images_tell_their_deviation(sampled, store, bank, weights, monkeypatch, capsys):
    """That of the figures which the row itself has when another draw comes first, corrected for the share of the store
    that they draw, and so share."""
    samples, _ = sampled
    count = json.loads((store / "meta.json").read_text())["num_images"]
    rows = control(samples, store, bank, weights, "--draws", "3")["rows"]
    assert "| random training images " in capsys.readouterr().out.partition(" ± ")[0].splitlines()[-1]
    first, rule = [rows["random training images"]["metrics"]], controls.spread
    for draw in (1, 2):
        monkeypatch.setattr(controls, "spread", lambda count, number, _=0, draw=draw: rule(count, number, draw))
        first.append(control(samples, store, bank, weights)["rows"]["random training images"]["metrics"])
    for reference, metrics in rows["random training images"]["deviation"].items():
        for name, value in metrics.items():
            expected = statistics.stdev(one[reference][name] for one in first) / math.sqrt(1 - 30 / count)
            assert value == pytest.approx(expected, rel=1e-4, abs=1e-9)
    assert rows["random training images"]["deviation"]["held-out"]["FD-test_vit"] > 0
    with pytest.raises(SystemExit):
        control(samples, store, bank, weights, "--draws", "0")
    assert "--draws 0: expected 1 or more" in capsys.readouterr().err


def test_two_processes_score_the_rows_that_one_scores(sampled, store, bank, weights):
    samples, _ = sampled
    alone = control(samples, store, bank, weights, "--draws", "2")
    out = samples.with_name("two.json")
    places = [store, samples, "--store", store, "--bank", bank, "--out", out, "--encoder-weights", weights]
    run_two(controls.main, [*map(str, places), "--encoder=test_vit", "--no-cache", "--batch-size=4", "--draws=2"])
    two = json.loads(out.read_text())
    assert (two["run"]["processes"], alone["run"]["processes"]) == (2, 1)
    assert two["different_copies"] == alone["different_copies"]
    for title, row in alone["rows"].items():
        for reference, metrics in row["metrics"].items():
            assert two["rows"][title]["metrics"][reference] == pytest.approx(metrics, rel=1e-6), (title, reference)
    deviation = [result["rows"]["random training images"]["deviation"]["held-out"] for result in (two, alone)]
    assert deviation[0] == pytest.approx(deviation[1], rel=1e-4, abs=1e-9)


def test_controls_of_things_that_do_not_belong_together(sampled, store, bank, weights, tmp_path):
    samples, settings = sampled
    write_made(tmp_path, settings | {"snippets": "0" * 64})
    with pytest.raises(ValueError, match=r"snippets = '0000.*noise or random"):
        control(samples, store, bank, weights)
    write_made(tmp_path, settings | {"bank": {"bank.pth": "0" * 64}})
    with pytest.raises(ValueError, match=r"--bank .*bank\.pth is not the file"):
        control(samples, store, bank, weights)
    write_made(tmp_path, settings | {"bank": {}})
    whole = samples.read_bytes()
    np.savez(samples, arr_0=np.zeros((30, 14, 14, 3), np.uint8))
    with pytest.raises(ValueError, match=r"its images are \(14, 14\), .* \(28, 28\) .*resize one side"):
        control(samples, store, bank, weights)
    samples.write_bytes(whole)
    memory = MemoryBank.load(bank)
    memory.meta |= {"store_fingerprint": "other"}
    memory.save(tmp_path / "bank.pth")
    with pytest.raises(ValueError, match=r"--store .*was built from another"):
        control(samples, store, tmp_path, weights)


@pytest.mark.gpu
def test_a_gpu_finds_the_same():
    stored = torch.randn(500, 2, 64, generator=torch.Generator().manual_seed(0)).half().numpy()
    space = FeatureSpace("any")
    queries = space.points(torch.from_numpy(stored[:100, 0]) + 0.1)
    for a, b in zip(nearest(queries, stored, space), nearest(queries.cuda(), stored, space), strict=True):
        assert torch.equal(a, b.cpu())
