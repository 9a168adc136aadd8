"""k-means against float64 and integer arithmetic and scikit-learn, and what it promises about bits and inertia."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.cluster import KMeans
from torch.utils._python_dispatch import TorchDispatchMode

import memory.kmeans
from benchmarks import bench_kmeans
from memory.kmeans import assign, cosines, kmeans, normalised, ordered_sum


def clumps(n, f, centres, spread=0.5, seed=0):
    """Features (n, f) around `centres` random points."""
    draw = torch.Generator().manual_seed(seed)
    middle = torch.randn(centres, f, generator=draw)[torch.randint(centres, (n,), generator=draw)]
    return middle + spread * torch.randn(n, f, generator=draw)


def integers(rows):
    """Normalised rows as exact integers, in units of 2⁻²⁴."""
    return (rows.double() * 2**24).long().numpy()


def test_normalised_rows_are_unit_length_on_the_grid_and_do_not_depend_on_scale_or_neighbours():
    rows = clumps(100, 37, 5).half()
    unit = normalised(rows)
    reference = rows.double() / rows.double().norm(dim=1, keepdim=True)
    assert (unit.double() - reference).abs().max() <= 2**-25
    assert torch.equal(unit.double() * 2**24, (unit.double() * 2**24).round())
    assert torch.equal(normalised(rows.float() * 4)[17:18], normalised(rows[17:18]))
    assert not torch.signbit(normalised(torch.tensor([[1.0, -1e-20]]))).any()  # one zero: files compare byte by byte


def test_features_that_carry_gradients_are_plain_numbers():
    features = clumps(40, 5, 3)
    plain, carrying = kmeans(features, 3, 2), kmeans(features.clone().requires_grad_(), 3, 2)
    assert torch.equal(plain.centroids, carrying.centroids)
    assert not carrying.centroids.requires_grad


def test_ordered_sum_is_a_sum_whatever_the_width():
    for width in (1, 2, 3, 7, 768, 1000):
        values = torch.randn(3, width, dtype=torch.float64)
        assert torch.allclose(ordered_sum(values), values.sum(-1), rtol=0, atol=1e-12)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_other_settings_of_float32_products_neither_disturb_nor_change(device):
    """As several commands in one process leave them: PyTorch refuses to name the precision after the last of these."""
    backends = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul
    before = [backend.fp32_precision for backend in backends]
    features = clumps(300, 64, 9).to(device)
    expected = kmeans(features, 9, 2)
    torch.set_float32_matmul_precision("medium")
    for allowed in (True, False):
        backends[0].allow_tf32 = allowed
        set_to = [backend.fp32_precision for backend in backends]
        found = kmeans(features, 9, 2)
        assert torch.equal(found.centroids, expected.centroids)
        assert [backend.fp32_precision for backend in backends] == set_to
    torch.set_float32_matmul_precision("highest")
    for backend, precision in zip(backends, before, strict=True):
        backend.fp32_precision = precision


def test_passes_equal_lloyds_algorithm_written_out_in_float64():
    features, k = clumps(400, 12, 9), 9
    centres = torch.randn(k, 12, generator=torch.Generator().manual_seed(3))
    result = kmeans(features, k, 4, init=centres)
    x = features.double().numpy()
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    c = centres.double().numpy()
    c /= np.linalg.norm(c, axis=1, keepdims=True)
    inertia = []
    for _ in range(4):
        nearest = (x @ c.T).argmax(1)
        assert len(set(nearest)) == k  # no restarts in this reference
        c = np.stack([x[nearest == j].sum(0) for j in range(k)])
        c /= np.linalg.norm(c, axis=1, keepdims=True)
        inertia.append((2 - 2 * (x @ c.T).max(1)).sum())
    np.testing.assert_allclose(result.centroids.numpy(), c, atol=1e-6)
    np.testing.assert_allclose(result.inertia, inertia, rtol=1e-6)
    np.testing.assert_array_equal(result.assignment.numpy(), (x @ c.T).argmax(1))
    assert torch.equal(result.counts, torch.bincount(result.assignment, minlength=k))


def test_assignment_is_exact_where_float32_cannot_tell_and_ties_go_to_the_lowest(monkeypatch):
    monkeypatch.setattr(memory.kmeans, "BLOCK", {"cpu": (30, 40)})  # equal and near rows in different blocks
    base = normalised(clumps(50, 64, 50))
    steps = torch.randint(-1, 2, (20, 50, 64), generator=torch.Generator().manual_seed(1)) / 2**24
    centroids = (base + steps).reshape(-1, 64)  # twenty near copies of each
    centroids = torch.cat([centroids, centroids.flip(0)])  # and every one of them twice
    features = normalised(clumps(50, 64, 50) + 0.3 * torch.randn(50, 64, generator=torch.Generator().manual_seed(2)))
    exact = integers(features) @ integers(centroids).T
    found = assign(features, centroids).numpy()
    np.testing.assert_array_equal(found, exact.argmax(1))  # NumPy, too, returns the first of equals
    assert ((features @ centroids.T).argmax(1).numpy() != found).any()  # plain float32 gets some wrong
    np.testing.assert_array_equal(
        (cosines(features, centroids, torch.from_numpy(found)) * 2**48).long().numpy(), exact.max(1)
    )


def test_near_rows_of_one_block_are_told_apart():
    """No two are equal, so that the runner-up in the same block alone tells that a row is in doubt."""
    base = torch.randn(64, generator=torch.Generator().manual_seed(0))
    centroids = normalised(base + 1e-6 * torch.randn(40, 64, generator=torch.Generator().manual_seed(1)))
    features = normalised(base + 0.3 * torch.randn(500, 64, generator=torch.Generator().manual_seed(2)))
    exact = (integers(features) @ integers(centroids).T).argmax(1)
    assert ((features @ centroids.T).argmax(1).numpy() != exact).any()
    np.testing.assert_array_equal(assign(features, centroids).numpy(), exact)


def test_the_largest_error_of_a_float32_product_is_in_doubt(monkeypatch):
    """Two scores, each off by the bound of F·2⁻²⁴ in the worse direction, and rows fewer than features."""
    best_two, bound = memory.kmeans._best_two, 64 / 2**24

    def worst(features, centroids, columns):
        best, second, index = best_two(features, centroids, columns)
        return (second + bound, best - bound, 1 - index) if features.dtype == torch.float32 else (best, second, index)

    monkeypatch.setattr(memory.kmeans, "_best_two", worst)
    centroids = normalised(torch.eye(2, 64) + torch.tensor([[1.0], [1 + 2e-6]]) * torch.eye(64)[5])
    features = normalised(torch.eye(64)[5:6] + torch.eye(64)[7:8])
    gap = (features.double() @ centroids.double().T).diff().abs().item()
    assert 0 < gap < 2 * bound
    assert assign(features, centroids).tolist() == [1]


def test_results_do_not_depend_on_block_sizes(monkeypatch):
    features = clumps(300, 24, 30)
    features[::7] = features[0]  # duplicates: equal centroids, empty clusters, restarts
    whole = kmeans(features, 50, 3, seed=4)
    monkeypatch.setattr(memory.kmeans, "BLOCK", {"cpu": (67, 23)})
    monkeypatch.setattr(memory.kmeans, "ROWS", 41)
    blocks = kmeans(features, 50, 3, seed=4)
    assert torch.equal(whole.centroids, blocks.centroids)
    assert torch.equal(whole.assignment, blocks.assignment)
    assert whole.inertia == blocks.inertia


def test_features_and_order_decide_nothing_but_the_labels_of_rows():
    features, init = clumps(300, 16, 20), clumps(25, 16, 25, seed=9)
    order = torch.randperm(300, generator=torch.Generator().manual_seed(0))
    one, other = kmeans(features, 25, 3, init=init), kmeans(features[order], 25, 3, init=init)
    assert torch.equal(one.centroids, other.centroids)  # exact sums know no order
    assert torch.equal(one.assignment[order], other.assignment)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 40), st.integers(1, 3), st.floats(0.05, 1.0))
def test_inertia_never_rises_whatever_the_data(seed, n, f, share):
    draw = torch.Generator().manual_seed(seed)
    features = torch.randint(-2, 3, (n, f), generator=draw).float()  # many duplicates and opposites
    features[~features.any(1)] = 1.0
    k = max(1, int(share * n))
    result = kmeans(features, k, 8, seed=seed)
    assert all(later <= earlier for earlier, later in zip(result.inertia, result.inertia[1:], strict=False))
    unit = normalised(features)
    total = (integers(unit) * integers(result.centroids)[result.assignment]).sum().item()  # Σ x·c in units of 2⁻⁴⁸
    assert result.inertia[-1] == max(0, (n * 2**48 - total) / 2**47)
    assert torch.equal(result.assignment, assign(unit, result.centroids))


def test_a_mean_that_rounding_made_worse_is_not_taken():
    for seed in range(20):
        draw = torch.Generator().manual_seed(seed)
        features = torch.randn(1, 3, generator=draw) + 1e-6 * torch.randn(50, 3, generator=draw)
        init = normalised(features[:1])
        cosine = cosines(normalised(features), init, torch.zeros(50, dtype=torch.long))
        before = max(0.0, 2 * 50 - 2 * cosine.sum().item())
        assert kmeans(features, 1, 1, init=init).inertia[0] <= before + 1e-13


def test_inertia_is_not_negative_where_rounded_rows_are_longer_than_one():
    for row in torch.randn(20, 1, 3, generator=torch.Generator().manual_seed(0)):
        assert kmeans(row, 1, 1).inertia[0] >= 0


def test_empty_clusters_restart_at_the_farthest_rows():
    far = torch.tensor([[0.0, 1, 0], [0, 0, 1]])
    features = torch.cat([torch.tensor([[1.0, 0, 0]]).repeat(20, 1) + 0.01 * torch.randn(20, 3), far])
    result = kmeans(features, 3, 1, init=torch.tensor([[1.0, 0.1, 0.2], [-1, 0, 0], [-1, 0, 0]]))
    assert torch.equal(result.centroids[1:], torch.tensor([[0.0, 1, 0], [0, 0, 1]]))  # the farthest row first
    assert result.counts.tolist() == [20, 1, 1]


def test_a_cluster_whose_members_cancel_keeps_its_centroid():
    features = torch.tensor([[1.0, 0], [-1, 0], [0, 1], [0, -1]])
    init = torch.tensor([[0.6, 0.8]])
    result = kmeans(features, 1, 3, init=init)
    assert torch.equal(result.centroids, normalised(init))
    assert result.inertia == [8.0] * 3


def test_zero_iterations_keep_a_random_subset_of_distinct_rows():
    features = clumps(50, 8, 50)
    result = kmeans(features, 20, 0, seed=1)
    rows = result.assignment.new_tensor([(normalised(features) == c).all(1).nonzero().item() for c in result.centroids])
    assert len(rows.unique()) == 20
    assert torch.equal(result.assignment[rows], torch.arange(20))
    assert result.inertia == []
    assert not torch.equal(result.centroids, kmeans(features, 20, 0, seed=2).centroids)
    assert kmeans(features, 50, 0).counts.tolist() == [1] * 50


def test_euclidean_inertia_is_as_good_as_scikit_learns():
    features = torch.nn.functional.normalize(clumps(3000, 48, 80, spread=1.0))
    init = features[torch.randperm(3000, generator=torch.Generator().manual_seed(5))[:150]]
    theirs = KMeans(150, init=init.numpy(), n_init=1, max_iter=10).fit(features.numpy())
    ours = kmeans(features, 150, 10, init=init)
    means = torch.stack([features[ours.assignment == j].mean(0) for j in range(150)])
    assert ((features - means[ours.assignment]) ** 2).sum() <= 1.02 * theirs.inertia_


class Largest(TorchDispatchMode):
    """Records the size of the largest tensor that any operation makes."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        sizes = [t.numel() for t in torch.utils._pytree.tree_leaves(made) if isinstance(t, torch.Tensor)]
        self.elements = max([self.elements, *sizes])
        return made


