"""Command: are the samples copies of training images? Measured against real images that cannot be copies.

    python -m evaluations.copies --store data/NAME --samples samples/NAME --encoder ENCODER --out audits/NAME

For each sample, the nearest training image of all by latent distance and, with `--encoder`, by the features of an
encoder that the store holds (`encode_dataset --add ENCODER`) and that is unrelated to the one that made the snippets.
The same is done for the held-out images in STORE-holdout, and their distances say which are suspicious. Two figures:

    near copies    share of samples within the distance that 1% of held-out images reach, the threshold; beside it,
                   within that of 5%, since a few images with twins in the training set can set the first one alone
    authenticity   share of samples farther from their nearest training image than that image is from its own nearest
                   other training image (Alaa et al. 2022, arXiv 2102.08921, section 3)

Writes  OUT/copies.json             both, for samples and held-out images, with the most suspicious pairs
        OUT/distances.png           how the distances are distributed
        OUT/neighbours.png          the first samples beside their nearest training images, in the first space
        OUT/suspicious-SPACE.png    the pairs at the smallest distances

`torchrun -m evaluations.copies …` shares the samples among processes. README.md in this folder says what an audit
cannot show.
"""

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from matplotlib.figure import Figure
from torchvision.utils import make_grid, save_image

from dataset import NAMES, LatentDataset, holdout_path
from evaluations.features import gathered, shares
from evaluations.samples import Samples
from evaluations.search import FeatureSpace, LatentSpace, Space, nearest
from memory.command import Help, execute
from memory.files import atomic, write_json
from memory.processes import join
from memory.provenance import provenance
from models.autoencoder import Codec, check_codec, latents_from_moments, load_codec, to_uint8
from models.encoder import load_encoder
from models.kernels import fitting

THRESHOLD = 0.01  # share of held-out images within the distance that counts as a near copy
WIDE = 0.05  # the same of the wider distance, whose figures stand beside
MOST_HELD_OUT = 10_000  # held-out images that are searched for, evenly spread
FEW_HELD_OUT = 1000  # below which the threshold rests on fewer than ten images
PAIRS = 64  # in a sheet
QUANTILES = (0, 0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 1)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Arguments of the command."""
    parser = argparse.ArgumentParser(prog="evaluations.copies", description=__doc__, formatter_class=Help)
    add = parser.add_argument
    add("--store", type=Path, required=True, help="store of the training images; STORE-holdout beside it calibrates")
    add("--samples", type=Path, required=True, help="images: npz with arr_0, or folder")
    add("--encoder", metavar="NAME", help="compare by these features of the store too, first of all")
    add("--encoder-weights", metavar="FILE", help="local weights of --encoder")
    add("--codec", help="name or folder of the store's codec, where it has moved")
    add("--num-samples", metavar="N", type=int, help="use the first N of the samples (default: all)")
    add("--batch-size", metavar="B", type=int, default=64, help="images at once through the networks (default: 64)")
    add("--out", type=Path, required=True, help="folder for the results")
    args = parser.parse_args(argv)
    if args.encoder_weights and not args.encoder:
        parser.error("--encoder-weights needs --encoder")
    if args.batch_size < 1:
        parser.error(f"--batch-size {args.batch_size}: expected at least 1")
    return args


@fitting("try a smaller --batch-size")
def main(argv: list[str] | None = None) -> None:
    """Run the command; the first process prints and writes."""
    args, began, state = parse(argv), time.perf_counter(), join()
    store, holdout = LatentDataset(args.store, args.encoder), open_holdout(args.store, args.encoder)
    samples = Samples(args.samples, args.num_samples)
    side = store.meta["image_size"]
    if samples.images.size != (side, side):
        raise ValueError(
            f"{samples.path}: its images are {samples.images.size}, those of {args.store} {(side, side)}; "
            "name the store that their network was trained on"
        )
    codec = load_codec(args.codec or store.codec["name"], state.device, channels=store.codec["image_channels"])
    check_codec(codec.meta(side), store.codec, f"the store {args.store}")
    spaces: list[Space] = [LatentSpace(store.codec, codec)]
    if args.encoder:
        spaces.insert(0, feature_space(args, store, state.device))

    findings = [audit(space, store, holdout, samples, args.batch_size, state) for space in spaces]
    if state.is_main_process:
        run = provenance(argv, state.num_processes) | {"seconds": round(time.perf_counter() - began, 3)}
        report(findings, store, holdout, samples, run, args.out)
        draw_distances(findings, args.out / "distances.png")
        first = np.arange(min(PAIRS, samples.count))
        draw_pairs(findings[0], first, store, samples, codec, args.out / "neighbours.png")
        for finding in findings:
            draw_pairs(
                finding, finding.suspicious(), store, samples, codec, args.out / f"suspicious-{finding.name}.png"
            )
    state.destroy_process_group()


def open_holdout(store: Path, encoder: str | None) -> LatentDataset:
    """The held-out store beside a store; ValueError if there is none."""
    beside = holdout_path(store)
    if not beside.is_dir():
        raise ValueError(
            f"--store {store}: no held-out images in {beside}, without which no distance is small or large; "
            "encode with --holdout 0.05, and train without them"
        )
    return LatentDataset(beside, encoder)


def feature_space(args: argparse.Namespace, store: LatentDataset, device: torch.device) -> FeatureSpace:
    """The space of `--encoder`; ValueError unless it is the very network that the store's features come from."""
    encoder = load_encoder(args.encoder, args.encoder_weights, device)
    here, there = encoder.meta(), store.meta["encoders"][args.encoder]
    different = [key for key in there if key != "weights" and here.get(key) != there[key]]
    if different:
        lines = "; ".join(f"{key} is {here.get(key)}, in the store {there[key]}" for key in different)
        raise ValueError(f"--encoder {args.encoder}: {lines}; name the store's weights with --encoder-weights")
    return FeatureSpace(args.encoder, encoder)


