"""From noise to data: ODE and SDE integrators, guidance, and the noise of each image.

A sampler is a plain function of any `velocity(x, t)`, with x (B, ...) and t (B,) both float64; whoever wraps a network
casts. Time runs from t = 1 (noise) to t = 0 (data), so every time step dt is negative; too few steps for a grid of two
times are a ValueError. The velocity drives

    dx = v dt                                     the probability-flow ODE, and
    dx = (v − ½ w(t) score) dt + √w(t) dW         the reverse SDE with the same marginals for any w ≥ 0

(SiT, arXiv 2401.08740, section 2.2); here w(t) = 2t, as GMem, REPA and SiT sample. `noise` gives each image its own
random numbers, so that neither batch size nor number of GPUs nor order matters.

    x = euler_maruyama_sampler(velocity, noise(0, images, 0, (4, 32, 32)), 250, randn=…)
"""

import itertools
import math
from collections.abc import Callable

import torch
from torch import Tensor

from loss import LINEAR, Interpolant, per_sample

Velocity = Callable[[Tensor, Tensor], Tensor]
SNIPPET_DRAW, LABEL_DRAW = 0, 1  # which of an image's uniform numbers draws what
LAST_STEP = 0.04  # where the SDE's noise ends, as published


def euler_sampler(velocity: Velocity, noise: Tensor, num_steps: int) -> Tensor:
    """Integrate the ODE by Euler's method in `num_steps` even steps: that many evaluations, an error of order 1.

    `noise` (B, ...) is the state at t = 1; returns the float64 state at t = 0, of the same shape.
    """
    x = noise.to(torch.float64)
    for t, t_next in _steps(1.0, 0.0, num_steps + 1):
        x = x + (t_next - t) * _velocity(velocity, x, t)
    return x


def heun_sampler(velocity: Velocity, noise: Tensor, num_steps: int) -> Tensor:
    """Integrate the ODE by Heun's method in `num_steps` even steps: 2·num_steps − 1 evaluations, an error of order 2.

    The last step, to t = 0, is a plain Euler step (Karras et al., arXiv 2206.00364, algorithm 1). `noise` (B, ...) is
    the state at t = 1; returns the float64 state at t = 0, of the same shape.
    """
    x = noise.to(torch.float64)
    for t, t_next in _steps(1.0, 0.0, num_steps + 1):
        slope = _velocity(velocity, x, t)
        if t_next > 0:
            slope = (slope + _velocity(velocity, x + (t_next - t) * slope, t_next)) / 2
        x = x + (t_next - t) * slope
    return x


def euler_maruyama_sampler(
    velocity: Velocity,
    noise: Tensor,
    num_steps: int,
    *,
    interpolant: Interpolant = LINEAR,
    last_step: float = LAST_STEP,
    randn: Callable[[Tensor], Tensor] = torch.randn_like,
) -> Tensor:
    """Integrate the SDE on `num_steps` grid points from t = 1 to `last_step`, then in one step without noise to t = 0.

    That is `num_steps` evaluations, `num_steps` − 1 of them with noise: `randn(x)` is called once for each, in order.
    The published sampler of GMem (arXiv 2412.08781) and REPA (arXiv 2410.06940). `noise` (B, ...) is the state at
    t = 1; returns the float64 state at t = 0, of the same shape.
    """
    x = noise.to(torch.float64)
    for t, t_next in _steps(1.0, last_step, num_steps):
        slope = _drift(velocity, interpolant, x, t)
        x = x + (t_next - t) * slope + _increment(x, t, t_next, randn)
    return x - last_step * _drift(velocity, interpolant, x, last_step)


