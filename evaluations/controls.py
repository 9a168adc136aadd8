"""Command: the samples' metrics beside those of real images, without which no FID can be read.

    python -m evaluations.controls REF SAMPLES --store data/NAME --bank banks/NAME --out controls.json

Four sets are scored by the evaluator's own functions, against REF and against the held-out images in STORE-holdout:

    samples                          as the evaluator scores them
    random training images           what a perfect memory scores
    training images of the snippets  the one nearest to each snippet that the samples were drawn with: pure copying
    held-out images                  the floor: real, new, and of the same distribution

Store and its held-out part must keep their images (`encode_dataset --keep-images`). Takes the options of the evaluator
that choose the network; `torchrun -m evaluations.controls …` shares the images among processes.
"""

import argparse
import itertools
import time
from pathlib import Path

import numpy as np
import torch

from dataset import LatentDataset
from evaluations.card import score_tables
from evaluations.copies import open_holdout
from evaluations.evaluator import (
    ENOUGH,
    add_shared,
    batch_size_of,
    check_sets,
    check_shared,
    load_network,
    metrics,
    warnings_about,
)
from evaluations.features import summarize
from evaluations.images import ChosenImages, ImageSet
from evaluations.reference import Reference
from evaluations.samples import Samples
from evaluations.search import FeatureSpace, nearest
from memory.bank import MemoryBank, snippet_rules
from memory.command import Help, execute
from memory.files import sha256, write_json
from memory.processes import join
from memory.provenance import provenance
from models.kernels import fitting
from samplers import SNIPPET_DRAW, noise, uniform

