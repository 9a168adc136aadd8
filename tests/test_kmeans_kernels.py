"""The Triton kernels, and what is made of them, against the plain path and brute force: compiled on a GPU, and, on a
machine without one, by Triton's interpreter in a process of its own."""

import contextlib
import os
import subprocess
import sys
import warnings
from unittest import mock

import pytest
import torch

import memory.kmeans
from memory.kmeans import HOPPER, assign, assign_plain, kmeans, normalised
from memory.trust import distrusted


def clumps(n, f, centres, spread=0.5, seed=0):
    """Features (n, f) around `centres` random points."""
    draw = torch.Generator().manual_seed(seed)
    middle = torch.randn(centres, f, generator=draw)[torch.randint(centres, (n,), generator=draw)]
    return middle + spread * torch.randn(n, f, generator=draw)


def duplicates(n, f):
    """Clumps with many equal rows: ties, empty clusters, restarts."""
    features = clumps(n, f, n // 10)
    features[::7] = features[0]
    return features


def near_copies(n, f):
    """Groups of 5 rows that float16 cannot tell from each other."""
    draw = torch.Generator().manual_seed(3)
    return torch.randn(n // 5, f, generator=draw).repeat(5, 1) + 1e-5 * torch.randn(n // 5 * 5, f, generator=draw)


RUNS = {
    "clumps": (clumps(400, 96, 40), 180, 3),
    "noise": (clumps(300, 40, 300, 1.0), 150, 2),
    "duplicates": (duplicates(300, 70), 150, 3),
    "near copies": (near_copies(200, 33), 80, 3),
    "every row a centroid": (clumps(300, 100, 300), 300, 1),
    "few centroids of few dimensions": (clumps(200, 3, 20), 5, 4),
    "one centroid": (clumps(200, 8, 5), 1, 2),
    "opposite to all centroids": (torch.cat([clumps(64, 16, 1), -clumps(64, 16, 1)]), 20, 2),
}


def forced(on):
    """Take or leave the kernels whatever the device."""
    return mock.patch.object(memory.kmeans, "fused", return_value=on)


@contextlib.contextmanager
def trusting():
    """As in a process in which no kernel has failed yet."""
    before = set(distrusted)
    distrusted.clear()
    yield
    distrusted.clear()
    distrusted.update(before)


def check_tiles(device):
    """The best tiles are those of float64, at once, in windows or in splits, by the portable kernel and Hopper's."""
    import memory.kernels
    from memory.fused import halves

    rows, columns = (halves(normalised(clumps(n, 130, n).to(device))).matrix for n in (300, 2100))
    width = memory.kernels.shape_for(rows.device).columns
    padded = torch.cat([columns, columns[-1:].expand(-len(columns) % width, -1)])
    maxima = (rows.double() @ padded.double().T).unflatten(1, (-1, width)).amax(2)  # (300, tiles)
    expected = maxima.topk(4)
    for own in {False, memory.kernels.hopper(rows.device)}:
        for waves, window in ((0, 2**30), (0, 2 * width * 2 * 192), (8, 1), (1000, 1)):  # once, windows of two, splits
            with mock.patch.multiple(memory.kernels, WAVES=waves, WINDOW=window, hopper=lambda device, own=own: own):
                values, tiles = memory.kernels.best_tiles(rows, columns)
            torch.testing.assert_close(values.T.double(), expected.values, rtol=0, atol=2e-6)
            assert (expected.indices[:, :3] == tiles.T).double().mean() > 0.999


def check_runs(device):
    """k-means gives the same bits with the kernels and without, its bounds hold, and it searches less and less."""
    for name, (features, k, passes) in RUNS.items():
        features = features.to(device)
        with forced(False):
            plain = kmeans(features, k, passes)
        with forced(True), trusting():
            ours = kmeans(features, k, passes)
            assert not distrusted
            given = kmeans(features, k, passes, init=plain.centroids)  # nothing is guessed here
        assert torch.equal(ours.centroids, plain.centroids), name
        assert torch.equal(ours.assignment, plain.assignment), name
        assert torch.equal(ours.counts, plain.counts), name
        assert ours.inertia == plain.inertia, name
        with forced(False):
            assert torch.equal(given.assignment, kmeans(features, k, passes, init=plain.centroids).assignment), name


def check_bounds(device):
    """What `find` promises, and each row's bound on all other centroids, by brute force."""
    from memory.fused import Search, find, halves, sketch

    features, centroids = normalised(clumps(400, 80, 40).to(device)), normalised(clumps(300, 80, 40, seed=5).to(device))
    exact = features.double() @ centroids.double().T
    assert (sketch(features).double() @ sketch(centroids).double().T >= exact - 1e-6).all()
    rows, columns = torch.arange(10, 400, device=device), torch.arange(3, 290, device=device)
    inside = exact[rows][:, columns]
    for floor in (torch.full((390,), -torch.inf, device=device), inside.double().quantile(0.99, dim=1)):
        found = find(halves(features), rows, halves(centroids), columns, floor)
        listed = torch.zeros_like(exact, dtype=torch.bool)
        listed[found.row, found.column] = True
        needed = (inside >= inside.amax(1, keepdim=True)) & (inside >= floor[:, None])
        assert (listed[rows][:, columns] | found.crowded[:, None])[needed].all()
        assert listed.sum() <= 1.2 * len(rows)  # rounding to float16 leaves few columns in doubt
        assert (inside <= found.bound[:, None]).all()
        has = found.only >= 0
        rest = exact[rows].scatter(1, found.only.clamp(min=0)[:, None], -torch.inf)[:, columns]
        assert (rest[has] <= found.bound_others[has, None]).all()
        assert (found.bound_others[has] < found.bound[has]).any()

    assert [part.shape for part in Search(features[:0])(centroids)] == [(0,), (0,)]  # a process without rows
    copies = normalised(
        features[:120].repeat(6, 1) + 1e-5 * torch.randn(720, 80, device=device)
    )  # a tile or more apart
    with forced(True):
        assert torch.equal(assign(features[:120], copies), assign_plain(features[:120], copies))

    centroids[:100] = features[:100]
    search, moving = Search(features), centroids.clone()
    for step in range(4):
        label, cosine = search(moving.clone())
        exact = features.double() @ moving.double().T
        assert torch.equal(label, exact.argmax(1))
        assert torch.allclose(cosine, exact.amax(1), rtol=0, atol=1e-14)
        assert (exact.scatter(1, label[:, None], -torch.inf) <= search.others[:, None]).all()
        moving[100 + step :: 5] = normalised(moving[100 + step :: 5] + 0.1 * torch.randn_like(moving[100 + step :: 5]))
        moving[200 + step] = normalised(features[step : step + 1] + 0.02 * torch.randn_like(features[:1]))[0]


def check_skipping(device):
    """A centroid that moved is all that is searched, except by rows that it left behind; twins by their sketches."""
    import memory.fused

    features = normalised(clumps(400, 32, 400).to(device))
    search, centroids = memory.fused.Search(features), features[:200].clone()
    label, _ = search(centroids.clone())
    asked = []

    def counted(*args, find=memory.fused.find, **more):
        asked.append((len(args[1]), len(args[3])))
        return find(*args, **more)

    with mock.patch.object(memory.fused, "find", counted):
        assert torch.equal(search(centroids.clone())[0], label)
        assert asked == []
        centroids[7] = -centroids[7]
        assert torch.equal(search(centroids.clone())[0], assign_plain(features, centroids))
        left = (label == 7).nonzero().squeeze(1)
        assert asked == [(199, 1), (201, 1), (len(left), 199)]
        centroids[3] = features[50]  # as near as the centroid 50, and before it
        found = search(centroids)[0]
        assert found[50] == 3
        assert torch.equal(found, assign_plain(features, centroids))
        asked.clear()
        with forced(True):
            kmeans(features, 150, 0)  # the rows that it starts from are centroids
        assert asked == [(150, 150), (250, 150)]


def check_error(device):
    """Scores stay inside the bound where rounding hurts most: equal signs, equal parts, one large part."""
    from memory.fused import _error, halves
    from memory.kernels import best_tiles

    width = 768
    same = torch.ones(1, width) + 1e-3 * torch.rand(64, width, generator=torch.Generator().manual_seed(0))
    for rows in (
        same,
        torch.rand(64, width, generator=torch.Generator().manual_seed(1)),
        clumps(64, width, 64),
        torch.eye(64, width) + 0.01,
    ):
        unit = normalised(rows.to(device))
        values, _ = best_tiles(halves(unit).matrix, halves(unit).matrix)
        exact = (unit.double() @ unit.double().T).amax(1)
        assert (values[0] - exact).abs().amax() <= _error(halves(unit), halves(unit))


def second_tiles(right):
    """`best_tiles` without the best tile of every seventh row."""

    def wrong(rows, columns):
        values, tiles = right(rows, columns)
        values[:3, ::7], tiles[:2, ::7] = values[1:, ::7].clone(), tiles[1:, ::7].clone()
        return values, tiles

    return wrong


def last_zero(right):
    """`cluster_sums` without the last component."""

    def wrong(*given):
        sums = right(*given)
        sums[:, -1] = 0
        return sums

    return wrong


def check_wrong(device):
    """Kernels that err in some rows or sums are noticed, told of once, and change nothing."""
    import memory.fused
    import memory.kernels

    features = clumps(300, 40, 300, 1.0).to(device)
    with forced(False):
        plain = kmeans(features, 270, 2)
    searches = (
        ["memory/hopper.py", "memory/fused.py"] if memory.kernels.hopper(features.device) else ["memory/fused.py"]
    )
    for module, name, wrong, files, told in (
        (memory.fused, "best_tiles", second_tiles, searches, "300 rows × 270 centroids of 40, the cosine"),
        (memory.kernels, "cluster_sums", last_zero, ["memory/kernels.py"], "300 rows of 40 in"),
    ):
        broken = mock.patch.object(module, name, wrong(getattr(module, name)))
        with forced(True), trusting(), broken, warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            ours = kmeans(features, 270, 2)
        for warning, file in zip(warned, files, strict=True):
            assert f"{file} are wrong: {told}" in str(warning.message)
        assert torch.equal(ours.centroids, plain.centroids)
        assert torch.equal(ours.assignment, plain.assignment)


CHECKS = [check_tiles, check_runs, check_bounds, check_skipping, check_error, check_wrong]


@pytest.mark.gpu
@pytest.mark.parametrize("check", CHECKS)
def test_compiled_for_a_gpu(check):
    check("cuda")


@pytest.mark.gpu
def test_large_and_small_searches_on_a_gpu():
    centroids = normalised(clumps(20_000, 200, 5000).cuda())
    for rows in (3, 300, 40_000):
        features = normalised(clumps(rows, 200, 5000, seed=7).cuda())
        assert torch.equal(assign(features, centroids), assign_plain(features, centroids))


@pytest.mark.skipif(torch.cuda.is_available(), reason="a machine with a GPU runs the compiled kernels instead")
def test_in_tritons_interpreter(root):
    program = (
        "import torch, test_kmeans_kernels as tests; torch.set_num_threads(1); [check('cpu') for check in tests.CHECKS]"
    )
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": f"{root}{os.pathsep}{root / 'tests'}"}
    subprocess.run([sys.executable, "-c", program], env=environment, check=True, timeout=300)


def test_the_plain_path_is_taken_where_something_is_missing(monkeypatch):
    on_gpu = torch.device("cuda")

    def machine(capability=(9, 0), compiler="/usr/bin/gcc", triton=True):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(memory.kmeans.shutil, "which", lambda name: compiler)
        monkeypatch.setattr(memory.kmeans.importlib.util, "find_spec", lambda name: triton or None)
        monkeypatch.delenv("CC", raising=False)

    machine()
    assert memory.kmeans.fused(on_gpu)
    assert not memory.kmeans.fused(torch.device("cpu"))
    for missing in ({"capability": (8, 9)}, {"compiler": None}, {"triton": False}):
        machine(**missing)
        assert not memory.kmeans.fused(on_gpu), missing


class Missing:
    """A search on a GPU that lacks something."""

    asked = 0

    def __init__(self, features):
        Missing.asked += 1
        raise RuntimeError("out of resource: shared memory")


def test_a_search_that_fails_is_not_tried_again():
    pytest.importorskip("triton")
    features, centroids = normalised(clumps(200, 16, 20)), normalised(clumps(30, 16, 20))
    told = pytest.warns(UserWarning, match="shared memory; k-means takes a slower way")
    with forced(True), trusting(), mock.patch("memory.fused.Search", Missing), told as warned:
        found = [assign(features, centroids) for _ in range(2)]
    assert len(warned) == Missing.asked == 1
    assert all(torch.equal(labels, assign_plain(features, centroids)) for labels in found)


def test_searches_are_counted_for_the_comparison(monkeypatch):
    fused = pytest.importorskip("memory.fused")
    features, asked = normalised(clumps(200, 16, 20)), []
    monkeypatch.setattr(fused, "Search", lambda features: lambda centroids, guess: (None, None))
    monkeypatch.setattr(fused, "check_labels", lambda *given: asked.append(given[3]))
    with forced(True), trusting():
        search = memory.kmeans.nearest(features)
        for _ in range(3):
            search(features[:20])
    assert asked == [0, 1, 2]


def test_where_hoppers_own_kernel_errs_the_portable_one_searches(monkeypatch):
    fused, kernels = (pytest.importorskip(f"memory.{name}") for name in ("fused", "kernels"))
    features, centroids = normalised(clumps(200, 16, 20)), normalised(clumps(30, 16, 20))
    asked, hopper = [], kernels.hopper

    def search(centroids, guess):
        asked.append(kernels.hopper(features.device))
        label = assign_plain(features, centroids)
        return (torch.zeros_like(label) if asked[-1] else label), None

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(kernels, "hopper", lambda device: hopper(mock.Mock(type="cuda")))
    monkeypatch.setattr(kernels.triton, "__version__", "3.6.0")
    monkeypatch.setattr(fused, "Search", lambda features: search)
    with forced(True), trusting():
        with pytest.warns(UserWarning, match="memory/hopper.py are wrong") as warned:
            labels = assign(features, centroids)
        assert distrusted == {HOPPER}
    assert torch.equal(labels, assign_plain(features, centroids))
    assert asked == [True, False]
    assert len(warned) == 1


@pytest.mark.parametrize(("rows", "searches"), [(0, 0), (1, 3), (63, 1), (400, 0), (400, 1), (400, 60)])
def test_labels_are_compared_all_over_the_rows(rows, searches):
    """Right ones pass; an error in one row of eight is seen at any size, whichever rows are looked at."""
    fused = pytest.importorskip("memory.fused")
    features, centroids = normalised(clumps(rows, 16, 20)), normalised(clumps(30, 16, 20))
    label = assign_plain(features, centroids)
    fused.check_labels(features, centroids, label, searches)
    label[::8] = (features @ centroids.T).topk(2).indices[::8, 1]
    if rows:
        with pytest.raises(fused.Disagreement):
            fused.check_labels(features, centroids, label, searches)


def test_the_rows_that_are_compared_lie_at_every_place_of_a_tile():
    """256 of ImageNet's in the first search and 64 in others: the cost is a fixed share of theirs."""
    fused = pytest.importorskip("memory.fused")
    seen = []

    def rows_of(features, centroids, label, rows):
        seen.append(rows)
        return torch.ones(len(rows), dtype=torch.float64)

    features, centroids = torch.zeros(1_281_167, 1), torch.zeros(2, 1)
    with mock.patch.object(fused, "cosines", rows_of):
        for searches in (0, 1):
            fused.check_labels(features, centroids, torch.zeros(len(features), dtype=torch.long), searches)
    assert [len(rows) for rows in seen] == [256, 64]
    assert set((seen[0] % 128).tolist()) == set(range(128))
    assert seen[1][0] == 1
