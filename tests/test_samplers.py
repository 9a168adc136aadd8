"""The samplers against Gaussian data, whose velocity, flow and reverse process have closed forms; the noise against its
published test vectors."""

import math

import numpy as np
import pytest
import torch
from scipy import stats

import samplers as s
from loss import COSINE, LINEAR
from samplers import guided, noise, samplers, sde_samplers, uniform

MEAN = torch.tensor([0.7, -1.2], dtype=torch.float64)
COVARIANCE = torch.tensor([[1.0, 0.5], [0.5, 0.6]], dtype=torch.float64)


def root(matrix: torch.Tensor) -> torch.Tensor:
    """The symmetric square root of a symmetric matrix."""
    values, vectors = torch.linalg.eigh(matrix)
    return vectors * values.sqrt() @ vectors.T


def exact_velocity(interpolant):
    """E[v | x_t] for data N(MEAN, COVARIANCE): linear in x_t, because everything is Gaussian."""

    def velocity(x, t):
        assert x.dtype == t.dtype == torch.float64
        assert t.shape == (len(x),)
        assert (t == t[0]).all()
        alpha, sigma = interpolant.alpha(t[0]), interpolant.sigma(t[0])
        centred = (x - alpha * MEAN) @ torch.linalg.inv(alpha**2 * COVARIANCE + sigma**2 * torch.eye(2).double())
        data, eps = MEAN + alpha * centred @ COVARIANCE, sigma * centred
        return interpolant.dalpha(t[0]) * data + interpolant.dsigma(t[0]) * eps

    return velocity


def moments(sampler, num_steps, interpolant=LINEAR, **keywords):
    """Exact mean and covariance of what a sampler returns for Gaussian data, without a random number.

    Every sampler is then an affine map of its standard normal inputs (the start and each step's noise), so one run with
    all inputs zero and one run with each input set to one give the constant and the columns of the map.
    """
    noisy_steps = num_steps - 1 if sampler in sde_samplers.values() else 0
    inputs = torch.eye(2 * (1 + noisy_steps)).double().reshape(-1, 1 + noisy_steps, 2)
    inputs = torch.cat([torch.zeros_like(inputs[:1]), inputs])  # (1 + 2·(1 + noisy_steps), 1 + noisy_steps, 2)
    left = iter(inputs.unbind(1)[1:])
    if noisy_steps:
        keywords |= {"randn": lambda x: next(left), "interpolant": interpolant}
    out = sampler(exact_velocity(interpolant), inputs[:, 0], num_steps, **keywords)
    assert next(left, None) is None, "randn was not called once per noisy step"
    columns = out[1:] - out[0]
    return out[0], columns.T @ columns


@pytest.mark.parametrize("interpolant", [LINEAR, COSINE], ids=["linear", "cosine"])
@pytest.mark.parametrize("name", ["euler", "heun"])
def test_ode_returns_the_mean_and_covariance_of_the_data(name, interpolant):
    mean, covariance = moments(samplers[name], 1000, interpolant)
    tolerance = {"euler": 3e-3, "heun": 1e-5}[name]
    torch.testing.assert_close(mean, MEAN, atol=tolerance, rtol=0)
    torch.testing.assert_close(covariance, COVARIANCE, atol=tolerance, rtol=0)


@pytest.mark.parametrize("interpolant", [LINEAR, COSINE], ids=["linear", "cosine"])
@pytest.mark.parametrize("name", list(sde_samplers))
def test_sde_returns_the_mean_and_covariance_of_the_data(name, interpolant):
    mean, covariance = moments(samplers[name], 250, interpolant)  # the published steps and last step
    finer_mean, finer_covariance = moments(samplers[name], 250, interpolant, last_step=0.01)
    torch.testing.assert_close(mean, MEAN, atol=0.01, rtol=0)
    torch.testing.assert_close(covariance, COVARIANCE, atol=0.01, rtol=0)
    torch.testing.assert_close(finer_mean, MEAN, atol=0.004, rtol=0)
    torch.testing.assert_close(finer_covariance, COVARIANCE, atol=0.006, rtol=0)