class Finding:
    """What the search in one space found: of samples (M,) and held-out images (H,) the distance to the nearest training
    image, its row and view, and that image's distance to its own nearest other training image."""

    def __init__(self, name: str, samples: torch.Tensor, held_out: torch.Tensor):
        self.name = name
        self.distances, rows, views, self.own = samples.cpu().numpy().T
        self.rows, self.views = rows.astype(np.int64), views.astype(np.int64)
        self.held_out_distances, _, _, self.held_out_own = held_out.cpu().numpy().T
        self.threshold = self.reached(THRESHOLD)

    def reached(self, share: float) -> float:
        """The distance that a share of the held-out images reach."""
        return np.sort(self.held_out_distances)[int(np.ceil(share * len(self.held_out_distances))) - 1]

    def suspicious(self) -> np.ndarray:
        """The samples at the smallest distances, smallest first."""
        return np.argsort(self.distances, kind="stable")[:PAIRS]

    def within(self, threshold: float) -> dict[str, float]:
        """Samples and held-out images within a distance; `standard_error` is that of the excess, from both numbers."""
        near, real = ((x <= threshold).mean() for x in (self.distances, self.held_out_distances))
        variances = [p * (1 - p) / len(x) for p, x in ((near, self.distances), (real, self.held_out_distances))]
        return {
            "threshold": threshold,
            "near_copies": near,
            "near_copies_held_out": real,  # more than the share that reaches it where equal distances meet it
            "excess": near - real,
            "standard_error": sum(variances) ** 0.5,
        }

    def result(self) -> dict:
        """The figures, in plain values."""
        return self.within(self.threshold) | {
            **{f"wide_{name}": figure for name, figure in self.within(self.reached(WIDE)).items()},
            "authenticity": (self.distances > self.own).mean(),
            "authenticity_held_out": (self.held_out_distances > self.held_out_own).mean(),
            "exact": (self.distances == 0).mean(),
            "quantiles": dict(zip(map(str, QUANTILES), np.quantile(self.distances, QUANTILES), strict=True)),
            "quantiles_held_out": dict(
                zip(map(str, QUANTILES), np.quantile(self.held_out_distances, QUANTILES), strict=True)
            ),
        }


def audit(
    space: Space, store: LatentDataset, holdout: LatentDataset, samples: Samples, batch_size: int, state: PartialState
) -> Finding:
    """Search one space for the neighbours of all samples and held-out images, shared among the processes."""
    training, unseen = space.stored(store.path), space.stored(holdout.path)
    number = min(len(holdout), MOST_HELD_OUT)
    chosen = np.arange(number) * len(holdout) // number
    parts, unseen_parts = shares(samples.count, samples.path, state), shares(number, holdout.path, state)
    mine, unseen_rows = parts[state.process_index], chosen[unseen_parts[state.process_index]]

    batches = samples.images.batches(mine, batch_size)
    points = torch.cat([space.points(space.embed(batch.to(state.device))) for batch in batches])  # (m, D)
    kept = torch.from_numpy(unseen[unseen_rows, 0]).to(state.device)  # original view, as samples are
    queries = torch.cat([points, space.points(kept)])  # (m + h, D)
    show = state.is_main_process
    found = nearest(queries, training, space, title=f"{space.name}: nearest training images" if show else None)
    neighbours = space.points(torch.from_numpy(training[found.rows.cpu(), found.views.cpu()]).to(state.device))
    own = nearest(neighbours, training, space, found.rows, title=f"{space.name}: their neighbours" if show else None)
    table = torch.stack([found.distances, found.rows, found.views, own.distances], 1)  # (m + h, 4)
    return Finding(
        space.name,
        gathered(table[: len(mine)], [len(part) for part in parts], state),
        gathered(table[len(mine) :], [len(part) for part in unseen_parts], state),
    )


