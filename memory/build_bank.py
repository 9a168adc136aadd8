"""Make a memory bank from the features of a store: k-means centroids, how often each occurs, and what it remembers.

    python -m memory.build_bank --store data/NAME --encoder NAME --out banks/NAME --k 640000
    torchrun --nproc-per-node 8 -m memory.build_bank …      # the same bank, bit for bit

Centroids and frequencies come from the original view, the assignment covers every view. Rows are stored in a seeded
random order, because the published rule ties a row's position to the mean of the starting noise. bank.json records the
settings and how much the bank remembers single images; it is written last and marks the bank as complete.
"""

import argparse
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from matplotlib.figure import Figure
from scipy.stats import rankdata
from tqdm import tqdm

from dataset import LatentDataset, holdout_path, read_meta
from memory.bank import MemoryBank
from memory.claim import claimed
from memory.command import Help, execute
from memory.files import atomic, check_folder, free_space, read_json, sha256
from memory.kmeans import Shards, cosines, fused, kmeans, normalised, refuse, undirected
from memory.processes import from_main, join, share
from memory.provenance import provenance
from models.kernels import fitting

FORMAT = 1  # of bank.json
UNFINISHED = ".unfinished"  # beside a bank while it is written: the same command may replace what lies there
ROWS = 65536  # features read at once
BINS = 50  # of the histogram, at most
ORDER = 1  # address of the row order among the random numbers of one seed; k-means draws its start by itself


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line; `passes` is 0 and `k` None for `--k all`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help)
    add = parser.add_argument
    add("--store", type=lambda path: Path(path).resolve(), required=True, help="store made by scripts.encode_dataset")
    add("--encoder", help="whose features of the store to use; needed where the store has several")
    add("--out", type=Path, required=True, help="folder for bank.pth and its siblings")
    add("--k", default="640000", help="number of snippets, or 'all' to keep every feature as it is")
    add("--passes", "--iterations", type=int, default=5, help="of k-means; 0 keeps a random subset of the features")
    add("--seed", type=int, default=0, help="of the first centroids and of the order of rows")
    args = parser.parse_args(argv)
    if args.passes < 0:
        parser.error(f"--passes {args.passes}: expected 0 or more")
    if args.seed < 0:
        parser.error(f"--seed {args.seed}: expected 0 or more")
    if args.out.resolve() == args.store:
        parser.error(f"--out {args.out} is the folder of the store: expected one of the bank's own, as banks/NAME")
    if args.k == "all":
        args.k, args.passes = None, 0
    elif args.k.isdecimal() and int(args.k) > 0:
        args.k = int(args.k)
    else:
        parser.error(f"--k {args.k}: expected a number of snippets from 1, or 'all'")
    return args


@fitting("share the work among more GPUs by torchrun, or take a smaller --k")
def main(argv: list[str] | None = None) -> None:
    """Build the bank that the command line asks for, or say that it exists."""
    args = parse(argv)
    state = join()
    args.encoder = args.encoder or only_encoder(args.store)
    store, beside = LatentDataset(args.store, args.encoder), holdout_path(args.store)
    holdout = LatentDataset(beside, args.encoder) if beside.is_dir() else None
    settings = settings_of(args, store)
    if from_main(state, lambda: is_complete(args.out, settings)):
        (args.out / UNFINISHED).unlink(missing_ok=True)
        state.print(f"{args.out} already holds this bank: {settings['k']} snippets, {settings['rule']}; nothing to do")
        state.destroy_process_group()
        return
    with claimed("--out", args.out, state.is_main_process):
        build(args, store, holdout, settings, state, argv)
    state.print(f"wrote {args.out / 'bank.pth'}")
    state.destroy_process_group()


