"""Figures quoted from papers, each with the commands of this project that reproduce it: their one place.

All are of ImageNet at 256×256: 50,000 samples against ADM's reference. Second-hand figures were read in another paper's
table.
"""

from dataclasses import dataclass

BATCH = 256  # images of a training step in all of them
ADAPTIVE = None  # evaluations of a solver that chooses its own steps (dopri5)


@dataclass(frozen=True)
class Quoted:
    """One row of a paper: what was trained, how it was sampled, what it scored, and where that is written.

    `re_evaluate` is the command that samples the published weights, `retrain` the one that makes them anew; None where
    there is none.
    """

    method: str
    model: str
    training_steps: int
    sampler: str
    evaluations: int | None
    guidance: dict | None  # what samples.json must say of it
    metrics: dict[str, float]
    source: str
    re_evaluate: str | None
    retrain: str | None


def _gmem(steps: int, fid: float, published: bool = False) -> Quoted:
    """GMem's first release."""
    sample = "bash scripts/sample-gmem-xl.sh" if published else None
    retrain = f"STEPS={steps} bash scripts/train-gmem-xl.sh"
    return Quoted("GMem", "SiT-XL/2", steps, "SDE", 250, None, {"FID": fid}, "arXiv 2412.08781", sample, retrain)


def _repa(steps: int, fid: float, scale: float | None = None, published: bool = False) -> Quoted:
    """SiT with REPA's alignment; guided on the part of the times nearest to data."""
    sample = f"{_given(scale)}bash scripts/sample-repa-xl.sh" if published else None
    retrain, source = f"STEPS={steps} bash scripts/train-repa-xl.sh", "arXiv 2410.06940, second-hand"
    guidance = scale and {"scale": scale, "interval": [0.0, 0.7]}
    return Quoted("REPA", "SiT-XL/2", steps, "SDE", 250, guidance, {"FID": fid}, source, sample, retrain)


def _sit(
    model: str, steps: int, ode: float, sde: float, scale: float | None = None, published: bool = False, **others: float
) -> list[Quoted]:
    """SiT by both samplers, guided on the first channels; the `others` are the SDE's metrics besides FID."""
    sample = f"{_given(scale)}bash scripts/sample-sit-xl.sh" if published else None
    out = "OUT=samples/sit-xl-ode" + (f"-guided-{scale} " if scale else " ")
    by_ode = f"{out}{sample} --sampler heun --steps 125" if published else None
    retrain = f"STEPS={steps} MODEL={model} OUT=runs/{model.lower().replace('/', '-')} bash scripts/train-sit-xl.sh"
    source, guidance = "arXiv 2401.08740", scale and {"scale": scale, "channels": 3}
    return [
        Quoted("SiT", model, steps, "ODE", ADAPTIVE, guidance, {"FID": ode}, source, by_ode, retrain),
        Quoted("SiT", model, steps, "SDE", 250, guidance, {"FID": sde} | others, source, sample, retrain),
    ]


def _given(scale: float | None) -> str:
    return "" if scale is None else f"GUIDANCE={scale} "


LONG = {"sFID": 6.32, "Inception Score": 131.7, "Precision": 0.68, "Recall": 0.67}  # of SiT-XL/2 after 7M steps
QUOTED: tuple[Quoted, ...] = (
    _gmem(250_000, 5.75),
    _gmem(2_000_000, 3.56, published=True),
    _repa(50_000, 52.3),
    _repa(100_000, 19.4),
    _repa(200_000, 11.1),
    _repa(400_000, 7.9),
    _repa(1_000_000, 6.4),
    _repa(4_000_000, 5.9, published=True),
    _repa(4_000_000, 1.42, scale=1.8, published=True),
    *_sit("SiT-S/2", 400_000, ode=58.97, sde=57.64),
    *_sit("SiT-B/2", 400_000, ode=34.84, sde=33.02),
    *_sit("SiT-L/2", 400_000, ode=20.01, sde=18.79),
    *_sit("SiT-XL/2", 400_000, ode=18.04, sde=17.19),
    *_sit("SiT-XL/2", 7_000_000, ode=9.35, sde=8.26, published=True, **LONG),
    *_sit("SiT-XL/2", 7_000_000, ode=2.15, sde=2.06, scale=1.5, published=True),
)
