"""The paper's claim in miniature: one command for each arm, which makes whatever it needs that is not there yet.

    python -m scripts.miniature glyphs label nearest-10 own --search            # a run of seed 0 for each setting
    python -m scripts.miniature glyphs label nearest-10 own --seeds 0 1 2       # the best of them, and other seeds
    python -m scripts.miniature glyphs label nearest-10 own --seeds 0 1 2 --again   # those without Heun's figures

evaluations/miniature.md is the protocol. Everything is done by the project's own commands, called one after another in
this process, and by the evaluator's functions, which read the references once; each log holds the commands' lines. What
is finished is skipped, so that runs can be spread over many calls, and `--seconds` begins none that would not end in
time. The same command may run several times at once, on one GPU or more (CUDA_VISIBLE_DEVICES): each takes what no
other is at. miniature_data.py holds data sets and arms, miniature_run.py one run.

Points are scored by Euler's method and, from 1,000 steps on (on fashion-6 from 500), by Heun's too, and copies are
looked for among the last samples of both. Runs from before that stay as they are,
until the command is given with `--again`: it moves their logs and weights to folders other/DATE/, and trains and scores
them anew, or takes the search's run of the same settings where that has been repeated. So it does with runs of other
settings, or that ended at other steps, which are not overwritten without it.

Reads   ROOT/sources/ (glyphs are rendered, Fashion-MNIST is Debian's package), and LOGS/DATASET/metric.safetensors,
        the encoder that scores, so that figures of different days compare
Writes  ROOT/{data,banks,runs,samples,claims}/…    LOGS/DATASET/ARM-SEED.json    LOGS/DATASET/search/ARM-SETTING.json
        LOGS/DATASET/controls.json          what real images score
"""

import argparse
import math
import time
from collections.abc import Sequence
from pathlib import Path

from memory.command import Help, execute
from memory.files import read_json
from scripts.arms import whole_steps
from scripts.miniature_data import ARMS, DATA, DataSet
from scripts.miniature_run import Run, Scores, searched_name

MIDDLE = 1e-3  # the learning rate at which scales are compared


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help)
    add = parser.add_argument
    add("dataset", choices=DATA, help="data set")
    add("arms", nargs="*", metavar="ARM", help=f"in the order to run: {', '.join(ARMS)}; none given: only the data")
    add("--seeds", type=int, nargs="+", default=[0], help="all arms run with the first, then all with the next")
    add("--search", action="store_true", help="search learning rate and scale, with seed 0")
    add("--lr", type=float, help="learning rate, instead of what the search found, or would try")
    add("--scale", type=float, help="factor on the condition, likewise")
    add("--steps", type=int, help="of training (default: 8,000, or 4,000 on fashion and the other sets of glyphs)")
    add("--num-images", type=int, default=10_000, help="samples that are scored")
    add("--model", default="SiT-S/4", help="preset of models/sit.py")
    add("--batch-size", type=int, default=256, help="of training")
    add("--variants", action="store_true", help="also sample the last checkpoint in the arm's other ways")
    add("--again", action="store_true", help="set aside what lacks figures or points or has other settings; do it anew")
    add("--seconds", type=float, default=math.inf, help="begin no run that would end later than this")
    add("--root", type=Path, default=Path("runs/miniature"), help="folder of everything large")
    add("--logs", type=Path, default=Path("benchmarks/miniature"), help="folder of the logs")
    args = parser.parse_args(argv)
    args.steps = args.steps or whole_steps(args.dataset)
    if unknown := [arm for arm in args.arms if arm not in ARMS]:
        parser.error(f"arms {', '.join(unknown)}: expected {', '.join(ARMS)}")
    if unsearched := [arm for arm in args.arms if args.search and ARMS[arm].like]:
        parser.error(f"--search: {', '.join(unsearched)} share another arm's settings; search that one")
    if args.search and DATA[args.dataset].like != args.dataset:
        parser.error(f"--search: {args.dataset} shares the settings of {DATA[args.dataset].like}; search there")
    return args


