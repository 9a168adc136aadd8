"""The table *published / reproduced / command*, and what everything cost, from the results of the commands.

    python -m scripts.report samples/*/ banks/*/ data/*/ runs/*/ --out report.md

Takes, in any order, JSON files of evaluations.evaluator or folders of samples, beside which it leaves them, and the
folders of banks, stores and training runs, which are found again by the hashes that the samples.json inside each result
names. Prints Markdown:

    published and reproduced   a line for each figure quoted from a paper (scripts/quoted.py), and below it what the
                               published weights and our own training scored; a line that was not run stays empty, with
                               its command beside it
    other results              a table for each number of images, reference and network: these do not compare
    not for comparison         what a network of the snippets' family says
    cost                       operations and GPU-hours of encoding, bank and training, floats kept, bits of a condition
"""

import argparse
import functools
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dataset import read_meta
from evaluations.card import table
from evaluations.evaluator import ENOUGH
from evaluations.inception import WEIGHTS
from evaluations.samples import family
from memory.command import Help, execute
from memory.files import atomic, read_json, reading
from models.published import GMEM, REPA, SIT
from samplers import sde_samplers
from scripts import cost
from scripts.quoted import BATCH, QUOTED, Quoted

IMAGES = 50_000  # of papers' figures
REFERENCE = "VIRTUAL_imagenet256_labeled.npz"  # of papers' figures, by ADM
METRICS = ("FID", "sFID", "Inception Score", "Precision", "Recall")
METHODS = {GMEM: "GMem", REPA: "REPA", SIT: "SiT"}
SCORE = f"python -m evaluations.evaluator {REFERENCE} SAMPLES"
# What networks were trained on, by the tag of timm's weights.
TRAINED_ON = {"lvd142m": "LVD-142M, no labels", "in1k": "ImageNet-1k, labels", "lvd1689m": "LVD-1689M, no labels"}

