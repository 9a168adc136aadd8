"""Banks whose making is known are recognised; what lies in them is counted right."""

import json

import numpy as np
import pytest
import torch

from dataset import layout
from memory import build_bank
from memory.bank import MemoryBank
from scripts import inspect_bank

IMAGES, DIM = 600, 24


def features(seed):
    """(N, 1, F) float16 of length about 7, in a hundred groups whose images differ."""
    rng = np.random.default_rng(seed)
    return (rng.normal(size=(100, 1, DIM)).repeat(6, 0) + 0.8 * rng.normal(size=(IMAGES, 1, DIM))).astype(np.float16)


def write_store(path, **arrays):
    """A complete store with these features (N, 1, F) by encoder."""
    meta = {
        **{"format": 1, "num_images": IMAGES, "num_views": 1, "views": ["original"], "image_size": 2},
        "image_channels": 1,
        "codec": {"name": "test", "moments_shape": [2, 1, 1], "dtype": "float16"},
        "encoders": {name: {"name": name, "dim": array.shape[2]} for name, array in arrays.items()},
        **{"patches": {}, "has_images": False, "fingerprint": "a" * 64, "complete": True},
    }
    for file, (shape, dtype) in layout(meta).items():
        (path / file).parent.mkdir(parents=True, exist_ok=True)
        name = file.removeprefix("features/").removesuffix(".npy")
        np.save(path / file, arrays.get(name, np.zeros(shape, dtype)))
    (path / "meta.json").write_text(json.dumps(meta))
    return path


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "groups"
    return write_store(path, right=features(0), wrong=features(1), small=features(2)[..., :8])


@pytest.fixture
def inspect(store, tmp_path, capsys):
    """Run the command; returns its JSON and what it printed."""

    def run(bank, *more, stores=None):
        places = [str(path) for path in stores or [store]]
        inspect_bank.main([str(bank), "--store", *places, "--out", str(tmp_path / "card.json"), *more])
        return json.loads((tmp_path / "card.json").read_text()), capsys.readouterr().out

    return run


def write_bank(path, snippets, freq):
    path.mkdir()
    torch.save(snippets, path / "bank.pth")
    torch.save(freq, path / "bank.freq")
    return path


def counts(snippets, store):
    """How many images of the store are nearest to each row."""
    unit = torch.from_numpy(np.load(store / "features" / "right.npy")[:, 0]).double()
    at = torch.cosine_similarity(unit[:, None], snippets[None].double(), dim=2).argmax(1)
    return torch.bincount(at, minlength=len(snippets)).tolist()


def test_a_bank_of_ours_gets_its_report_card(inspect, store, tmp_path):
    build_bank.main(["--store", str(store), "--encoder", "right", "--out", str(tmp_path / "b"), "--k", "100"])
    found, printed = inspect(tmp_path / "b")
    assert [one["encoder"] for one in found["encoders"]] == ["right", "wrong"], "small has another dimension"
    right, wrong = found["encoders"]
    made = found["made"]
    assert right["cosine"]["mean"] == pytest.approx(made["cosine_train"]["mean"], abs=1e-5)
    assert right["frequencies_are_its_counts"] == 1
    assert right["cosine"]["mean"] > wrong["cosine"]["mean"] + 0.2
    assert found["verdict"]["encoder"] == "right"
    assert found["verdict"]["rows"].startswith("means: ")
    assert "normalised, so that lengths tell nothing" in found["verdict"]["rows"]
    assert found["rows"]["norm"]["mean"] == pytest.approx(1, abs=1e-6)
    assert found["frequencies"]["may_count"] == f"the training images of {store}, each once"
    freq = MemoryBank.load(tmp_path / "b").freq
    assert found["frequencies"]["share_of_rows"]["one"] == pytest.approx(made["rows_of_one_image"])
    assert found["frequencies"]["share_of_draws_one"] == pytest.approx(made["draws_of_one_image"])
    assert (found["frequencies"]["sum"], found["frequencies"]["max"]) == (IMAGES, int(freq.max()))
    assert "bank.json: rule k-means" in printed
    assert "likely made by: right" in printed
    assert found["run"]["peak_memory"]["host"] > 0


def test_means_of_normalised_features_are_shorter_than_one(inspect, store, tmp_path):
    unit = torch.nn.functional.normalize(torch.from_numpy(features(0)[:, 0]).float(), dim=1)
    means = unit.view(100, 6, DIM).mean(1)
    found, _ = inspect(write_bank(tmp_path / "b", means, [6] * 100))
    assert found["verdict"]["rows"].startswith("means: at rows drawn for several images 0.0% of images")
    assert "shorter than 1" in found["verdict"]["rows"]
    norms = means.norm(dim=1)
    assert found["rows"]["norm"]["min"] == pytest.approx(norms.min().item(), rel=1e-6)
    assert found["rows"]["norm"]["median"] == pytest.approx(norms.double().quantile(0.5).item(), rel=1e-6)
    assert found["rows"]["unit"] == 0


def test_a_subset_of_images_is_told_from_means(inspect, store, tmp_path):
    chosen = torch.from_numpy(features(0)[::7, 0]).float()
    found, _ = inspect(write_bank(tmp_path / "b", chosen, counts(chosen, store)))
    assert found["verdict"]["encoder"] == "right"
    assert found["verdict"]["rows"].startswith("single images: at rows drawn for several images")
    lengths = np.linalg.norm(features(0)[:, 0].astype(np.float32), axis=1)
    assert f"the features {np.quantile(lengths, 0.5, method='lower'):.3g}" in found["verdict"]["rows"]


