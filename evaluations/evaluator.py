"""Command: the metrics of ADM's evaluation, with the same command line and the same printed lines.

    python -m evaluations.evaluator REF SAMPLES [--inception FILE | --encoder NAME]

REF is an npz in ADM's layout (reference.py) or images: npz, folder, zip, store, idx file. SAMPLES are images. With
`--encoder` the distance is named after that encoder, FD-NAME, and is no FID. README.md in this folder says what is
comparable with published tables. `torchrun -m evaluations.evaluator …` shares the images among processes.
"""

import argparse
import contextlib
import statistics
import time
from pathlib import Path

import torch

from evaluations.features import EncoderNetwork, Network, Summary, summarize
from evaluations.images import StoreImages
from evaluations.inception import Inception, find_weights
from evaluations.metrics import frechet_distance, inception_score, kid, precision_recall
from evaluations.reference import Reference, if_writable
from evaluations.samples import Samples
from memory.command import Help, execute
from memory.files import remove_stale, write_json
from memory.processes import join
from memory.provenance import peak_memory, provenance
from models.kernels import fitting

ENOUGH = 10_000  # samples below which a distance says more about their number than about the model


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Arguments of the command."""
    parser = argparse.ArgumentParser(prog="evaluations.evaluator", description=__doc__, formatter_class=Help)
    add = parser.add_argument
    add("reference", metavar="REF", type=Path, help="npz in ADM's layout, or images: npz, folder, zip, store, idx.gz")
    add("samples", metavar="SAMPLES", type=Path, nargs="?", help="images: npz with arr_0, folder, zip, store, idx.gz")
    add("--seeds", metavar="SAMPLES", type=Path, nargs="+", default=[], help="samples of more seeds: mean and spread")
    add_shared(parser)
    add("--save-reference", metavar="OUT.npz", type=Path, help="write REF in ADM's layout; SAMPLES may be left out")
    add("--out", metavar="FILE", type=Path, help="JSON of the results (default: beside SAMPLES)")
    args = parser.parse_args(argv)
    if args.samples is None and args.save_reference is None:
        parser.error("SAMPLES is missing (only --save-reference goes without)")
    if args.encoder and args.save_reference:
        parser.error("--encoder does not go with --save-reference, whose layout is Inception's")
    check_shared(parser, args)
    return args


def add_shared(parser: argparse.ArgumentParser) -> None:
    """Arguments of every command that scores images: which network, how many, how."""
    add = parser.add_argument
    add("--inception", metavar="FILE", help="Inception weights (default: $INCEPTION_WEIGHTS, or what fetch.sh got)")
    add("--encoder", metavar="NAME", help="encoder of models/encoder.py instead of Inception; it names the metrics")
    add("--encoder-weights", metavar="FILE", help="local weights of --encoder")
    add("--num-samples", metavar="N", type=int, help="use the first N of the samples (default: all)")
    add("--batch-size", metavar="B", type=int, help="images at once on a process (default: 256 on a GPU, 32 on a CPU)")
    add("--no-precision-recall", action="store_true", help="leave out what needs images of the reference, KID too")
    add("--no-cache", action="store_true", help="neither read nor write the reference's features beside REF")


def check_shared(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Leave with a usage error where the shared arguments contradict each other."""
    if args.encoder and args.inception:
        parser.error("--encoder does not go with --inception: choose one network")
    if args.encoder_weights and not args.encoder:
        parser.error("--encoder-weights needs --encoder")
    if args.batch_size is not None and args.batch_size < 1:
        parser.error(f"--batch-size {args.batch_size}: expected at least 1")


def load_network(args: argparse.Namespace, device: torch.device) -> Network:
    """The network that the shared arguments name."""
    if args.encoder:
        return EncoderNetwork(args.encoder, args.encoder_weights, device)
    return Inception(find_weights(args.inception), device)


def batch_size_of(args: argparse.Namespace, device: torch.device) -> int:
    """Images at once on a process, as given or as the device takes."""
    return args.batch_size or (256 if device.type == "cuda" else 32)


@fitting("try a smaller --batch-size")
def main(argv: list[str] | None = None) -> None:
    """Run the command; the first process prints and writes."""
    args, began, state = parse(argv), time.perf_counter(), join()
    batch_size = batch_size_of(args, state.device)

    sets = [Samples(path, args.num_samples) for path in [args.samples, *args.seeds] if path]
    reference = Reference(args.reference, use_moments=not args.encoder, use_images=not args.no_precision_recall)
    check_sets(reference, sets)
    if state.is_main_process:
        remove_stale(*{Path(path).parent for path in (args.reference, args.samples, args.out) if path})
    network = load_network(args, state.device)
    known = reference.summary(network, batch_size, state, cache=not args.no_cache)
    if args.save_reference and state.is_main_process:
        reference.save(args.save_reference, known, batch_size)
        print(f"wrote {args.save_reference}")
    results = []
    for samples in sets:
        found = summarize(samples.images, samples.count, range(samples.count), network, batch_size, state, "samples")
        if state.is_main_process:
            results.append(metrics(known, found, network.name, images=not args.no_precision_recall))
    if results:
        seconds = round(time.perf_counter() - began, 3)
        run = provenance(argv, state.num_processes) | {"seconds": seconds, "peak_memory": peak_memory()}
        report(results, sets, reference, network, run, args.out)
    state.destroy_process_group()