# What is read of a result, a bank and a store; see `check_form`.
SETTINGS = dict.fromkeys(("sampler", "condition", "encoder"), (str, None)) | {"guidance": (dict, None)}
SETTINGS |= dict.fromkeys(("evaluations", "training_steps"), (int, None)) | {"bank": ({str: str}, None)}
ARGS = {"align_coeff": (float, None), "batch_size": (int, None), "precision": (str, None)}
TRAINED = {"format": (str, None), "args": ARGS, "model_config": dict, "store": ({"fingerprint": str}, None)}
MADE = {"images_per_second": (float, None), "checkpoint": (str, None), "bank_shape": ([int], None)}
MADE |= {"device": (str, None), "trained": (TRAINED, None)}
RESULT = {
    "metrics": {str: float},
    "num_samples": int,
    "protocol": str,
    "same_family_as_snippets": bool,
    "reference": {"path": str, "sha256": str},
    "network": {"name": str, "sha256": (str, None)},
    "run": {"code": str},
    "samples": [{"path": str, "made": {"settings": (SETTINGS, None), "run": (MADE, None)}}],
}
BANK = {"sha256": {"bank.pth": str}, "rule": (str, None)} | dict.fromkeys(("k", "dim", "iterations"), (int, None))
BANK |= {"run": ({"seconds": float, "processes": int}, None)}
STORE = {"codec": {"name": str}, "encoders": {str: dict}, "runs": ([{"process_seconds": float}], None)}


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help)
    add = parser.add_argument
    add("sources", metavar="SOURCE", type=Path, nargs="*", help="evaluator's JSON; folder of samples, a bank, …")
    add("--out", metavar="FILE", type=Path, help="write the Markdown here too")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Read, print and write."""
    args = parse(argv)
    sources = Sources(args.sources)
    page = "\n\n".join([*reproduced(sources.results), *others(sources.results), *costs(sources)]) + "\n"
    print(page, end="")
    if args.out:
        with atomic(args.out) as temporary:
            temporary.write_text(page)


class Result:
    """One result of the evaluator, with what the samples' maker said."""

    def __init__(self, path: Path):
        found = read_json(path)  # other commands of evaluations/ write samples, too, but no metrics of them
        if not (found.get("metrics") and found.get("samples")):
            raise ValueError(f"{path} is no result of evaluations.evaluator; give such JSON files, or folders")
        self.path, self.json = path, read_json(path, **RESULT)
        made = self.json["samples"][0]["made"]
        self.settings, self.run = made.get("settings") or {}, made.get("run") or {}
        self.trained = self.run.get("trained") or {}
        file = Path(self.json["samples"][0]["path"])
        self.title = file.parent.name if file.name == "samples.npz" else file.stem  # as sample_ddp.py names it

    @property
    def method(self) -> str | None:
        """Whose method trained the network: by the file it came in, or by its condition and alignment."""
        form, condition = self.trained.get("format"), self.settings.get("condition")
        if form or condition is None:
            return METHODS.get(form)
        aligned = (self.trained.get("args", {}).get("align_coeff") or 0) > 0
        return {"snippet": "GMem", "label": "REPA" if aligned else "SiT"}.get(condition)

    @property
    def kind(self) -> str:
        """`re-evaluated`: others' weights; `retrained`: ours."""
        return "re-evaluated" if self.trained.get("format") else "retrained"

    @property
    def sampler(self) -> str:
        return "SDE" if self.settings.get("sampler") in sde_samplers else "ODE"

    @property
    def protocol(self) -> tuple[int, str, str]:
        """What must be equal for two results to compare: number of images, reference, network."""
        network = self.json["network"]
        return self.json["num_samples"], self.json["reference"]["sha256"], f"{network['name']} {network.get('sha256')}"

    @property
    def as_papers(self) -> bool:
        """Whether its figures may stand beside published ones."""
        return (
            self.json["num_samples"] == IMAGES
            and Path(self.json["reference"]["path"]).name == REFERENCE
            and (self.json["network"].get("sha256") or "").startswith(Path(WEIGHTS).stem.rpartition("-")[2])
            and not self.json["same_family_as_snippets"]
        )

    def reproduces(self, quoted: Quoted) -> bool:
        """Whether it was trained, as far as the file says, and sampled as the quoted figure was."""
        guidance = self.settings.get("guidance")
        facts = [
            (self.method, quoted.method),
            ((self.trained.get("model_config") or {}).get("model"), quoted.model),
            (self.sampler, quoted.sampler),
            (guidance and {name: guidance.get(name) for name in quoted.guidance or guidance}, quoted.guidance),
        ]
        if quoted.evaluations is not None:
            facts.append((self.settings.get("evaluations"), quoted.evaluations))
        if self.settings.get("training_steps") is not None:
            facts.append((self.settings["training_steps"], quoted.training_steps))
        elif quoted.re_evaluate is None:
            return False  # the published file does not say how long: it is the one that can be sampled
        return self.as_papers and all(ours == theirs for ours, theirs in facts)

    def figures(self, names: Sequence[str]) -> dict[str, str]:
        """Its metrics as text."""
        return {name: f"{self.json['metrics'][name]:.4g}" for name in names if name in self.json["metrics"]}