class Miniature:
    """The runs on one data set, and the search for their settings."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.data = args, DataSet(args)
        self.scores = Scores(self.data)
        self.searched, self.tries = args.logs / self.data.kind.like / "search", DATA[self.data.kind.like]
        self.began, self.longest = time.perf_counter(), 0.0

    def best(self, arm: str) -> dict:
        """Settings of the search's run with the lowest last FD on held-out images.

        Raises:
            ValueError: no run of the arm's search gave a score.
        """
        logs = [read_json(path) for path in sorted(self.searched.glob("*.json"))]
        scored = [log for log in logs if log["arm"] == arm and "copies" in log]
        if not scored:
            raise ValueError(f"{arm}: no run of the search in {self.searched} gave a score: give --lr and --scale")
        return min(scored, key=lambda log: log["curve"][-1]["held_out"]["fd"])["settings"]

    def scales(self, arm: str) -> tuple[float | None, ...]:
        """Scales that the search of an arm tries, or the one that is given."""
        given = self.tries.scales if self.args.scale is None else (self.args.scale,)
        return (None,) if ARMS[arm].condition == "none" else given

    def search(self, arms: Sequence[str]) -> None:
        """Runs of seed 0 over the scales, then over the other learning rates at the best scale; several processes share
        them, and the second part waits for the first. A learning rate or a scale that is given is the only one."""
        lr = self.args.lr or MIDDLE
        for wait in (False, True):
            for arm in arms:
                for scale in self.scales(arm):
                    self.tried(arm, lr, scale, wait)
                if wait and self.args.lr is None:
                    scale = self.best(arm)["scale"]
                    for other in self.tries.rates:
                        self.tried(arm, other, scale, wait=False)

    def tried(self, arm: str, lr: float, scale: float | None, wait: bool) -> None:
        """A run of the search, unless another process is at it; or, with `wait`, once that has ended."""
        with self.data.claimed(f"search-{searched_name(arm, lr, scale)}", wait) as mine:
            if mine:
                self.run(arm, 0, lr, scale)

    def settings(self, arm: str) -> tuple[float, float | None]:
        """Learning rate and scale of an arm: as given, or as found by a search that has ended, for which this waits.

        Raises:
            ValueError: a run of the search is missing, or none gave a score.
        """
        if self.args.lr and (self.args.scale or ARMS[arm].condition == "none"):
            return self.args.lr, self.args.scale
        like = ARMS[arm].like or arm
        for scale in self.scales(like):
            self.ended(searched_name(like, MIDDLE, scale))
        scale = self.best(like)["scale"]
        for lr in self.tries.rates:
            self.ended(searched_name(like, lr, scale))
        best = self.best(like)
        return self.args.lr or best["lr"], self.args.scale or best["scale"]

    def ended(self, name: str) -> None:
        """Wait until no process is at a run of the search; raise ValueError if it has not ended."""
        with self.data.claimed(f"search-{name}", wait=True):
            path = self.searched / f"{name}.json"
            log = read_json(path) if path.is_file() else {}
            if not log.keys() & {"copies", "diverged"}:
                raise ValueError(f"nothing in {path}, or half a run: run --search, or give --lr and --scale")

    def run(self, arm: str, seed: int, lr: float, scale: float | None) -> None:
        """Do what is left of a run, unless the time would be over."""
        began, run = time.perf_counter(), Run(self.args, self.scores, arm, seed, lr, scale)
        if run.ended():
            return
        if began - self.began + self.longest > self.args.seconds:
            print(f"{run.name}: not begun, its time would be over", flush=True)
            return
        run.go()
        self.longest = max(self.longest, time.perf_counter() - began)


def main(argv: list[str] | None = None) -> None:
    """Prepare the data set, then run the arms: all at the first seed, then all at the next."""
    args = parse(argv)
    miniature = Miniature(args)
    if args.search:
        miniature.search(args.arms)
        return
    for seed in args.seeds:
        for arm in args.arms:
            with miniature.data.claimed(f"{arm}-{seed}", wait=False) as mine:
                if mine:
                    miniature.run(arm, seed, *miniature.settings(arm))


if __name__ == "__main__":
    execute(main)