def test_sde_with_random_numbers_returns_the_moments_of_the_data():
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(40_000, 2, generator=generator)
    randn = lambda x: torch.randn(x.shape, generator=generator)  # noqa: E731
    x = s.euler_maruyama_sampler(exact_velocity(LINEAR), start, 100, randn=randn)
    torch.testing.assert_close(x.mean(0), MEAN, atol=0.02, rtol=0)
    torch.testing.assert_close(x.T.cov(), COVARIANCE, atol=0.03, rtol=0)


def test_halving_the_step_divides_the_error_by_two_for_euler_and_four_for_heun():
    start = torch.randn(64, 2, generator=torch.Generator().manual_seed(0)).double()
    exact = MEAN + start @ root(COVARIANCE)  # the flow's solution: x_t = α·MEAN + Σ_t^½ z, since the Σ_t commute
    for name, ratio in (("euler", 2), ("heun", 4)):
        errors = [
            (samplers[name](exact_velocity(LINEAR), start, steps) - exact).square().mean().sqrt() for steps in (64, 128)
        ]
        assert errors[0] / errors[1] == pytest.approx(ratio, rel=0.08), name


@pytest.mark.parametrize(("name", "calls"), [("euler", 10), ("heun", 19), ("sde", 10), ("heun-sde", 19)])
def test_times_of_the_evaluations(name, calls):
    times = []

    def velocity(x, t):
        times.append(t[0].item())
        return torch.zeros_like(x, dtype=torch.float32)  # a network's precision

    out = samplers[name](velocity, torch.zeros(3, 4, 2, 2), 10)
    assert out.dtype == torch.float64
    assert out.shape == (3, 4, 2, 2)
    assert len(times) == calls
    assert times[0] == 1
    assert times == sorted(times, reverse=True)
    assert times[-1] == pytest.approx(0.04 if name in sde_samplers else 0.1)


def test_heun_sde_adds_the_noise_before_it_looks():
    states = []
    for name in ("sde", "heun-sde"):
        seen = []
        sde_samplers[name](lambda x, t, seen=seen: seen.append(x) or 0 * x, torch.zeros(1, 1), 4, randn=torch.ones_like)
        states.append(seen[0].item())
    assert states == [0, pytest.approx((2 * 0.96 / 3) ** 0.5)]  # √(w(1)·|dt|)


@pytest.mark.parametrize("name", list(samplers))
def test_a_grid_without_a_step_is_an_error(name):
    with pytest.raises(ValueError, match="falling grid"):
        samplers[name](lambda x, t: x, torch.zeros(1, 2), 1 if name in sde_samplers else 0)


