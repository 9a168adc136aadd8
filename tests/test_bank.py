"""The bank against SciPy, NumPy and brute force, on disk in the published layout, and what it refuses."""

import re

import numpy as np
import pytest
import torch
from scipy.stats import chisquare, norm

from memory.bank import MemoryBank
from memory.kmeans import normalised


def bank_of(freq, f=6, seed=0):
    return MemoryBank(torch.randn(len(freq), f, generator=torch.Generator().manual_seed(seed)) * 3, freq)


def noise_of_mean(values, shape=(4, 8, 8)):
    """Noises whose mean times the root of their size is `values`: constant ones."""
    entries = np.prod(shape)
    return (torch.as_tensor(values, dtype=torch.float64) / entries**0.5)[:, None, None, None].expand(-1, *shape)


def test_noise_points_to_the_quartiles_of_the_normal_distribution():
    bank = bank_of([5, 5, 5, 5])
    quartiles = norm.ppf([0.25, 0.5, 0.75])
    edges = np.sort(np.concatenate([quartiles - 1e-9, quartiles + 1e-9]))
    assert bank.indices_from_noise(noise_of_mean(edges)).tolist() == [0, 1, 1, 2, 2, 3]


def test_noise_indices_equal_the_published_rule_in_float64():
    rng = np.random.default_rng(0)
    freq = rng.integers(0, 5, size=1000)
    z = torch.randn(500, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    u = norm.cdf(z.double().numpy().reshape(500, -1).mean(1) * 16)
    reference = np.array([(np.cumsum(freq) <= value * freq.sum()).sum() for value in u])
    bank = bank_of(freq)
    index = bank.indices_from_noise(z)
    np.testing.assert_array_equal(index.numpy(), reference)
    assert index.dtype == torch.long
    assert (bank.freq[index] > 0).all()
    alone = torch.cat([bank.indices_from_noise(one[None]) for one in z[:20]])
    assert torch.equal(alone, index[:20])


def test_noise_never_points_to_a_row_of_frequency_zero():
    bank = bank_of([0, 0, 3, 0, 1, 0, 0])
    assert bank.indices_from_noise(noise_of_mean([-50.0, -8.0, 0.0, 0.6, 0.7, 8.0, 9.0, 50.0])).tolist() == [
        2, 2, 2, 2, 4, 4, 4, 4,
    ]  # fmt: skip
    assert bank_of([7]).indices_from_noise(noise_of_mean([-50.0, 50.0])).tolist() == [0, 0]
    assert bank.indices_from_noise(torch.empty(0, 4, 8, 8)).shape == (0,)


@pytest.mark.parametrize("draw", ["noise", "sample"])
def test_rows_are_drawn_in_proportion_to_their_frequency(draw):
    bank = bank_of([1, 0, 2, 3, 10])
    generator = torch.Generator().manual_seed(0)
    if draw == "noise":
        index = bank.indices_from_noise(torch.randn(20_000, 1, 2, 2, generator=generator))
    else:
        index = bank.sample(20_000, generator)
    counts = torch.bincount(index, minlength=5).numpy()
    assert counts[1] == 0
    assert chisquare(counts[[0, 2, 3, 4]], 20_000 * np.array([1, 2, 3, 10]) / 16).pvalue > 1e-3


def test_uniform_numbers_draw_each_row_as_often_as_its_frequency_says():
    freq = torch.tensor([1, 0, 2, 0, 3])
    low = torch.arange(6, dtype=torch.float64) / 6
    for u in (low + 1e-9, low + 1 / 6 - 1e-9):  # both ends of each sixth
        assert bank_of(freq).indices_from_uniform(u).tolist() == [0, 2, 2, 4, 4, 4]
    assert bank_of(freq).indices_from_uniform(torch.zeros(1).double()).tolist() == [0]


def test_sample_repeats_with_its_generator():
    bank = bank_of([1, 2, 3])
    one, other = (bank.sample(50, torch.Generator().manual_seed(5)) for _ in range(2))
    assert torch.equal(one, other)


def test_frequencies_beyond_float32_keep_their_rows():
    bank = bank_of([2**40, 1, 2**40])
    middle = noise_of_mean([0.0])  # u = 0.5 lands in the middle row, whose share is 5e-13
    assert bank.indices_from_noise(middle).tolist() == [1]


def test_nearest_is_the_brute_force_cosine_and_the_lowest_of_equals():
    bank = bank_of([1] * 40, seed=2)
    bank.snippets[25] = bank.snippets[3] * 2
    features = torch.randn(300, 6, generator=torch.Generator().manual_seed(3)).half()
    features[:5] = bank.snippets[3].half()
    cosine = torch.nn.functional.cosine_similarity(features.double()[:, None], bank.snippets.double()[None], dim=2)
    found = bank.nearest(features)
    assert torch.equal(found, cosine.round(decimals=12).argmax(1))
    assert not (found == 25).any()


def test_indexing_returns_unit_rows():
    bank = bank_of([1, 2, 3, 4])
    assert torch.equal(bank[[2, 0]], normalised(bank.snippets[[2, 0]]))
    assert torch.allclose(bank[torch.tensor([3, 3, 1])].norm(dim=1), torch.ones(3), atol=1e-6)
    assert torch.equal(bank[3], bank[[3]][0])
    assert (len(bank), bank.dim) == (4, 6)


def test_saved_bank_loads_from_file_or_folder_and_repeats_its_bytes(tmp_path):
    bank = bank_of([1, 0, 4])
    bank.assignment, bank.meta = torch.tensor([[0, 2], [2, 2]], dtype=torch.int32), {"encoder": "tiny"}
    bank.save(tmp_path / "one" / "bank.pth")
    for path in (tmp_path / "one", tmp_path / "one" / "bank.pth"):
        loaded = MemoryBank.load(path)
        assert torch.equal(loaded.snippets, bank.snippets)
        assert loaded.freq.tolist() == [1, 0, 4]
        assert torch.equal(loaded.assignment, bank.assignment)
        assert loaded.assignment.dtype == torch.int32
        assert loaded.meta["encoder"] == "tiny"
        assert set(loaded.meta["sha256"]) == {"bank.pth", "bank.freq", "bank.assign"}
        assert loaded.path == tmp_path / "one" / "bank.pth"
    loaded.save(tmp_path / "two" / "bank.pth")
    for file in (tmp_path / "one").iterdir():
        assert file.read_bytes() == (tmp_path / "two" / file.name).read_bytes()


@pytest.mark.parametrize(
    "freq",
    [
        [3, 1],
        torch.tensor([3, 1]),
        torch.tensor([3.0, 1.0]),
        torch.tensor([3, 1]).int(),
        np.array([3, 1]),
        [np.int64(3), np.int64(1)],
    ],
)
def test_published_files_are_read(tmp_path, freq):
    torch.save(torch.eye(2, 5), tmp_path / "bank.pth")
    torch.save(freq, tmp_path / "bank.freq")
    bank = MemoryBank.load(tmp_path)
    assert bank.freq.tolist() == [3, 1]
    assert bank.freq.dtype == torch.long
    assert bank.assignment is None
    assert bank.meta == {}


def test_snippets_and_features_that_carry_gradients_are_plain_numbers(tmp_path):
    """As an nn.Parameter, saved by whoever trained a bank, or an encoder called outside of no_grad."""
    bank = bank_of([1, 2, 3])
    torch.save(torch.nn.Parameter(bank.snippets), tmp_path / "bank.pth")
    torch.save([1, 2, 3], tmp_path / "bank.freq")
    loaded = MemoryBank.load(tmp_path)
    assert torch.equal(loaded[[2, 0]], bank[[2, 0]])
    assert loaded.nearest(torch.nn.Parameter(bank.snippets * 3)).tolist() == [0, 1, 2]
    loaded.save(tmp_path / "again" / "bank.pth")
    assert not torch.load(tmp_path / "again" / "bank.pth", weights_only=True).requires_grad


def test_saving_over_a_bank_leaves_none_of_its_siblings(tmp_path):
    bank = bank_of([1, 1])
    bank.assignment = torch.zeros(3, 1, dtype=torch.int32)
    bank.save(tmp_path / "bank.pth")
    bank_of([2, 2, 2]).save(tmp_path / "bank.pth")
    assert MemoryBank.load(tmp_path).assignment is None
    assert len(MemoryBank.load(tmp_path)) == 3


def test_a_full_disk_leaves_the_earlier_bank_whole(tmp_path, monkeypatch):
    bank_of([1, 1]).save(tmp_path / "bank.pth")
    before = {file: file.read_bytes() for file in tmp_path.iterdir()}
    save = torch.save

    def full(value, stream):
        save(value, stream)
        if isinstance(value, list):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="No space left"):
        bank_of([2, 2, 2]).save(tmp_path / "bank.pth")
    assert {file: file.read_bytes() for file in tmp_path.iterdir()} == before