def test_memory_is_bounded_by_a_block_of_scores(monkeypatch):
    monkeypatch.setattr(memory.kmeans, "BLOCK", {"cpu": (256, 256)})
    monkeypatch.setattr(memory.kmeans, "ROWS", 512)
    features = torch.randn(2000, 16)
    with Largest() as largest:
        kmeans(features, 1000, 1)
    assert largest.elements == 256 * 256  # a matrix of all scores would have 2,000,000


def test_clusters_whose_members_stay_are_not_summed_again(monkeypatch):
    summed = []

    def counted(features, cluster, clusters, inner=memory.kmeans.cluster_sums):
        summed.append(clusters)
        return inner(features, cluster, clusters)

    monkeypatch.setattr(memory.kmeans, "cluster_sums", counted)
    features = torch.cat([clumps(60, 8, 6, 0.01), torch.eye(8)])
    result = kmeans(features, 20, 6, seed=2)
    assert summed[0] == 20
    assert summed[-1] < 20
    whole = normalised(torch.stack([normalised(features)[result.assignment == j].double().sum(0) for j in range(20)]))
    assert torch.allclose(result.centroids, whole, rtol=0, atol=1e-6)


def test_the_benchmark_runs_small_on_a_cpu(tmp_path, capsys):
    sizes = ["--images", "300", "--dim", "70", "--k", "150", "--passes", "2", "--subset", "50", "--growth-k", "20"]
    bench_kmeans.main([*sizes, "--out", str(tmp_path / "kmeans.json")])
    written = json.loads((tmp_path / "kmeans.json").read_text())
    assert [(row["data"], row["k"]) for row in written["rows"]] == [("noise", 150), ("mixture", 150), ("noise", 20)]
    for row in written["rows"]:
        assert row["subset_labels_equal"] == 1
        assert row["subset_inertia_ratio"] == 1
        assert len(row["assignments"]) == 3
        assert len(row["updates"]) == len(row["inertia"]) == 2
    assert written["path"] == "plain"
    assert "flash-kmeans is not timed" in capsys.readouterr().out