def test_guidance():
    x = torch.randn(5, 4, 3, 3, dtype=torch.float64)
    t = torch.tensor([0.0, 0.2, 0.5, 0.7, 1.0], dtype=torch.float64)
    asked = []

    def strong(x, t):
        return 3 * x

    def weak(x, t):
        asked.append(t)
        return x + t.view(-1, 1, 1, 1)

    everywhere = guided(strong, weak, 2.5)(x, t)
    torch.testing.assert_close(everywhere, weak(x, t) + 2.5 * (strong(x, t) - weak(x, t)))
    torch.testing.assert_close(guided(strong, weak, 1.0)(x, t), strong(x, t))
    torch.testing.assert_close(guided(strong, weak, 0.0)(x, t), weak(x, t))

    part = guided(strong, weak, 2.5, interval=(0.2, 0.6))(x, t)  # ends included, row by row
    torch.testing.assert_close(part[1:3], everywhere[1:3])
    assert torch.equal(part[[0, 3, 4]], strong(x, t)[[0, 3, 4]])

    three = guided(strong, weak, 2.5, channels=3)(x, t)
    torch.testing.assert_close(three[:, :3], everywhere[:, :3])
    assert torch.equal(three[:, 3:], strong(x, t)[:, 3:])

    asked.clear()
    assert torch.equal(guided(strong, weak, 2.5, interval=(0.3, 0.4))(x, t), strong(x, t))
    for interval in ((0.0, 0.4), (0.6, 1.0)):
        assert torch.equal(guided(strong, weak, 2.5, interval)(x[2:3], t[2:3]), strong(x, t)[2:3])
    assert not asked, "the weaker velocity was evaluated where it is not used"


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [  # known answers published with Random123, for Philox-4x32 of 10 rounds
        ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_philox_known_answers(counter, key, words):
    out = s.philox(tuple(torch.tensor([word] * 9) for word in counter), tuple(key))
    assert [word.unique().tolist() for word in out] == [[word] for word in words]


def test_noise_is_the_box_muller_transform_of_philox_at_its_address():
    seed, image, step = 5 + 7 * 2**32, 123_456, 17
    got = noise(seed, torch.tensor([image]), step, (2, 3))[0].flatten()
    counter = tuple(torch.tensor(word) for word in ([0, 1], [step] * 2, [image] * 2, [0, 0]))  # the two blocks of 6
    words = np.stack([word.numpy() for word in s.philox(counter, (5, 7))], axis=1)  # (2, 4)
    u = (words + 0.5) / 2**32
    pairs = np.sqrt(-2 * np.log(u[:, ::2])) * np.exp(2j * np.pi * u[:, 1::2])
    expected = np.stack([pairs.real, pairs.imag], axis=-1).flatten()[:6]
    np.testing.assert_allclose(got.numpy(), expected, rtol=1e-6)


def test_noise_is_finite_at_the_ends_of_the_generator(monkeypatch):
    """50,000 images of 250 steps take 5e10 words of 2³² possible ones: a word of zeros comes a dozen times."""
    words = [torch.tensor([word]) for word in (0, 0, 2**32 - 1, 2**32 - 1)]
    monkeypatch.setattr(s, "philox", lambda counter, key: words)
    outermost = math.sqrt(2 * 33 * math.log(2))  # of u = 2⁻³³
    assert s.normals_of((), ())[0].tolist() == pytest.approx([outermost, 0, 2**-16, 0], rel=1e-6, abs=1e-8)


def test_noise_depends_on_its_address_only():
    images, shape = torch.tensor([3, 70_000, 0, 4_000_000_000]), (4, 5, 3)
    together = noise(1, images, 2, shape)
    assert together.shape == (4, *shape)
    assert together.dtype == torch.float32
    for order in ([2, 0], [3, 1, 0, 2], [1]):
        assert torch.equal(noise(1, images[order], 2, shape), together[order])
    others = [noise(seed, images, step, shape) for seed, step in ((0, 2), (1 + 2**32, 2), (1, 3), (2, 1))]
    flat = torch.cat([together, *others]).flatten(1)
    assert len(flat.unique(dim=0)) == len(flat)


def test_noise_is_standard_normal_and_independent():
    x = noise(0, torch.arange(64), 5, (4, 32, 32)).double()  # 262,144 numbers
    assert abs(x.mean()) < 4 / x.numel() ** 0.5
    assert abs(x.var() - 1) < 4 * (2 / x.numel()) ** 0.5
    assert abs((x**3).mean()) < 4 * (15 / x.numel()) ** 0.5
    assert abs((x**4).mean() - 3) < 4 * (96 / x.numel()) ** 0.5
    assert stats.kstest(x.flatten().numpy(), "norm").pvalue > 0.01
    flat = x.flatten(1)
    neighbours = {
        "images": (flat[1:], flat[:-1]),
        "elements": (flat[:, 1:], flat[:, :-1]),
        "steps": (flat, noise(0, torch.arange(64), 6, (4, 32, 32)).double().flatten(1)),
        "seeds": (flat, noise(1, torch.arange(64), 5, (4, 32, 32)).double().flatten(1)),
        "step and image": (flat[5:6], noise(0, torch.tensor([4]), 6, (4, 32, 32)).double().flatten(1)),
    }
    for name, (a, b) in neighbours.items():
        assert abs((a * b).mean()) < 4 / a.numel() ** 0.5, name
        assert abs((a**2 * b**2).mean() - 1) < 4 * (8 / a.numel()) ** 0.5, name


def test_uniform_is_uniform_and_apart_from_the_noise():
    images = torch.arange(100_000)
    u = uniform(0, images, 0)
    assert u.dtype == torch.float64
    assert stats.kstest(u.numpy(), "uniform").pvalue > 0.01
    assert abs(np.corrcoef(u, uniform(0, images, 1))[0, 1]) < 0.013
    assert abs(np.corrcoef(u, noise(0, images, 0, (1,))[:, 0].abs())[0, 1]) < 0.013
    assert torch.equal(uniform(0, images[[7, 5]], 0), u[[7, 5]])


def test_uniform_is_philox_at_its_address():
    seed, image, draw = 5 + 7 * 2**32, 123_456, s.LABEL_DRAW
    high, low, *_ = s.philox(tuple(torch.tensor([word]) for word in (0, draw, image, 1)), (5, 7))
    expected = (high.item() * 2**21 + low.item() // 2**11) / 2**53
    assert uniform(seed, torch.tensor([image]), draw).item() == expected


def test_label_and_snippet_of_an_image_are_drawn_apart():
    assert (s.SNIPPET_DRAW, s.LABEL_DRAW) == (0, 1)  # as in earlier versions: a run may be continued


def test_images_may_be_numbered_by_any_integers():
    images = torch.tensor([3, 70_000, 2_000_000_000])
    assert torch.equal(noise(1, images.int(), 2, (5,)), noise(1, images, 2, (5,)))
    assert torch.equal(uniform(1, images.int(), 2), uniform(1, images, 2))


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_a_seed_out_of_range_is_an_error(seed):
    with pytest.raises(ValueError, match="seed"):
        noise(seed, torch.arange(2), 0, (3,))


def test_one_compiled_generator_serves_every_step_and_seed():
    graphs = []
    compiled = torch.compile(s.normals_of, backend=lambda graph, _: graphs.append(graph) or graph.forward)
    images = torch.tensor([3, 70_000, 4_000_000_000])
    for seed, step in ((0, 0), (1, 249), (2**64 - 1, 7)):
        assert torch.equal(noise(seed, images, step, (2, 5), normals=compiled), noise(seed, images, step, (2, 5)))
    assert len(graphs) == 1


@pytest.mark.gpu
def test_guidance_does_not_wait_for_the_gpu():
    x, t = torch.randn(2, 3, device="cuda"), torch.full((2,), 0.5, device="cuda").double()
    for interval, factor in (((0, 1), 1), ((0.4, 0.6), 1), ((0.6, 1), 2)):
        velocity = guided(lambda x, t: 2 * x, lambda x, t: 3 * x, 2, interval)
        torch.cuda.set_sync_debug_mode("error")  # an event is waited for, the stream is not
        out = velocity(x, t)
        torch.cuda.set_sync_debug_mode("default")
        torch.testing.assert_close(out, factor * x)


@pytest.mark.gpu
def test_noise_of_one_kernel_is_the_same_on_a_gpu():
    images, compiled = torch.arange(64), torch.compile(s.normals_of, dynamic=False)
    for seed, step in ((3, 9), (2**64 - 1, 249), (0, 0)):
        on_gpu = noise(seed, images, step, (4, 32, 32), "cuda", normals=compiled)
        assert torch.equal(on_gpu.cpu(), noise(seed, images, step, (4, 32, 32)))


@pytest.mark.gpu
def test_noise_is_the_same_on_a_gpu():
    images = torch.arange(64)
    for draw in (lambda device: noise(3, images, 9, (4, 32, 32), device), lambda device: uniform(3, images, 9, device)):
        assert torch.equal(draw("cpu"), draw("cuda").cpu())