def heun_sde_sampler(
    velocity: Velocity,
    noise: Tensor,
    num_steps: int,
    *,
    interpolant: Interpolant = LINEAR,
    last_step: float = LAST_STEP,
    randn: Callable[[Tensor], Tensor] = torch.randn_like,
) -> Tensor:
    """Integrate the SDE on the grid of `euler_maruyama_sampler` with Heun steps: 2·num_steps − 1 evaluations.

    Each step first adds its noise, then moves the noised state by one deterministic Heun step, as SiT does (after
    Karras et al., arXiv 2206.00364, algorithm 2); the step from `last_step` to t = 0 is a plain noise-free Euler step.
    GMem's second release samples so, in 50 steps with `last_step` 0.004. `randn(x)` is called once for each noisy step,
    in order. `noise` (B, ...) is the state at t = 1; returns the float64 state at t = 0.
    """
    x = noise.to(torch.float64)
    for t, t_next in _steps(1.0, last_step, num_steps):
        x = x + _increment(x, t, t_next, randn)
        slope = _drift(velocity, interpolant, x, t)
        slope = (slope + _drift(velocity, interpolant, x + (t_next - t) * slope, t_next)) / 2
        x = x + (t_next - t) * slope
    return x - last_step * _drift(velocity, interpolant, x, last_step)


ode_samplers = {"euler": euler_sampler, "heun": heun_sampler}
sde_samplers = {"sde": euler_maruyama_sampler, "heun-sde": heun_sde_sampler}
samplers = ode_samplers | sde_samplers


def _steps(start: float, stop: float, num_points: int) -> list[tuple[float, float]]:
    """The pairs (t, t_next) of neighbouring points of an even grid from `start` down to `stop`."""
    if num_points < 2 or not 0 <= stop < start:
        raise ValueError(f"a sampler needs a falling grid of at least 2 times; got {num_points} from {start} to {stop}")
    times = torch.linspace(start, stop, num_points, dtype=torch.float64).tolist()
    return list(itertools.pairwise(times))


def _velocity(velocity: Velocity, x: Tensor, t: float) -> Tensor:
    """The velocity (B, ...) of all of x (B, ...) at one time."""
    return velocity(x, x.new_full((len(x),), t)).to(x.dtype)


def _diffusion(t: float) -> float:
    """w(t), the squared noise per unit of time."""
    return 2 * t


def _drift(velocity: Velocity, interpolant: Interpolant, x: Tensor, t: float) -> Tensor:
    """v − ½ w(t) score (B, ...) of all of x (B, ...) at one time, not 0."""
    v = _velocity(velocity, x, t)
    return v - _diffusion(t) / 2 * interpolant.score(v, x, x.new_full((len(x),), t))


def _increment(x: Tensor, t: float, t_next: float, randn: Callable[[Tensor], Tensor]) -> Tensor:
    """√w dW over the step from t to t_next."""
    return math.sqrt(_diffusion(t) * abs(t_next - t)) * randn(x).to(x.dtype)


def guided(
    velocity: Velocity,
    weaker_velocity: Velocity,
    scale: float,
    interval: tuple[float, float] = (0.0, 1.0),
    channels: int | None = None,
) -> Velocity:
    """A velocity that leads away from a weaker one: weaker + scale·(velocity − weaker) where t is inside `interval`.

    With the null condition as the weaker velocity this is classifier-free guidance (arXiv 2207.12598), with another
    checkpoint autoguidance (arXiv 2406.02507). `interval` bounds t, ends included (arXiv 2404.07724); outside it the
    result is `velocity` as it is, and where no t of a batch is inside, the weaker velocity is not evaluated.
    `channels=3` guides the first 3 channels of dimension 1 alone, as SiT's published numbers do.
    """
    low, high = interval
    always = low <= 0 and high >= 1

    def guided_velocity(x: Tensor, t: Tensor) -> Tensor:
        inside = (low <= t) & (t <= high)  # (B,)
        # Asked before `velocity` is queued on a GPU: asked after, the answer would wait for all of that evaluation.
        some = inside.any().to("cpu", non_blocking=True)  # right once `copied` has happened
        copied = torch.get_device_module(x.device).Event()
        copied.record()
        strong = velocity(x, t)  # (B, C, ...), at work on a GPU while this waits for `some`
        copied.synchronize()
        if not (always or some):
            return strong
        weak = weaker_velocity(x, t)  # (B, C, ...)
        mixed = torch.where(per_sample(inside, strong), weak + scale * (strong - weak), strong)
        return mixed if channels is None else torch.cat([mixed[:, :channels], strong[:, channels:]], dim=1)

    return guided_velocity