def build(
    args: argparse.Namespace,
    store: LatentDataset,
    holdout: LatentDataset | None,
    settings: dict,
    state: PartialState,
    argv: list[str] | None,
) -> None:
    """Make the bank and its report, and write them."""
    say, began = tqdm.write if state.is_main_process else lambda line: None, time.perf_counter()
    say(requirements(args.out, settings, len(store), store.num_views, state))
    for part in filter(None, (store, holdout)):
        check_features(part, state)

    snippets, counts, nearest, inertia = choose(store, args, state, say)
    bank = arrange(snippets, counts, nearest, store, args, state)
    similarity = similarity_to_bank(store, bank, bank.assignment[:, 0], state)
    report = {"inertia": inertia, **memory_of_images(bank.freq.cpu().numpy()), "cosine_train": summary(similarity)}
    report |= {"cosine_holdout": None, "auc_train_vs_holdout": None}
    if holdout is not None:
        unseen = similarity_to_bank(holdout, bank, None, state)
        report |= {"cosine_holdout": summary(unseen), "auc_train_vs_holdout": auc(similarity, unseen)}
    if state.is_main_process:
        draw_histogram(report["cluster_sizes"], args.out / "histogram.png")
        run = provenance(argv, state.num_processes) | {"seconds": round(time.perf_counter() - began, 3)}
        bank.meta = {**settings, **report, "parent": None, "edit": None, "run": run}
        (args.out / UNFINISHED).touch()
        bank.save(args.out / "bank.pth")
        (args.out / UNFINISHED).unlink()
    say_report(report, say)


def only_encoder(store: Path) -> str:
    """The encoder whose features the store has; ValueError if there are several to choose from, or none."""
    present = list(read_meta(store)["encoders"])
    if len(present) != 1:
        raise ValueError(f"--encoder: {store} has features of {', '.join(present) or 'no encoder'}; name one of them")
    return present[0]


def settings_of(args: argparse.Namespace, store: LatentDataset) -> dict:
    """What determines the bank, as it stands in bank.json; ValueError if more snippets are wanted than there are."""
    rule = "every feature" if args.k is None else "k-means" if args.passes else "random subset"
    k = args.k or len(store)
    if not 1 <= k <= len(store):
        raise ValueError(
            f"--k {k}: the store {store.path} has {len(store)} images; ask for that many at most, or 'all'"
        )
    return {
        "format": FORMAT,
        "store": str(store.path),
        "store_fingerprint": store.meta["fingerprint"],
        "encoder": args.encoder,
        "encoder_meta": store.meta["encoders"][args.encoder],
        "dim": store.features.shape[2],
        "rule": rule,
        "k": k,
        "iterations": args.passes,
        "seed": args.seed,
    }


def is_complete(out: Path, settings: dict) -> bool:
    """Whether `out` holds the bank of these settings, whole; ValueError if something else lies there."""
    meta = out / "bank.json"
    check_folder("--out", out)
    if not meta.is_file():
        if (out / "bank.pth").exists() and not (out / UNFINISHED).exists():
            raise ValueError(
                f"{out / 'bank.pth'} exists without a bank.json, so another made it; give another --out, or remove it"
            )
        return False
    present = read_json(meta)
    different = [name for name in settings if name != "store" and present.get(name) != settings[name]]
    if different:
        differences = "; ".join(f"{name} is {present.get(name)}, not {settings[name]}" for name in different)
        raise ValueError(f"{out} holds another bank ({differences}): give another --out, or remove it")
    for file, expected in present["sha256"].items():
        if not (out / file).is_file() or sha256(out / file) != expected:
            raise ValueError(f"{out / file} is not the file that bank.json describes: remove {out} and build again")
    return True