def test_a_bank_of_every_image(inspect, store, tmp_path):
    everything = torch.from_numpy(features(0)[:, 0])  # float16
    found, _ = inspect(write_bank(tmp_path / "b", everything, torch.ones(IMAGES, dtype=torch.int32)))
    assert found["rows"]["dtype"] == "float16"
    assert found["verdict"]["rows"].startswith("single images: 100% of images are rows, and every row is drawn once")
    assert found["encoders"][0]["frequencies_are_its_counts"] == 1


def test_with_other_images_of_the_encoder_nothing_is_claimed(inspect, tmp_path):
    """A bank of images drawn once each, compared with other images of the same groups."""
    rng = np.random.default_rng(0)
    middle = rng.normal(size=(100, 1, DIM)).repeat(6, 0)
    others = (middle + 0.5 * np.random.default_rng(9).normal(size=(IMAGES, 1, DIM))).astype(np.float16)
    found, _ = inspect(
        write_bank(tmp_path / "b", torch.from_numpy(features(0)[:, 0]).float(), [1] * IMAGES),
        stores=[write_store(tmp_path / "others", right=others)],
    )
    assert found["verdict"]["encoder"] == "right"
    assert found["verdict"]["rows"].startswith("not to be told")
    assert "the only one of this size" in found["verdict"]["because"]


def test_no_encoder_is_named_where_none_fits(inspect, store, tmp_path):
    found, _ = inspect(write_bank(tmp_path / "b", torch.randn(20, 300), [1] * 20))
    assert found["verdict"]["because"] == "no store was given with features of 300 numbers"
    bank = write_bank(tmp_path / "c", torch.from_numpy(features(5)[:3, 0]).float(), [1] * 3)
    found, printed = inspect(bank)
    assert found["verdict"]["encoder"] is None
    assert found["verdict"]["because"].startswith("too low for any")
    assert "likely made by: not known" in printed


def test_the_released_file_is_read_with_its_oddities(inspect, tmp_path):
    """One file, frequencies as a list that counts ImageNet five times, rows that are copies or nothing."""
    snippets = torch.from_numpy(features(0)[::6, 0]).float()
    snippets[[10, 20, 30]] = snippets[[0, 0, 1]]
    snippets[40], snippets[41, 3] = 0, torch.nan
    freq = [5 * 1_281_167 - 79, *[1] * 79, *[0] * 20]
    contents = {"network": {"x": torch.zeros(2)}, "memorybank": snippets, "memoryfreq": freq}
    torch.save(contents, tmp_path / "GMem.pth")
    found, printed = inspect(tmp_path / "GMem.pth")
    assert found["made"] == {}
    assert (found["rows"]["duplicates"], found["rows"]["without_direction"]) == (3, 2)
    assert found["frequencies"]["may_count"].startswith("the training images of ImageNet-1k, each 5 times")
    assert found["frequencies"]["share_of_rows"] == {"zero": 0.2, "one": 0.79}
    assert found["verdict"]["encoder"] == "right"
    assert "2 rows without a direction, 3 copies of another" in printed


def test_blocks_change_nothing_and_images_are_spread(inspect, store, tmp_path, monkeypatch):
    bank = write_bank(tmp_path / "b", torch.from_numpy(features(0)[::7, 0]).float(), [1] * 86)
    whole, _ = inspect(bank)
    right = sum(count == 1 for count in counts(torch.from_numpy(features(0)[::7, 0]).float(), store)) / 86
    assert whole["encoders"][0]["frequencies_are_its_counts"] == pytest.approx(right) != 1
    monkeypatch.setattr(inspect_bank, "ROWS", 7)
    blocks, _ = inspect(bank)
    assert blocks["rows"] == whole["rows"]
    assert blocks["encoders"][0]["cosine"] == pytest.approx(whole["encoders"][0]["cosine"], abs=1e-6)
    assert blocks["encoders"][0]["frequencies_are_its_counts"] == pytest.approx(right)
    few, _ = inspect(bank, "--images", "85")
    assert (few["encoders"][0]["images"], few["encoders"][0]["frequencies_are_its_counts"]) == (85, None)
    assert few["encoders"][0]["exact"] == pytest.approx(sum(i * IMAGES // 85 % 7 == 0 for i in range(85)) / 85)


def test_what_is_no_bank_is_named(store, tmp_path):
    with pytest.raises(ValueError, match=r"nowhere: no such file"):
        inspect_bank.main([str(tmp_path / "nowhere")])
    torch.save(torch.zeros(3, 4), tmp_path / "alone.pth")
    with pytest.raises(ValueError, match=r"alone\.pth has neither a bank inside .* nor alone\.freq beside it"):
        inspect_bank.main([str(tmp_path / "alone.pth")])
    torch.save([1, 2], tmp_path / "alone.freq")
    with pytest.raises(ValueError, match=r"alone\.pth: expected floats \(K, F\) and K frequencies"):
        inspect_bank.main([str(tmp_path / "alone.pth")])
    MemoryBank(torch.randn(5, DIM), [1] * 5).save(tmp_path / "b" / "bank.pth")
    torch.save([2] * 5, tmp_path / "b" / "bank.freq")
    with pytest.raises(ValueError, match=r"bank\.freq is not the file that bank\.json describes"):
        inspect_bank.main([str(tmp_path / "b")])
    with pytest.raises(SystemExit):
        inspect_bank.parse(["b", "--images", "0"])