def check_sets(reference: Reference, sets: list[Samples]) -> None:
    """ValueError unless all images have one size, and the sets of samples one count and different seeds."""
    for samples in sets:
        for other in [sets[0].images] + [reference.images] * (reference.images is not None):
            if samples.images.size != other.size:
                sizes = f"{samples.images.size}, those of {other.path} {other.size}"
                raise ValueError(f"{samples.path}: its images are {sizes} (height, width); resize one side beforehand")
        if samples.count != sets[0].count:
            counts = f"{samples.count:,} samples, {sets[0].path} has {sets[0].count:,}"
            raise ValueError(f"{samples.path}: {counts}; give --num-samples")
    seeds = [samples.settings["seed"] for samples in sets if "seed" in samples.settings]
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"--seeds: the sets were sampled with seeds {seeds}; the spread needs different ones")


def metrics(reference: Summary, samples: Summary, network: str, images: bool) -> dict[str, float]:
    """All metrics by name; those of an encoder other than Inception carry its name."""
    inception = samples.probs is not None
    suffix = "" if inception else f"-{network}"
    values = {}
    if inception:
        values["Inception Score"] = inception_score(samples.probs)
    for name, mu, sigma in (("FID" if inception else "FD", "mu", "sigma"), ("sFID", "mu_s", "sigma_s")):
        if mu in samples.moments:
            pairs = (summary.moments[key] for summary in (reference, samples) for key in (mu, sigma))
            values[name + suffix] = frechet_distance(*pairs)
    if images:
        precision, recall = precision_recall(reference.features, samples.features)
        values["Precision" + suffix], values["Recall" + suffix] = precision, recall
        values[("KID" if inception else "KD") + suffix] = kid(reference.features, samples.features)
    return values


def warnings_about(network: Network, related: bool) -> list[str]:
    """Why numbers of a network may not be compared; `related`: it is of the family of the snippets' encoder."""
    warnings = []
    if related:
        warnings.append(f"{network.name} is of the family of the snippet encoder: not for comparison with other models")
    if not getattr(network, "published", True):
        warnings.append(
            "the Inception weights are not the published file: nothing here compares with published numbers"
        )
    return warnings


def exchanged(reference: Reference, sets: list[Samples]) -> list[str]:
    """A warning if the arguments look exchanged, which exchanges precision and recall; a store of samples alone may be
    meant: held-out images are scored as such."""
    folder = reference.path if reference.path.is_dir() else reference.path.parent
    if (folder / "samples.json").is_file() and any(isinstance(samples.images, StoreImages) for samples in sets):
        made = f"the reference {reference.path} was generated by sample_ddp.py and the samples are a store"
        return [f"{made}: the reference comes first"]
    return []


def report(
    results: list[dict[str, float]],
    sets: list[Samples],
    reference: Reference,
    network: Network,
    run: dict,
    out: Path | None,
) -> None:
    """Print ADM's lines, with the spread over seeds if there are several sets, and write the same as JSON."""
    count, first = sets[0].count, sets[0].path
    related = any(samples.related_to(network.name) for samples in sets)
    warnings = exchanged(reference, sets) + warnings_about(network, related)
    print(f"{count:,} samples of {first} against {reference.path} (sha256 {reference.digest[:12]})")
    for warning in warnings:
        print(f"warning: {warning}")
    summary, spread = {}, {}
    for name in results[0]:
        values = [result[name] for result in results]
        summary[name] = statistics.fmean(values)
        line, notes = f"{name}: {summary[name]:.6g}", []
        if len(values) > 1:
            spread[name] = statistics.stdev(values)
            notes.append(f"± {spread[name]:.3g}, standard deviation of {len(values)} seeds")
        if count < ENOUGH:
            biased = f"; below {ENOUGH:,} samples {name} is biased upward" if "FID" in name or "FD" in name else ""
            notes.append(f"N={count:,}{biased}")
        print(line + (f" ({'; '.join(notes)})" if notes else ""))

    path = out or first.with_name(f"{first.name if first.is_dir() else first.stem}.{network.name}.json")
    with contextlib.nullcontext() if out else if_writable(path):
        write_json(
            path,
            {
                "metrics": summary,
                "spread": spread,
                "num_samples": count,
                "protocol": sets[0].protocol(),
                "samples": [
                    {"path": str(samples.path), "metrics": result, "made": samples.made}
                    for samples, result in zip(sets, results, strict=True)
                ],
                "reference": {"path": str(reference.path), "sha256": reference.digest, "kept": len(reference.kept)},
                "network": network.identity(),
                "same_family_as_snippets": related,
                "warnings": warnings,
                "run": run,
            },
        )


if __name__ == "__main__":
    execute(main)