RANDOM, COPIED = "random training images", "training images of the snippets"
DRAWN = 1024  # snippets drawn at once, since each takes the whole starting noise of its image


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Arguments of the command."""
    parser = argparse.ArgumentParser(prog="evaluations.controls", description=__doc__, formatter_class=Help)
    add = parser.add_argument
    add("reference", metavar="REF", type=Path, help="of the training images: npz in ADM's layout, or images")
    add("samples", metavar="SAMPLES", type=Path, help="what sample_ddp.py wrote: its folder or samples.npz")
    add("--store", type=Path, required=True, help="store of the training images; STORE-holdout lies beside it")
    add("--bank", type=Path, required=True, help="the bank that the samples' snippets were drawn from")
    add("--out", metavar="FILE", type=Path, required=True, help="JSON of the results")
    add("--draws", type=int, default=1, help="of random training images; several also tell their standard deviation")
    add_shared(parser)
    args = parser.parse_args(argv)
    if args.draws < 1:
        parser.error(f"--draws {args.draws}: expected 1 or more")
    check_shared(parser, args)
    return args


@fitting("try a smaller --batch-size")
def main(argv: list[str] | None = None) -> None:
    """Run the command; the first process prints and writes."""
    args, began, state = parse(argv), time.perf_counter(), join()
    samples, holdout = Samples(args.samples, args.num_samples), open_holdout(args.store, None)
    bank = MemoryBank.load(args.bank)
    store = check_origin(samples, bank, args)
    with_images = not args.no_precision_recall
    references = {
        "training": Reference(args.reference, use_moments=not args.encoder, use_images=with_images),
        "held-out": Reference(holdout.path, use_moments=False, use_images=with_images),
    }
    for reference in references.values():
        check_sets(reference, [samples])
    network, batch_size = load_network(args, state.device), batch_size_of(args, state.device)

    copied = rows_of_snippets(samples, bank.to(state.device), store, state.device)
    sets: dict[str, ImageSet] = {
        "samples": samples.images,
        RANDOM: ChosenImages(store.path, spread(len(store), samples.count)),
        COPIED: ChosenImages(store.path, copied),
        "held-out images": ChosenImages(holdout.path, spread(len(holdout), samples.count)),
    }
    known = {name: ref.summary(network, batch_size, state, not args.no_cache) for name, ref in references.items()}
    counts = {title: min(len(images), samples.count) for title, images in sets.items()}
    found = {
        title: summarize(images, counts[title], range(counts[title]), network, batch_size, state, title)
        for title, images in sets.items()
    }
    draws = [found[RANDOM]]
    for draw in range(1, args.draws):
        images = ChosenImages(store.path, spread(len(store), samples.count, draw))
        number = len(images)
        draws.append(summarize(images, number, range(number), network, batch_size, state, f"{RANDOM}, draw {draw + 1}"))

    if state.is_main_process:  # no other process waits for it any more
        rows = {title: {"num_images": count, "metrics": {}} for title, count in counts.items()}
        for title, name in itertools.product(sets, references):
            if (title, name) != ("held-out images", "held-out"):
                values = metrics(known[name], found[title], network.name, with_images)
                rows[title]["metrics"][name] = values
        if len(draws) > 1 and counts[RANDOM] < len(store):
            several = {
                name: [metrics(known[name], summary, network.name, with_images) for summary in draws]
                for name in references
            }
            share = counts[RANDOM] / len(store)
            rows[RANDOM]["deviation"] = {name: deviation(values, share) for name, values in several.items()}
        related = samples.related_to(network.name)
        warnings = warnings_about(network, related)
        if samples.count < ENOUGH:
            warnings.append(f"{samples.count:,} samples: below {ENOUGH:,} every distance is biased upward")
        result = {
            "rows": rows,
            "different_copies": len(set(copied)),
            "samples": {"path": str(samples.path), "made": samples.made},
            "references": {
                name: {"path": str(reference.path), "sha256": reference.digest}
                for name, reference in references.items()
            },
            "network": network.identity(),
            "same_family_as_snippets": related,
            "warnings": warnings,
            "run": provenance(argv, state.num_processes) | {"seconds": round(time.perf_counter() - began, 3)},
        }
        print("\n\n".join([score_tables(result), *(f"warning: {warning}" for warning in warnings)]))
        write_json(args.out, result)
    state.destroy_process_group()


def check_origin(samples: Samples, bank: MemoryBank, args: argparse.Namespace) -> LatentDataset:
    """The store with the snippet encoder's features; ValueError unless samples, bank and store belong together."""
    made = samples.settings
    if made.get("snippets") not in snippet_rules:
        raise ValueError(
            f"{args.samples}: its samples.json says snippets = {made.get('snippets')!r}; only draws from a bank, "
            f"{' or '.join(snippet_rules)}, can be repeated here"
        )
    for file, expected in made["bank"].items():
        if sha256(bank.path.with_name(file)) != expected:
            raise ValueError(f"--bank {args.bank}: {file} is not the file that {args.samples} were sampled with")
    store = LatentDataset(args.store, made["encoder"])
    origin = bank.meta.get("store_fingerprint", store.meta["fingerprint"])
    if origin != store.meta["fingerprint"]:
        raise ValueError(f"--store {args.store}: the bank {args.bank} was built from another, {bank.meta['store']}")
    return store


def rows_of_snippets(samples: Samples, bank: MemoryBank, store: LatentDataset, device: torch.device) -> list[int]:
    """The training image nearest to the snippet of each sample, by the features that the snippets are made of."""
    settings, shape = samples.settings, tuple(store.codec["latent_shape"])
    drawn = []
    for images in torch.arange(samples.count).split(DRAWN):
        z = noise(settings["seed"], images, 0, shape, device)  # (B, C, h, w)
        u = uniform(settings["seed"], images, SNIPPET_DRAW)  # (B,)
        drawn.append(snippet_rules[settings["snippets"]](bank, z, u).to(device))
    different, back = torch.cat(drawn).unique(return_inverse=True)
    space = FeatureSpace(settings["encoder"])
    found = nearest(space.points(bank[different]), space.stored(store.path), space, title="images of the snippets")
    return found.rows[back].tolist()


def spread(count: int, number: int, draw: int = 0) -> list[int]:
    """Random rows of a store, at most `number` of its `count`, ascending; each draw the same in every run."""
    return sorted(np.random.default_rng(draw).permutation(count)[:number].tolist())


def deviation(draws: list[dict[str, float]], share: float) -> dict[str, float]:
    """Standard deviation of each metric over several draws, each `share` of all images; for independent images, as
    samples are, since draws that share images differ less."""
    return {name: float(np.std([values[name] for values in draws], ddof=1)) / (1 - share) ** 0.5 for name in draws[0]}


if __name__ == "__main__":
    execute(main)