def requirements(out: Path, settings: dict, images: int, views: int, state: PartialState) -> str:
    """A line on the disk and memory that the bank will take; ValueError if the disk has less."""
    k, dim = settings["k"], settings["dim"]
    disk = 4 * k * dim + 4 * images * views + 10 * k
    processes = state.num_processes
    bytes_a_number = 10 if fused(state.device) else 6  # features in float16 and float32, and what memory/fused.py keeps
    memory = bytes_a_number * dim * -(-images // processes) + 16 * k * dim  # see memory/kmeans.py
    if (free := free_space(out)) < disk:
        raise ValueError(f"--out {out} has {free / 1e6:,.0f} MB free, the bank takes {disk / 1e6:,.0f} MB: make room")
    return (
        f"{settings['rule']}: {k} snippets of {dim} from {images} images, {settings['iterations']} passes; "
        f"{disk / 1e6:,.1f} MB of disk, {memory / 1e6:,.1f} MB of memory in each of {processes} processes"
    )


def choose(
    store: LatentDataset, args: argparse.Namespace, state: PartialState, say: Callable[[str], None]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, list[float]]:
    """Snippets (K, F), their counts (K,), the row (n,) of each of this process's images, and the inertia per pass."""
    rows = share(len(store), state)
    features = torch.cat([some.to(state.device) for _, some in read(store, 0, rows, state)])  # (n, F)
    if args.k is None:
        own = torch.arange(rows.start, rows.stop, device=state.device)
        snippets = Shards(len(rows), state.device).whole(normalised(features))
        return snippets, torch.ones(len(store), dtype=torch.long, device=state.device), own, []

    begin = time.perf_counter()
    with tqdm(total=args.passes, desc="k-means", unit="pass", disable=not state.is_main_process) as bar:

        def on_pass(inertia: float) -> None:
            bar.update()
            say(f"pass {bar.n}: inertia {inertia:.6g}, {time.perf_counter() - begin:.1f} s")

        result = kmeans(features, args.k, args.passes, args.seed, on_pass=on_pass)
    return result.centroids, result.counts, result.assignment, result.inertia


def arrange(
    snippets: torch.Tensor,
    counts: torch.Tensor,
    nearest: torch.Tensor,
    store: LatentDataset,
    args: argparse.Namespace,
    state: PartialState,
) -> MemoryBank:
    """The bank with its rows in a seeded random order and the assignment of every view, on this process's device."""
    order = np.random.default_rng([args.seed, ORDER]).permutation(len(snippets))
    order = torch.from_numpy(order).to(state.device)
    bank = MemoryBank(snippets[order], counts[order])
    views = [order.argsort()[nearest]]  # argsort: the new row of each old one
    for view in range(1, store.num_views):
        if args.k is None:  # an image's row is its own in every view
            views.append(views[0])
        else:
            parts = read(store, view, share(len(store), state), state)
            views.append(torch.cat([bank.nearest(some) for _, some in parts]))
    local = torch.stack(views, 1).int()  # (n, V)
    bank.assignment = Shards(len(local), state.device).whole(local).cpu()  # (N, V)
    return bank


def check_features(store: LatentDataset, state: PartialState) -> None:
    """Raise ValueError naming the file and the first rows if a feature has no direction, in any view."""
    rows = share(len(store), state)
    for start in tqdm(range(rows.start, rows.stop, ROWS), desc="checking", disable=not state.is_main_process):
        chunk = torch.from_numpy(np.array(store.features[start : min(start + ROWS, rows.stop)]))  # (n, V, F)
        chunk = chunk.to(state.device)  # looking at each number takes a CPU longer than reading it
        refuse(store.features.filename, undirected(chunk.flatten(0, 1)).view(chunk.shape[:2]).any(1), start)


def read(store: LatentDataset, view: int, rows: range, state: PartialState) -> Iterator[tuple[slice, torch.Tensor]]:
    """Features (n, F) float16 of one view and where among `rows` they lie, a chunk at a time, with a progress bar."""
    with tqdm(total=len(rows), desc=f"view {view} of {store.path.name}", disable=not state.is_main_process) as bar:
        for start in range(rows.start, max(rows.stop, rows.start + 1), ROWS):  # an empty share gives an empty chunk
            chunk = torch.from_numpy(np.array(store.features[start : min(start + ROWS, rows.stop), view]))
            yield slice(start - rows.start, start - rows.start + len(chunk)), chunk
            bar.update(len(chunk))


def similarity_to_bank(
    store: LatentDataset, bank: MemoryBank, nearest: torch.Tensor | None, state: PartialState
) -> np.ndarray:
    """Cosines (N,) float64 of every image's original view to its row of the bank, `nearest` (N,) or searched for."""
    rows, found = share(len(store), state), []
    mine = None if nearest is None else nearest[rows.start : rows.stop].long().to(state.device)
    for place, some in read(store, 0, rows, state):
        index = bank.nearest(some) if mine is None else mine[place]
        found.append(cosines(normalised(some.to(state.device)), bank.snippets, index))
    local = torch.cat(found)
    return Shards(len(local), state.device).whole(local).cpu().numpy()


def memory_of_images(freq: np.ndarray) -> dict:
    """Sizes of the clusters (K,), and how many rows, and draws, return what is left of one single image."""
    width = -(-int(freq.max() + 1) // BINS)
    rows, edges = np.histogram(freq, bins=np.arange(0, freq.max() + width + 1, width))
    sizes = {"min": int(freq.min()), "median": float(np.median(freq)), "max": int(freq.max())}
    return {
        "cluster_sizes": {**sizes, "histogram": {"edges": edges.tolist(), "rows": rows.tolist()}},
        "rows_of_one_image": float((freq == 1).mean()),
        "draws_of_one_image": float((freq == 1).sum() / freq.sum()),
    }


def summary(cosine: np.ndarray) -> dict:
    """Mean, spread and quantiles of cosines (N,)."""
    p05, median, p95 = np.quantile(cosine, [0.05, 0.5, 0.95]).tolist()
    return {"mean": float(cosine.mean()), "std": float(cosine.std()), "p05": p05, "median": median, "p95": p95}


def auc(seen: np.ndarray, unseen: np.ndarray) -> float:
    """Probability that a value of `seen` (N,) exceeds one of `unseen` (M,), ties counted half: the area under the ROC
    curve, from the rank sum (Mann & Whitney 1947). 0.5 means that the bank does not tell them apart."""
    ranks = rankdata(np.concatenate([seen, unseen]))[: len(seen)].sum()
    return float((ranks - len(seen) * (len(seen) + 1) / 2) / (len(seen) * len(unseen)))


def draw_histogram(sizes: dict, path: Path) -> None:
    """Cluster sizes as a PNG: how many rows stand for how many images."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot()
    edges = np.array(sizes["histogram"]["edges"])
    axes.bar(edges[:-1], sizes["histogram"]["rows"], width=np.diff(edges), align="edge", edgecolor="white")
    axes.set(xlabel="images of a row", ylabel="rows", title=f"median {sizes['median']:g}, largest {sizes['max']}")
    with atomic(path) as temporary:
        figure.savefig(temporary, dpi=100)


def say_report(report: dict, say: Callable[[str], None]) -> None:
    """Log how much the bank remembers single images."""
    sizes, train, unseen = report["cluster_sizes"], report["cosine_train"], report["cosine_holdout"]
    say(f"images of a row: {sizes['min']} to {sizes['max']}, median {sizes['median']:g}")
    say(f"one single image: {report['rows_of_one_image']:.1%} of rows, {report['draws_of_one_image']:.1%} of draws")
    say(f"cosine to the nearest row, training images: {train['mean']:.4f} ± {train['std']:.4f}")
    if unseen is None:
        say("no held-out store lies beside this one: encode with --holdout to see what the bank gives away")
    else:
        say(f"cosine to the nearest row, held-out images: {unseen['mean']:.4f} ± {unseen['std']:.4f}")
        told = report["auc_train_vs_holdout"]
        say(f"this cosine tells training from held-out images with AUC {told:.3f} (0.5: not at all)")


if __name__ == "__main__":
    execute(main)
