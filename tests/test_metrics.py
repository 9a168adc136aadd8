"""The mathematics of the metrics: closed forms, scipy, brute force, and sets on which precision and recall differ."""

import numpy as np
import pytest
import scipy.linalg
import torch

from evaluations.metrics import Statistics, frechet_distance, inception_score, kid, precision_recall, squared_distances


def random(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def rotation(dim, seed=0):
    return np.linalg.qr(random(dim, dim, seed=seed))[0]


def statistics_of(features):
    return features.mean(0), np.atleast_2d(np.cov(features, rowvar=False))


# Fréchet distance


def test_commuting_covariances_have_the_closed_form():
    basis, a, b = rotation(32), np.linspace(0.1, 9, 32), np.linspace(4, 0.01, 32)
    mu1, mu2 = random(32, seed=1), random(32, seed=2)
    expected = ((mu1 - mu2) ** 2).sum() + ((a**0.5 - b**0.5) ** 2).sum()
    distance = frechet_distance(mu1, basis * a @ basis.T, mu2, basis * b @ basis.T)
    assert distance == pytest.approx(expected, rel=1e-10)


def test_two_dimensions_have_a_closed_form_without_commuting():
    a, b = np.array([[2.0, 0.7], [0.7, 1.0]]), np.array([[0.5, -0.3], [-0.3, 3.0]])
    assert not np.allclose(a @ b, b @ a)
    root = np.sqrt(np.trace(a @ b) + 2 * np.sqrt(np.linalg.det(a) * np.linalg.det(b)))  # Cayley–Hamilton
    expected = 5 + np.trace(a + b) - 2 * root
    assert frechet_distance([0, 1.0], a, [2, 0.0], b) == pytest.approx(expected, rel=1e-12)


def test_equals_scipy_sqrtm_on_well_conditioned_covariances():
    (mu1, a), (mu2, b) = statistics_of(random(400, 48)), statistics_of(random(300, 48, seed=1) @ random(48, 48, seed=2))
    expected = ((mu1 - mu2) ** 2).sum() + np.trace(a + b - 2 * scipy.linalg.sqrtm(a @ b).real)
    assert frechet_distance(mu1, a, mu2, b) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(mu2, b, mu1, a) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("count", [2, 20, 63])
def test_fewer_images_than_features(count):
    """The trace of the root is the nuclear norm of the product of the two centred data matrices."""
    x, y = random(count, 64), 0.5 * random(200, 64, seed=1) + 0.1
    (mu1, a), (mu2, b) = statistics_of(x), statistics_of(y)
    left, right = (x - mu1) / (count - 1) ** 0.5, (y - mu2) / 199**0.5
    root = np.linalg.norm(left @ right.T, "nuc")
    expected = ((mu1 - mu2) ** 2).sum() + np.trace(a + b) - 2 * root
    assert frechet_distance(mu1, a, mu2, b) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(mu2, b, mu1, a) == pytest.approx(expected, rel=1e-6)
    assert 0 <= frechet_distance(mu1, a, mu1, a) < 1e-9


def test_near_singular_covariances():
    basis, a = rotation(64), 10.0 ** np.linspace(2, -18, 64)
    sigma, permuted = basis * a @ basis.T, basis * a[::-1] @ basis.T
    assert 0 <= frechet_distance(a, sigma, a, sigma) < 1e-8
    expected = ((a**0.5 - a[::-1] ** 0.5) ** 2).sum()
    assert frechet_distance(a, sigma, a, permuted) == pytest.approx(expected, rel=1e-6)
    zero = np.zeros((64, 64))
    assert frechet_distance(a, sigma, a, zero) == pytest.approx(a.sum())
    assert frechet_distance(a, zero, a, zero) == 0


def test_statistics_of_other_features_are_refused():
    eye = np.eye(3)
    with pytest.raises(ValueError, match="same features"):
        frechet_distance(np.zeros(3), eye, np.zeros(4), np.eye(4))
    with pytest.raises(ValueError, match="sigma2 holds values that are not finite"):
        frechet_distance(np.zeros(3), eye, np.zeros(3), eye * np.nan)


def test_statistics_in_batches_equal_numpy_even_far_from_zero():
    features = 1e6 + 1e-2 * random(100, 7)
    parts = [Statistics(7), Statistics(7)]
    for part, rows in zip(parts, (features[:37], features[37:]), strict=True):
        for batch in np.array_split(rows, 5):
            part.update(torch.from_numpy(batch))
    total = Statistics(7)
    for part in (Statistics(7), *parts):  # a process may have had no image
        total.combine(part.count, part.mean, part.scatter)
    assert total.count == 100
    np.testing.assert_allclose(total.mean, features.mean(0), rtol=1e-14)
    np.testing.assert_allclose(total.covariance(), np.cov(features, rowvar=False), rtol=1e-6, atol=1e-12)
    with pytest.raises(ValueError, match="at least 2 images"):
        Statistics(7).covariance()


# Inception score


def test_inception_score_counts_equally_likely_certain_classes():
    assert inception_score(np.eye(10)[np.arange(1000) % 10]) == pytest.approx(10)
    assert inception_score(np.full((100, 10), 0.1)) == pytest.approx(1)


def test_inception_score_is_the_mean_over_splits_of_which_the_last_may_be_short():
    probs = np.concatenate([np.eye(10)[np.arange(50) % 10], np.eye(10)[np.arange(20) % 2]])
    assert inception_score(probs, split_size=50) == pytest.approx((10 + 2) / 2)
    assert inception_score(np.tile(np.eye(10)[[0]], (5001, 1))) == pytest.approx(1)
    assert inception_score(np.eye(10)[np.arange(5001) % 10]) == pytest.approx((10 + 1) / 2)  # ADM's splits of 5,000
    with pytest.raises(ValueError, match="N > 0"):
        inception_score(np.empty((0, 10)))


# Precision and recall


def brute_force(reference, samples, k):
    """Straight from the definition, in Python loops."""

    def inside(points, centres):
        radii = [np.sort(np.linalg.norm(centres - c, axis=1))[k] for c in centres]  # position 0 is the centre itself
        return np.mean([any(np.linalg.norm(p - c) <= r for c, r in zip(centres, radii, strict=True)) for p in points])

    return inside(samples, reference), inside(reference, samples)


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("block", [7, 4096])
def test_precision_recall_equal_brute_force(k, block):
    reference, samples = random(60, 5), 0.6 * random(45, 5, seed=1) + 0.5
    expected = brute_force(reference, samples, k)
    assert 0 < expected[0] < 1
    assert 0 < expected[1] < 1
    assert expected[0] != expected[1]
    assert precision_recall(reference, samples, k, block) == pytest.approx(expected)


def test_collapsed_samples_are_precise_and_recall_nothing():
    """A few good pictures repeated: high precision, low recall. Swapped arguments would swap the two."""
    reference = random(300, 8).astype(np.float32)
    samples = np.repeat(reference[:2], 50, axis=0) + 1e-3 * random(100, 8, seed=1).astype(np.float32)
    precision, recall = precision_recall(reference, samples)
    assert precision == 1
    assert recall <= 0.02
    assert precision_recall(samples, reference) == (recall, precision)


def test_spread_out_samples_recall_all_and_are_imprecise():
    precision, recall = precision_recall(random(200, 8), 5 * random(200, 8, seed=1))
    assert precision < 0.1
    assert recall > 0.9


def test_identical_rows_lie_at_distance_zero():
    """A set collapsed to one point has balls of radius zero, which hold that very point and nothing else."""
    reference = 1e3 + random(64, 32, seed=1)
    assert precision_recall(reference, np.repeat(reference[:1], 20, axis=0), block=9) == (1, 1 / 64)
    assert precision_recall(reference, reference, block=9) == (1, 1)
    rows = torch.from_numpy(3 + random(100, 2048))
    distances = squared_distances(rows[:50], rows)
    assert (distances[:, :50].diagonal() == 0).all()
    torch.testing.assert_close(distances, torch.cdist(rows[:50], rows).square(), rtol=1e-9, atol=1e-9)


def test_too_few_images_and_other_features_are_refused():
    with pytest.raises(ValueError, match="at least 4 on each side"):
        precision_recall(random(3, 2), random(9, 2))
    with pytest.raises(ValueError, match="different spaces"):
        precision_recall(random(9, 2), random(9, 3))


# Kernel distance


def test_kid_equals_the_definition_in_loops():
    x, y = random(12, 6), 0.5 + random(9, 6, seed=1)

    def kernel(a, b):
        return (a @ b / 6 + 1) ** 3

    def within(z):
        return np.mean([kernel(z[i], z[j]) for i in range(len(z)) for j in range(len(z)) if i != j])

    expected = within(x) + within(y) - 2 * np.mean([kernel(a, b) for a in x for b in y])
    assert kid(x, y) == pytest.approx(expected, rel=1e-12)
    assert kid(x, y, block=4) == pytest.approx(expected, rel=1e-12)


def test_kid_needs_two_of_each():
    one, two = np.zeros((1, 4)), np.zeros((2, 4))
    assert kid(two, two) == pytest.approx(0)
    for sides in ((one, two), (two, one)):
        with pytest.raises(ValueError, match="at least 2 on each side"):
            kid(*sides)


def test_kid_of_equal_distributions_is_near_zero_and_grows_with_a_shift():
    x, y = random(1000, 16), random(1000, 16, seed=1)
    assert abs(kid(x, y)) < 0.01
    assert kid(x, y + 0.5) > 0.1


@pytest.mark.gpu
def test_the_gpu_gives_the_same_numbers():
    x, y = torch.from_numpy(random(500, 64)).float(), torch.from_numpy(0.8 * random(400, 64, seed=1)).float()
    (mu1, a), (mu2, b) = statistics_of(x.double().numpy()), statistics_of(y.double().numpy())
    on_gpu = [torch.as_tensor(value, device="cuda") for value in (mu1, a, mu2, b)]
    assert frechet_distance(*on_gpu) == pytest.approx(frechet_distance(mu1, a, mu2, b), rel=1e-10)
    assert precision_recall(x.cuda(), y.cuda()) == precision_recall(x, y)
    assert kid(x.cuda(), y.cuda()) == pytest.approx(kid(x, y), rel=1e-9)
