"""The path, the draws of a step and the losses."""

import math

import pytest
import torch
import torch.nn.functional as F

from loss import COSINE, LINEAR, FlowMatchingLoss, alignment_loss, draw, interpolants, seed_of, time_distributions

TIMES = torch.linspace(0.01, 0.99, 25, dtype=torch.float64)


@pytest.mark.parametrize("name", interpolants)
def test_velocity_is_the_derivative_of_the_path(name):
    path, step = interpolants[name], 1e-6
    x, noise = torch.randn(2, 25, 3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    difference = (path.point(x, noise, TIMES + step) - path.point(x, noise, TIMES - step)) / (2 * step)
    torch.testing.assert_close(path.velocity(x, noise, TIMES), difference, rtol=1e-7, atol=1e-8)
    ends = torch.tensor([0.0, 1.0], dtype=torch.float64)
    torch.testing.assert_close(path.point(x[:2], noise[:2], ends), torch.stack([x[0], noise[1]]))


@pytest.mark.parametrize("name", interpolants)
def test_score_of_gaussian_data(name):
    """For data N(m, s²) both the marginal velocity and the score are known, and `score` must join them."""
    path, m, s = interpolants[name], 1.5, 0.7
    x = torch.randn(25, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    a, b = path.alpha(TIMES)[:, None], path.sigma(TIMES)[:, None]
    da, db = path.dalpha(TIMES)[:, None], path.dsigma(TIMES)[:, None]
    variance = a**2 * s**2 + b**2
    velocity = da * m + (a * da * s**2 + b * db) / variance * (x - a * m)
    torch.testing.assert_close(path.score(velocity, x, TIMES), -(x - a * m) / variance)


def test_linear_path_is_the_published_one():
    t = torch.tensor([0.25])
    x, noise, v = torch.tensor([[2.0]]), torch.tensor([[4.0]]), torch.tensor([[3.0]])
    assert LINEAR.point(x, noise, t).item() == 2.5
    assert LINEAR.velocity(x, noise, t).item() == 2.0
    assert LINEAR.score(v, x, t).item() == -(2.0 + 0.75 * 3.0) / 0.25
    assert COSINE.alpha(t).item() == pytest.approx(math.cos(math.pi / 8))


def test_draws_are_a_function_of_seed_and_step():
    one, two = draw(0, 5, 8, (4, 2, 2)), draw(0, 5, 8, (4, 2, 2))
    other_step, other_seed = draw(0, 6, 8, (4, 2, 2)), draw(1, 5, 8, (4, 2, 2))
    for name in ("time", "noise", "posterior", "uniforms"):
        assert torch.equal(getattr(one, name), getattr(two, name))
        assert not torch.equal(getattr(one, name), getattr(other_step, name))
        assert not torch.equal(getattr(one, name), getattr(other_seed, name))
        assert torch.equal(getattr(one[2:5], name), getattr(one, name)[2:5])
    assert not torch.equal(one.noise, one.posterior)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    draw(0, 7, 8, (4, 2, 2))
    assert torch.equal(before, torch.get_rng_state())


def test_draws_are_those_of_earlier_versions():
    """A run that is continued after an update must not see other numbers."""
    assert seed_of(3, 5) == 4736547612255647509
    draws = draw(3, 5, 2, (1, 1, 1))
    expected = {"time": [0.0591, 0.0855], "noise": [0.3882, -0.4393], "posterior": [-1.7414, -1.0080]}
    expected["uniforms"] = [0.5623, 0.7598, 0.5742, 0.1892]
    for name, values in expected.items():
        assert getattr(draws, name).flatten().tolist() == pytest.approx(values, abs=1e-4), name


def test_time_distributions():
    u = (torch.arange(100_000) + 0.5) / 100_000
    uniform, logit = time_distributions["uniform"](u), time_distributions["logit-normal"](u)
    assert torch.equal(uniform, u)
    normal = torch.logit(logit)
    assert normal.mean().abs() < 1e-3
    assert normal.std() == pytest.approx(1, abs=1e-3)
    assert (draw(0, 0, 10_000, (1, 1, 1), "logit-normal").time - 0.5).abs().mean() < 0.2


class Oracle:
    """A network that answers with the true velocity plus a known error for each sample."""

    def __init__(self, latents, draws, error):
        self.answer = LINEAR.velocity(latents, draws.noise, draws.time) + error[:, None, None, None]
        self.expected = LINEAR.point(latents, draws.noise, draws.time), draws.time, draws.uniforms

    def __call__(self, x, t, cond, uniforms, return_tokens=False):
        for given, expected in zip((x, t, uniforms), self.expected, strict=True):
            assert torch.equal(given, expected)
        assert cond == "cond"
        return (self.answer, [torch.tensor([[[3.0, 0.0]], [[0.0, 2.0]]])]) if return_tokens else self.answer


def test_losses_per_sample():
    latents, draws, error = torch.randn(2, 4, 2, 2), draw(0, 0, 2, (4, 2, 2)), torch.tensor([0.0, 3.0])
    losses = FlowMatchingLoss()(Oracle(latents, draws, error), latents, "cond", draws)
    torch.testing.assert_close(losses.total, error.square())
    assert losses.align is None
    patches = [torch.tensor([[[1.0, 0.0]], [[1.0, 1.0]]])]
    losses = FlowMatchingLoss(align_coeff=0.5)(Oracle(latents, draws, error), latents, "cond", draws, patches)
    torch.testing.assert_close(losses.align, torch.tensor([-1.0, -math.sqrt(0.5)]))
    torch.testing.assert_close(losses.total, error.square() + 0.5 * losses.align)


def test_alignment_is_the_mean_negative_cosine_over_tokens_and_heads():
    heads, targets = [torch.randn(3, 5, d) for d in (4, 6)], [torch.randn(3, 5, d) for d in (4, 6)]
    expected = (
        -sum(
            F.normalize(h, dim=2).mul(F.normalize(p, dim=2)).sum((1, 2)) / 5
            for h, p in zip(heads, targets, strict=True)
        )
        / 2
    )
    torch.testing.assert_close(alignment_loss(heads, targets), expected)
    with pytest.raises(ValueError, match=r"\(3, 5, 4\).*\(3, 9, 4\)"):
        alignment_loss(heads[:1], [torch.randn(3, 9, 4)])