SNIPPETS = torch.eye(3, 4)
NAN, ZERO = SNIPPETS.clone(), SNIPPETS.clone()
NAN[1, 2], ZERO[2] = float("nan"), 0.0


@pytest.mark.parametrize(
    ("snippets", "freq", "assignment", "message"),
    [
        (SNIPPETS, None, None, r"bank.freq is missing"),
        (None, [1, 1, 1], None, r"no bank at .*bank.pth"),
        (SNIPPETS, [1, 1], None, r"bank.freq: .*\(2,\) does not fit the 3 snippets"),
        (SNIPPETS, [[1, 1, 1]], None, r"bank.freq: .*\(1, 3\) does not fit"),
        (SNIPPETS, [1, -1, 1], None, r"bank.freq: .*not all 0, got -1 to 1"),
        (SNIPPETS, [0, 0, 0], None, r"bank.freq: .*not all 0, got 0 to 0"),
        (SNIPPETS, [1, 0.5, 2], None, r"bank.freq: expected integers, got torch.float32"),
        (SNIPPETS, torch.tensor([1, float("nan"), 2]), None, r"bank.freq: expected integers"),
        (SNIPPETS, {"freq": 1}, None, r"bank.freq: expected a list or tensor of K integers, got dict"),
        (NAN, [1, 1, 1], None, r"bank.pth: .*\(rows 1\)"),
        (ZERO, [1, 1, 1], None, r"bank.pth: .*\(rows 2\)"),
        (SNIPPETS[0], [1, 1, 1, 1], None, r"bank.pth: expected one float tensor \(K, F\), got .*\(4,\)"),
        (SNIPPETS.long(), [1, 1, 1], None, r"bank.pth: expected one float tensor"),
        ({"network": {}, "memorybank": SNIPPETS}, [1, 1, 1], None, r"bank.pth: expected one float tensor .*dict; pass"),
        (SNIPPETS, [1, 1, 1], torch.tensor([[3]]), r"assignment of .*bank.pth: rows 3 to 3 of a bank of 3"),
        (SNIPPETS, [1, 1, 1], torch.tensor([[0], [3]]), r"assignment of .*bank.pth: rows 0 to 3 of a bank of 3"),
        (SNIPPETS, [1, 1, 1], torch.tensor([[-1], [2]]), r"assignment of .*bank.pth: rows -1 to 2 of a bank of 3"),
        (SNIPPETS, [1, 1, 1], torch.tensor([0, 1]), r"assignment of .*expected integers \(N, V\)"),
        (SNIPPETS, [1, 1, 1], torch.tensor([[0.0]]), r"assignment of .*expected integers \(N, V\)"),
    ],
)
def test_a_bad_bank_is_refused_by_the_name_of_its_file(tmp_path, snippets, freq, assignment, message):
    for name, value in (("bank.pth", snippets), ("bank.freq", freq), ("bank.assign", assignment)):
        if value is not None:
            torch.save(value, tmp_path / name)
    with pytest.raises(ValueError, match=message):
        MemoryBank.load(tmp_path)