def report(
    findings: list[Finding], store: LatentDataset, holdout: LatentDataset, samples: Samples, run: dict, out: Path
) -> None:
    """Print the figures and write them as JSON."""
    held_out = len(findings[0].held_out_distances)
    print(
        f"{samples.count:,} samples of {samples.path} against {len(store):,} training images of {store.path}, "
        f"calibrated by {held_out:,} held-out images"
    )
    warnings = []
    if "encoder" not in samples.settings:
        warnings.append(f"no samples.json beside {samples.path} names the snippet encoder: see that it is unrelated")
    if held_out < FEW_HELD_OUT:
        warnings.append(f"{held_out:,} held-out images: the threshold is uncertain below {FEW_HELD_OUT:,}")
    names = (store.path / NAMES).read_text().splitlines() if (store.path / NAMES).is_file() else None
    spaces = {}
    for finding in findings:
        result = finding.result()
        related = samples.related_to(finding.name)
        if related:
            warnings.append(f"{finding.name} is of the family of the snippet encoder: its figures prove nothing")
        pairs = [
            {
                "sample": int(i),
                "training_row": int(finding.rows[i]),
                "view": store.meta["views"][finding.views[i]],
                "file": names and names[finding.rows[i]],
                "distance": finding.distances[i],
                "held_out_closer": (finding.held_out_distances <= finding.distances[i]).mean(),
            }
            for i in finding.suspicious()
        ]
        spaces[finding.name] = result | {"same_family_as_snippets": related, "suspicious": pairs}
        print(
            f"{finding.name}{' (of the family of the snippets: proves nothing)' if related else ''}: "
            f"near copies {result['near_copies']:.2%} of samples, {result['near_copies_held_out']:.2%} of held-out "
            f"images, excess {result['excess']:+.2%} ± {result['standard_error']:.2%}; within the distance of "
            f"{WIDE:.0%} of held-out images {result['wide_near_copies']:.2%} of samples; "
            f"authentic {result['authenticity']:.1%} of samples, {result['authenticity_held_out']:.1%} of held-out"
        )
    for warning in warnings:
        print(f"warning: {warning}")
    write_json(
        out / "copies.json",
        {
            "spaces": spaces,
            "num_samples": samples.count,
            "num_held_out": held_out,
            "samples": {"path": str(samples.path), "made": samples.made},
            "store": {key: store.meta[key] for key in ("num_images", "num_views", "fingerprint")}
            | {"path": str(store.path)},
            "warnings": warnings,
            "run": run,
        },
    )


def draw_distances(findings: list[Finding], path: Path) -> None:
    """Distances of samples and held-out images to their nearest training images, a panel for each space."""
    figure = Figure(figsize=(6, 3.2 * len(findings)), layout="constrained")
    for axes, finding in zip(figure.subplots(len(findings), squeeze=False)[:, 0], findings, strict=True):
        both = {"held-out images": finding.held_out_distances, "samples": finding.distances}
        edges = np.histogram_bin_edges(np.concatenate(list(both.values())), bins=50)
        for label, distances in both.items():
            weights = np.full(len(distances), 1 / len(distances))
            axes.hist(distances, edges, weights=weights, histtype="stepfilled", alpha=0.5, label=label)
        axes.axvline(finding.threshold, color="black", linewidth=1, label=f"threshold: {THRESHOLD:.0%} of held-out")
        axes.set(xlabel=f"distance to the nearest training image, {finding.name}", ylabel="share")
        axes.legend()
    with atomic(path) as temporary:
        figure.savefig(temporary, dpi=100)


def draw_pairs(
    finding: Finding, chosen: np.ndarray, store: LatentDataset, samples: Samples, codec: Codec, path: Path
) -> None:
    """Chosen samples (P,), each beside its nearest training image, from the store or decoded from its latent."""
    ascending, back = np.unique(chosen, return_inverse=True)
    (images,) = samples.images.batches(ascending.tolist(), len(ascending))  # (P, 3, H, W)
    kept = LatentDataset(store.path, images=store.meta["has_images"])
    batch = kept.fetch(finding.rows[chosen], finding.views[chosen])
    if "image" not in batch:
        batch["image"] = to_uint8(codec.decode(latents_from_moments(batch["moments"], store.codec, None))).cpu()
    zoom = max(1, 64 // store.meta["image_size"])
    pairs = torch.cat([images[back], batch["image"].expand(-1, 3, -1, -1)], dim=3) / 255  # (P, 3, H, 2W)
    pairs = pairs.repeat_interleave(zoom, 2).repeat_interleave(zoom, 3)
    with atomic(path) as temporary:
        save_image(make_grid(pairs, nrow=8, padding=2 * zoom, pad_value=0.5), temporary)
    print(f"{path}: {len(chosen)} pairs, a sample on the left of each and its nearest training image on the right")


if __name__ == "__main__":
    execute(main)
