"""Flow matching: the path between data and noise, the random draws of a training step, and the loss.

Time runs from t = 0 (data) to t = 1 (noise). A path x_t = α(t)·x + σ(t)·ε has the velocity v = α'(t)·x + σ'(t)·ε, and
the network regresses it (SiT, arXiv 2401.08740, eq. 1–5). The alignment term is REPA's (arXiv 2410.06940, eq. 8).
"""

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor


def per_sample(t: Tensor, x: Tensor) -> Tensor:
    """Reshape times (B,) so that they broadcast over `x` (B, ...)."""
    return t.reshape(-1, *[1] * (x.ndim - 1))


@dataclass(frozen=True)
class Interpolant:
    """A path x_t = α(t)·x + σ(t)·ε, with α(0) = σ(1) = 1 and α(1) = σ(0) = 0; each field maps times (B,) to (B,)."""

    alpha: Callable[[Tensor], Tensor]
    sigma: Callable[[Tensor], Tensor]
    dalpha: Callable[[Tensor], Tensor]
    dsigma: Callable[[Tensor], Tensor]

    def point(self, x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x_t (B, ...) of data `x` and `noise` (B, ...) at times `t` (B,) in [0, 1]."""
        return per_sample(self.alpha(t), x) * x + per_sample(self.sigma(t), x) * noise

    def velocity(self, x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """dx_t/dt (B, ...), the target of the regression."""
        return per_sample(self.dalpha(t), x) * x + per_sample(self.dsigma(t), x) * noise

    def score(self, velocity: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """∇ log p_t(x) = −E[ε | x_t]/σ from the marginal velocity (SiT, eq. 9); `t` (B,) in (0, 1], not 0.

        Eliminating the data from x_t and v gives ε = (α·v − α'·x_t) / (α·σ' − α'·σ).
        """
        alpha, sigma = per_sample(self.alpha(t), x), per_sample(self.sigma(t), x)
        dalpha, dsigma = per_sample(self.dalpha(t), x), per_sample(self.dsigma(t), x)
        return (dalpha * x - alpha * velocity) / (sigma * (alpha * dsigma - dalpha * sigma))


LINEAR = Interpolant(
    alpha=lambda t: 1 - t,
    sigma=lambda t: t,
    dalpha=lambda t: -torch.ones_like(t),
    dsigma=torch.ones_like,
)
COSINE = Interpolant(  # "generalised variance preserving" in SiT
    alpha=lambda t: torch.cos(t * (math.pi / 2)),
    sigma=lambda t: torch.sin(t * (math.pi / 2)),
    dalpha=lambda t: -torch.sin(t * (math.pi / 2)) * (math.pi / 2),
    dsigma=lambda t: torch.cos(t * (math.pi / 2)) * (math.pi / 2),
)
interpolants: dict[str, Interpolant] = {"linear": LINEAR, "cosine": COSINE}

# A training time as a function of a uniform number in [0, 1), i.e. the inverse of its cumulative distribution.
time_distributions: dict[str, Callable[[Tensor], Tensor]] = {
    "uniform": lambda u: u,
    "logit-normal": lambda u: torch.sigmoid(torch.special.ndtri(u)),  # mean 0, deviation 1: Esser et al., 2403.03206
}


def seed_of(*address: int) -> int:
    """One 63-bit seed for an address such as (seed, step); distinct addresses give unrelated seeds."""
    return int.from_bytes(hashlib.sha256(repr(address).encode()).digest()[:8]) >> 1


@dataclass(frozen=True)
class Draws:
    """Every random number of a global batch: they depend on (seed, step) and not on who computes which rows."""

    time: Tensor  # (B,) in [0, 1]
    noise: Tensor  # (B, C, H, W), the ε of the path
    posterior: Tensor  # (B, C, H, W), the noise that samples a latent from its VAE moments
    uniforms: Tensor  # (B, 2) in [0, 1), which rows lose their condition and which their label

    def __getitem__(self, rows: slice) -> "Draws":
        """The draws of some rows of the global batch."""
        return Draws(*(getattr(self, field.name)[rows] for field in fields(self)))


def draw(
    seed: int,
    step: int,
    batch_size: int,
    latent_shape: Sequence[int],
    time: str = "uniform",
    device: torch.device | str = "cpu",
) -> Draws:
    """Draw the random numbers of training step `step` for the whole global batch.

    Args:
        batch_size: B, the global batch; each process and micro-batch then takes its rows.
        latent_shape: (C, H, W).
        time: a key of `time_distributions`.
        device: where the generator runs; CPU and CUDA generators draw different numbers.
    """
    generator = torch.Generator(device).manual_seed(seed_of(seed, step))
    shape = (batch_size, *latent_shape)
    uniform_time = torch.rand(batch_size, generator=generator, device=device)
    return Draws(
        time=time_distributions[time](uniform_time),
        noise=torch.randn(shape, generator=generator, device=device),
        posterior=torch.randn(shape, generator=generator, device=device),
        uniforms=torch.rand(batch_size, 2, generator=generator, device=device),
    )


@dataclass(frozen=True)
class Losses:
    """Losses per sample, (B,) float32 each; `align` is None without the alignment term."""

    total: Tensor
    velocity: Tensor
    align: Tensor | None


class FlowMatchingLoss:
    """‖v_θ(x_t, t, c) − v‖² averaged over a latent, plus `align_coeff` × REPA's alignment term.

    Args:
        interpolant: the path between data and noise.
        align_coeff: weight of the alignment term; 0 leaves it out (REPA uses 0.5).
    """

    def __init__(self, interpolant: Interpolant = LINEAR, align_coeff: float = 0.0):
        self.interpolant = interpolant
        self.align_coeff = align_coeff

    def __call__(
        self, model: Callable, latents: Tensor, cond: object, draws: Draws, patches: Sequence[Tensor] = ()
    ) -> Losses:
        """Losses of a batch.

        Args:
            model: called as `model(x, t, cond, uniforms=...)`, with `return_tokens=True` for the alignment term.
            latents: (B, C, H, W), the data x.
            cond: what the model's embedder takes.
            draws: this batch's rows of `draw`.
            patches: one (B, T, F) of frozen patch tokens for each alignment head; read only if `align_coeff` > 0.
        """
        x_t = self.interpolant.point(latents, draws.noise, draws.time)  # (B, C, H, W)
        target = self.interpolant.velocity(latents, draws.noise, draws.time)  # (B, C, H, W)
        if self.align_coeff > 0:
            velocity, tokens = model(x_t, draws.time, cond, return_tokens=True, uniforms=draws.uniforms)
            align = alignment_loss(tokens, patches)  # (B,)
        else:
            velocity, align = model(x_t, draws.time, cond, uniforms=draws.uniforms), None
        error = (velocity.float() - target).square().flatten(1).mean(1)  # (B,)
        return Losses(error if align is None else error + self.align_coeff * align, error, align)


def alignment_loss(tokens: Sequence[Tensor], patches: Sequence[Tensor]) -> Tensor:
    """REPA's term: the negative cosine of a head's tokens to an encoder's patch tokens, averaged over tokens and heads.

    Args:
        tokens: a (B, T, F) from each alignment head.
        patches: the frozen encoder's (B, T, F) for each head.

    Returns:
        (B,) in [−1, 1].

    Raises:
        ValueError: a head and its target differ in shape.
    """
    for head, target in zip(tokens, patches, strict=True):
        if head.shape != target.shape:
            raise ValueError(
                f"alignment head gives tokens {tuple(head.shape)} but the encoder's patches are {tuple(target.shape)}: "
                "the latent's patch grid and the encoder's must have the same number of tokens"
            )
    cosines = [F.cosine_similarity(h.float(), p.float(), dim=-1) for h, p in zip(tokens, patches, strict=True)]
    return -torch.stack(cosines).mean((0, 2))  # (heads, B, T) -> (B,)