@dataclass
class Sources:
    """Results, and what they were made from by its hash: banks, stores; runs by their folder."""

    results: list[Result]
    banks: dict[str, dict]
    stores: dict[str, dict]
    runs: list[Path]

    def __init__(self, paths: list[Path]):
        self.results, self.banks, self.stores, self.runs = [], {}, {}, []
        for path in paths:
            if path.is_file():
                self.results.append(Result(path))
            elif (path / "bank.json").is_file():
                bank = read_json(path / "bank.json", **BANK)
                self.banks[bank["sha256"]["bank.pth"]] = bank
            elif (path / "meta.json").is_file():
                meta = read_meta(path) | read_json(path / "meta.json", **STORE)
                self.stores[meta["fingerprint"]] = meta
            elif (path / "config.json").is_file():
                self.runs.append(path.resolve())
            elif (path / "samples.json").is_file():
                results = [*sorted(path.glob("samples.*.json")), *sorted(path.parent.glob(f"{path.name}.*.json"))]
                self.results += map(Result, results)
                if not results:
                    print(
                        f"note: {path} is not scored yet: python -m evaluations.evaluator REF {path}", file=sys.stderr
                    )
            else:
                raise ValueError(f"{path}: expected a JSON file, or the folder of samples, a bank, a store or a run")

    def bank(self, result: Result) -> dict | None:
        """bank.json of the bank that the samples were drawn from."""
        return self.banks.get((result.settings.get("bank") or {}).get("bank.pth"))

    def store(self, result: Result) -> dict | None:
        """meta.json of the store that the network was trained on."""
        return self.stores.get((result.trained.get("store") or {}).get("fingerprint"))

    def training(self, result: Result) -> Path | None:
        """The folder of the run that the sampled checkpoint lies in."""
        checkpoint = Path(result.run.get("checkpoint") or "").resolve()
        return next((run for run in self.runs if run in checkpoint.parents), None)


def reproduced(results: list[Result]) -> list[str]:
    """The table of quoted figures, and below each what was reproduced or the command that would."""
    comparable = [result for result in results if result.as_papers]
    digests = {result.json["reference"]["sha256"] for result in comparable}
    if len(digests) > 1:
        files = ", ".join(f"{result.path} ({result.json['reference']['sha256'][:12]})" for result in comparable)
        raise ValueError(f"two different files are called {REFERENCE}: {files}; find out which one is ADM's")
    rows = []
    for quoted in QUOTED:
        sampler = quoted.sampler if quoted.evaluations is None else f"{quoted.sampler} {quoted.evaluations}"
        sampler += f", guidance {quoted.guidance['scale']}" if quoted.guidance else ""
        what = {"": f"{quoted.method} {quoted.model}", "steps": f"{quoted.training_steps:,}", "sampler": sampler}
        figures = {name: f"{quoted.metrics[name]:g}" if name in quoted.metrics else "" for name in METRICS}
        flop = f"{training_flop(quoted.method, quoted.model, BATCH * quoted.training_steps):.2e}"
        rows.append(what | {"training FLOP": flop, "figures are": "quoted"} | figures | {"from": quoted.source})
        for kind, command in (("re-evaluated", quoted.re_evaluate), ("retrained", quoted.retrain)):
            found = [r.figures(METRICS) for r in comparable if r.kind == kind and r.reproduces(quoted)]
            for values in found or [{}] * (command is not None):
                rows.append(dict.fromkeys(what, "") | {"figures are": kind} | values | {"from": f"`{command}`"})
    digest = f", sha256 {digests.pop()[:12]} here" if digests else ""
    return [
        "## Published and reproduced",
        f"ImageNet 256×256, {IMAGES:,} samples, reference {REFERENCE}{digest}. A line without figures was not run. "
        "Its command makes the samples, or the network, which `CHECKPOINT=RUN bash scripts/sample-…-xl.sh` samples; "
        f"`{SCORE}` scores them. Training FLOP are counted at {BATCH} images a step, which GMem does not state.",
        table(rows),
    ]


@functools.cache
def training_flop(method: str, model: str, images: int) -> int:
    """Of a published training, counted from the network without its alignment head."""
    condition = "snippet" if method == "GMem" else "label"
    return cost.training_flop(cost.network({"model": model, "condition": condition}), images)


def others(results: list[Result]) -> list[str]:
    """A table for each protocol of the results that do not compare with papers, the snippets' family last."""
    known = [result for result in results if any(result.reproduces(quoted) for quoted in QUOTED)]
    left = sorted((r for r in results if r not in known), key=lambda r: r.json["same_family_as_snippets"])
    parts, groups = [], {}
    for result in left:
        groups.setdefault((result.json["same_family_as_snippets"], result.protocol), []).append(result)
    for (related, (count, digest, _)), group in groups.items():
        heading = "## Not for comparison: the network is of the snippets' family" if related else "## Other results"
        if heading not in parts:
            parts.append(heading)
        first = group[0].json
        few = "" if count >= ENOUGH else f" Below {ENOUGH:,} samples every distance is biased upward."
        parts.append(
            f"{count:,} samples against {Path(first['reference']['path']).name} (sha256 {digest[:12]}), "
            f"{first['network']['name']}.{few}"
        )
        parts.append(
            table(
                [
                    {"samples": result.title, "steps": thousands(result.settings.get("training_steps"))}
                    | {"sampled by": result.json["protocol"].partition(", ")[2]}
                    | result.figures(list(result.json["metrics"]))
                    | {"code": result.json["run"]["code"][:12]}
                    for result in group
                ]
            )
        )
    return parts