def test_the_benchmark_states_the_speed_of_a_whole_search(monkeypatch):
    monkeypatch.setattr(bench_kmeans, "seconds", lambda work, device: (work(), 2**-29)[1])
    unit = normalised(torch.randn(32, 64))
    found = bench_kmeans.compare(unit, unit[:16], subset=8, peak=64.0)
    assert found["search_images_per_second"] == 32 * 2**29
    assert (found["search_tflops"], found["search_share"]) == (35.2, 0.55)  # 2·32·16·64·2²⁹ operations a second


def test_benchmark_data_do_not_depend_on_the_process(monkeypatch):
    monkeypatch.setattr(bench_kmeans, "BLOCK", 64)
    for kind in ("noise", "mixture"):
        whole, part = (bench_kmeans.draw(kind, rows, 5, torch.device("cpu")) for rows in (range(300), range(50, 200)))
        assert torch.equal(whole[50:200], part)
        assert len(whole.unique(dim=0)) == 300


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"k": 0}, "k = 0: expected 1 to 30"),
        ({"k": 31}, "k = 31: expected 1 to 30"),
        ({"iterations": -1}, "iterations = -1"),
        ({"features": torch.ones(30)}, r"features: expected floats \(N, F\)"),
        ({"features": torch.ones(30, 4, dtype=torch.long)}, "features: expected floats"),
        ({"init": torch.ones(3, 5)}, r"init: expected shape \(5, 4\), got \(3, 5\)"),
        ({"init": torch.zeros(5, 4)}, "init: .*rows 0, 1, 2, 3, 4"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        kmeans(**{"features": clumps(30, 4, 3), "k": 5, "iterations": 1} | arguments)


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_rows_without_direction_are_named(value):
    features = clumps(30, 4, 3)
    features[3], features[17, 2:], features[17, :2] = value, value, 0.0
    with pytest.raises(ValueError, match=r"features: .*\(rows 3, 17\)"):
        kmeans(features, 5, 1)


@pytest.mark.gpu
def test_gpu_and_cpu_give_the_same_bits():
    features = clumps(5000, 96, 300, spread=1.0).half()
    features[::9] = features[0]
    cpu, gpu = kmeans(features, 700, 4), kmeans(features.cuda(), 700, 4)
    assert torch.equal(cpu.centroids, gpu.centroids.cpu())
    assert torch.equal(cpu.assignment, gpu.assignment.cpu())
    assert cpu.inertia == gpu.inertia