def test_another_file_of_a_bank_in_its_place_says_which_to_pass(tmp_path):
    bank_of([1, 2, 3]).save(tmp_path / "bank.pth")
    message = r"bank\.freq: expected one float tensor \(K, F\), got list; pass the bank's folder, or its bank\.pth$"
    with pytest.raises(ValueError, match=message):
        MemoryBank.load(tmp_path / "bank.freq")
    with pytest.raises(ValueError, match=r"^snippets: expected one float tensor \(K, F\), got list$"):
        MemoryBank([1, 2, 3], [1, 2, 3])


def test_rows_alone_are_no_bank_and_become_one_as_the_message_says(tmp_path):
    rows = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)
    np.save(tmp_path / "own.npy", rows)
    with pytest.raises(ValueError, match=r"own\.npy .*bank\.pth with bank\.freq beside it.*build_bank") as refused:
        MemoryBank.load(tmp_path / "own.npy")
    recipe = re.search(r"MemoryBank\(.*\.save\(.*?\)", str(refused.value))[0]
    eval(recipe, {"MemoryBank": MemoryBank, "rows": torch.from_numpy(rows)}, {"DIR": tmp_path})
    made = MemoryBank.load(tmp_path)
    assert np.array_equal(made.snippets, rows)
    assert made.freq.tolist() == [1, 1, 1]


def test_a_truncated_file_is_named(tmp_path):
    bank_of([1, 2, 3]).save(tmp_path / "bank.pth")
    whole = (tmp_path / "bank.pth").read_bytes()
    for size in (0, 100, len(whole) - 50):
        (tmp_path / "bank.pth").write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"bank.pth cannot be read as a torch.save file of plain values"):
            MemoryBank.load(tmp_path)


def test_features_of_another_dimension_or_without_direction_are_refused():
    bank = bank_of([1, 2, 3])
    with pytest.raises(ValueError, match=r"features: expected \(B, 6\) for this bank, got \(2, 5\)"):
        bank.nearest(torch.ones(2, 5))
    with pytest.raises(ValueError, match=r"features: .*\(rows 1\)"):
        bank.nearest(torch.tensor([[1.0] * 6, [0.0] * 6]))


@pytest.mark.gpu
def test_gpu_and_cpu_choose_the_same_rows():
    bank = bank_of(np.random.default_rng(0).integers(0, 4, size=640_000), f=32)
    z = torch.randn(4000, 4, 32, 32, generator=torch.Generator().manual_seed(0))
    index = bank.indices_from_noise(z)
    gpu = bank.to("cuda")
    assert torch.equal(gpu.indices_from_noise(z.cuda()).cpu(), index)
    assert torch.equal(gpu[index].cpu(), bank[index])
    features = torch.randn(50, 32, generator=torch.Generator().manual_seed(1))
    assert torch.equal(gpu.nearest(features).cpu(), bank.nearest(features))