def noise(
    seed: int,
    images: Tensor,
    step: int,
    shape: tuple[int, ...],
    device: str | torch.device | None = None,
    normals: Callable[..., Tensor] | None = None,
) -> Tensor:
    """Standard normal numbers (B, *shape) float32, each a function of (seed, image, step, place in `shape`) alone.

    `images` (B,) and `step` lie in [0, 2³²); a `seed` outside [0, 2⁶⁴) is a ValueError; `device` is by default that of
    `images`. `normals` may be `normals_of` in compiled form, one kernel in place of many.
    """
    images = torch.as_tensor(images, dtype=torch.int64, device=device)
    size = math.prod(shape)
    blocks = torch.arange((size + 3) // 4, device=images.device)
    address = _address(seed, images[:, None], step, blocks, stream=0)
    numbers = (normals or normals_of)(*address)  # (B, size / 4, 4)
    return numbers.flatten(1)[:, :size].reshape(-1, *shape)


def normals_of(counter: tuple[Tensor, ...], key: tuple[Tensor, Tensor]) -> Tensor:
    """Four standard normal numbers (..., 4) float32 for each Philox address.

    Philox-4x32-10 (Salmon et al., Parallel random numbers: as easy as 1, 2, 3, SC 2011) with the seed as its key gives
    uniform numbers, which Box and Muller's transform makes normal. The transform runs in float64 and its result is
    rounded to float32, so that the last bit of a CPU's or a GPU's logarithm does not show.
    """
    uniforms = [(word.double() + 0.5) / 2**32 for word in philox(counter, key)]  # in (0, 1): the logarithm is finite
    normals = []
    for u, angle in (uniforms[:2], uniforms[2:]):
        radius = (-2 * u.log()).sqrt()
        normals += [radius * (2 * math.pi * angle).cos(), radius * (2 * math.pi * angle).sin()]
    return torch.stack(normals, dim=-1).float()


def uniform(seed: int, images: Tensor, draw: int, device: str | torch.device | None = None) -> Tensor:
    """Uniform numbers (B,) float64 in [0, 1), one an image for each `draw`: `noise`'s generator, another stream."""
    images = torch.as_tensor(images, dtype=torch.int64, device=device)
    high, low, *_ = philox(*_address(seed, images, draw, torch.zeros_like(images), stream=1))
    return ((high << 21) | (low >> 11)).double() / 2**53


def _address(seed: int, images: Tensor, step: int, blocks: Tensor, stream: int) -> tuple[tuple[Tensor, ...], ...]:
    """Philox's counter and key: tensors throughout, so that a compiled generator serves every step and seed."""
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed {seed}: give a number from 0 to 2^64 - 1")
    step, stream, low, high = (images.new_full((), word) for word in (step, stream, seed & 0xFFFFFFFF, seed >> 32))
    return (blocks, step, images, stream), (low, high)


def philox(counter: tuple[Tensor, ...], key: tuple[int | Tensor, int | Tensor]) -> tuple[Tensor, ...]:
    """Philox-4x32-10: four int64 tensors and two integers of 32 bits each -> four int64 tensors of 32 random bits each.

    The tensors of `counter` broadcast against each other. A product of two 32-bit numbers fills 64 bits; int64 wraps
    around, which leaves those bits right, and the masks drop the sign.
    """
    low_bits = 0xFFFFFFFF
    (a, b, c, d), (k, m) = counter, key
    for _ in range(10):
        p, q = a * 0xD2511F53, c * 0xCD9E8D57
        a, b = ((q >> 32) & low_bits) ^ b ^ k, q & low_bits
        c, d = ((p >> 32) & low_bits) ^ d ^ m, p & low_bits
        k, m = (k + 0x9E3779B9) & low_bits, (m + 0xBB67AE85) & low_bits
    return a, b, c, d