def costs(sources: Sources) -> list[str]:
    """What each result's network took to make, and what it holds."""
    rows = []
    for result in sources.results:
        if not result.trained:
            continue
        bank, meta, run = sources.bank(result), sources.store(result), sources.training(result)
        args = result.trained["args"]
        with reading(f"{result.path}, its network"):
            model, (floats, bits) = cost.network(result.trained["model_config"]), memory_of(result)
        row = {
            "samples": result.title,
            "network floats": f"{sum(parameter.numel() for parameter in model.parameters()):,}",
            "bank floats": thousands(floats),
            "condition bits": "" if bits is None else f"{bits:.1f}",
            "encoder": encoder_of(result, meta),
            "flips": "" if meta is None else "yes" if meta["num_views"] == 2 else "no",
            "precision": args.get("precision") or "",
            "batch": thousands(args.get("batch_size")),
        }
        steps, encoder = result.settings.get("training_steps"), result.settings.get("encoder")
        flop = {"encoding": None, "bank": None, "training": None}
        hours = dict(flop)
        if meta and encoder in meta["encoders"]:
            flop["encoding"], hours["encoding"] = cost.encoding_flop(meta, encoder), cost.encoding_hours(meta)
        if bank and meta:
            flop["bank"], hours["bank"] = cost.bank_flop(bank, meta["num_images"]), cost.bank_hours(bank)
        if steps and args.get("batch_size"):
            flop["training"] = cost.training_flop(model, steps * args["batch_size"])
        if run:
            hours["training"] = cost.training_hours(run)
        row |= {f"{part} FLOP": "" if n is None else f"{n:.2e}" for part, n in flop.items()}
        row |= {f"{part} hours": "" if n is None else f"{n:.3g}" for part, n in hours.items()}
        made = result.run.get("images_per_second"), result.run.get("device")
        rows.append(row | {"images/s": "" if None in made else f"{made[0]:.2f} on {made[1]}"})
    if not rows:
        return []
    return [
        "## Cost",
        "Floating-point operations are counted, two for a multiply-add and three forwards for a training step; hours "
        "are of one GPU, or one process on a CPU, as the commands noted them. What is empty was not given or noted.",
        table(rows),
    ]


def memory_of(result: Result) -> tuple[int | None, float | None]:
    """Floats kept in the bank, and the bits that its K rows and the labels tell of an image; None without a bank, for
    snippets from a file."""
    config, shape = result.trained["model_config"], result.run.get("bank_shape")
    bits = math.log2(config["num_classes"]) if "label" in config["condition"] else 0.0
    if "snippet" not in config["condition"]:
        return 0, bits
    return (shape[0] * shape[1], bits + math.log2(shape[0])) if shape else (None, None)


def encoder_of(result: Result, meta: dict | None) -> str:
    """The snippets' encoder, and what it was trained on as far as its weights' name says."""
    name = result.settings.get("encoder")
    if not name:
        return ""
    model = cost.encoder_of(meta, name)["model"] if meta and name in meta["encoders"] else name
    tag = model.partition(".")[2].partition("_")[0] or {"dinov2": "lvd142m", "efficientnet": "in1k"}.get(family(name))
    return f"{name} ({TRAINED_ON.get(tag, tag or 'training data not known')})"


def thousands(number: int | None) -> str:
    return "" if number is None else f"{number:,}"


if __name__ == "__main__":
    execute(main)
