"""What is a memory bank made of? Its report card, and for a bank of unknown making the likeliest answers.

    python -m scripts.inspect_bank banks/NAME --store data/NAME
    python -m scripts.inspect_bank GMem_XL_2Miter_ImageNet-1K_K640000_5epo.pth --store data/imagenet256 --out card.json

BANK is a folder with bank.pth and bank.freq, its bank.pth, or a file of GMem's first release with the bank inside. Each
`--store` adds the encoders that it holds features of; those of the bank's dimension are tried. Tells

    rows          lengths, copies of each other, rows without a direction
    frequencies   sum, range, share of zero, and what they may count
    encoders      cosine of a store's images to their nearest rows; that of the encoder that made the bank is by far the
                  highest, for a space of another encoder is unrelated
    single images or means: a row drawn for several images is equal to one of them, or to none

Rows are read in blocks, from disk where the file permits: 640,000 × 768 fit into 4 GB of memory.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import normalize
from tqdm import tqdm

from dataset import LatentDataset, read_meta
from memory.build_bank import summary
from memory.command import Help, execute
from memory.files import read_json, sha256, write_json
from memory.provenance import peak_memory, provenance
from models.published import read_file

ROWS = 8192  # of the bank at once
FINE = 0.999  # cosine from which a row is the image itself, in spite of float16 and rounding in the encoder
LIKELY = 0.5  # mean cosine below which an encoder did not make the bank: unrelated spaces give a tenth to a third
UNIT = 1e-3  # distance from 1 within which a length is 1
IMAGENET = 1_281_167  # training images of ImageNet-1k
MOST_TIMES = 20  # that frequencies may count an image; beyond, their sum is a multiple by chance


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help)
    add = parser.add_argument
    add("bank", metavar="BANK", type=Path, help="folder of a bank, its bank.pth, or a file of GMem's first release")
    add("--store", type=Path, nargs="+", default=[], help="stores whose images to compare, for each of their encoders")
    add("--images", type=int, default=5000, help="images of each store, evenly spread")
    add("--out", metavar="FILE", type=Path, help="write the findings as JSON")
    args = parser.parse_args(argv)
    if args.images < 1:
        parser.error(f"--images {args.images}: expected at least 1")
    return args


def main(argv: list[str] | None = None) -> None:
    """Read, look, print and write."""
    args = parse(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    snippets, freq, made = read_bank(args.bank)
    found = {"path": str(args.bank), "made": made, "rows": rows_of(snippets), "frequencies": frequencies_of(freq)}
    found["encoders"] = [
        compare(snippets, freq, store, name, args.images, device)
        for store in args.store
        for name, meta in read_meta(store)["encoders"].items()
        if meta["dim"] == snippets.shape[1]
    ]
    found["frequencies"]["may_count"] = what_is_counted(int(freq.sum()), args.store)
    found["verdict"] = verdict(found)
    print_card(found, args.store)
    if args.out:
        write_json(args.out, found | {"run": provenance(argv) | {"peak_memory": peak_memory()}})


def read_bank(path: Path) -> tuple[torch.Tensor, torch.Tensor, dict]:
    """Snippets (K, F) as stored, mapped from disk where possible, frequencies (K,) long, and bank.json ({} without).

    Raises:
        ValueError: there is no bank, its parts do not fit together, or a file is not the one that bank.json describes.
    """
    path = path / "bank.pth" if path.is_dir() else path
    if not path.is_file():
        raise ValueError(f"{path}: no such file; expected a folder with bank.pth, that file, or one of GMem's release")
    content, made = read_file(path), {}
    if isinstance(content, dict) and content.keys() >= {"memorybank", "memoryfreq"}:
        snippets, freq = content["memorybank"], content["memoryfreq"]
    elif path.with_suffix(".freq").is_file():
        snippets, freq = content, read_file(path.with_suffix(".freq"))
        made = read_json(path.with_suffix(".json")) if path.with_suffix(".json").is_file() else {}
    else:
        raise ValueError(f"{path} has neither a bank inside (memorybank, memoryfreq) nor {path.stem}.freq beside it")
    snippets, freq = torch.as_tensor(snippets), torch.as_tensor(freq)
    if snippets.ndim != 2 or not snippets.is_floating_point() or freq.shape != snippets.shape[:1]:
        shapes = f"{snippets.dtype} {tuple(snippets.shape)} and frequencies {tuple(freq.shape)}"
        raise ValueError(f"{path}: expected floats (K, F) and K frequencies, found {shapes}")
    for file, expected in made.get("sha256", {}).items():
        if sha256(path.with_name(file)) != expected:
            raise ValueError(f"{path.with_name(file)} is not the file that {path.stem}.json describes: copy both again")
    return snippets, freq.long(), made


def rows_of(snippets: torch.Tensor) -> dict:
    """Number, dimension, lengths, and how many rows are copies of an earlier one or have no direction."""
    length, code = [], []
    weights = torch.randint(-(2**62), 2**62, (snippets.shape[1],), generator=torch.Generator().manual_seed(0)) | 1
    for some in snippets.split(ROWS):
        some = some.float()
        length.append(some.norm(dim=1))
        code.append((some.contiguous().view(torch.int32).long() * weights).sum(1))  # wraps around: a hash of the bits
    length, code = torch.cat(length), torch.cat(code)
    bad = ~(length.isfinite() & (length > 0))
    norm = summary(length[~bad].double().numpy()) | {"min": float(length[~bad].min()), "max": float(length[~bad].max())}
    return {
        "k": len(snippets),
        "dim": snippets.shape[1],
        "dtype": str(snippets.dtype).removeprefix("torch."),
        "norm": norm,
        "unit": float(((length - 1).abs() < UNIT).double().mean()),
        "without_direction": int(bad.sum()),
        "duplicates": len(snippets) - len(code.unique()),
    }


def frequencies_of(freq: torch.Tensor) -> dict:
    """Sum, range, and the shares of rows that are never drawn or once."""
    shares = {"zero": float((freq == 0).double().mean()), "one": float((freq == 1).double().mean())}
    return {
        **{"sum": int(freq.sum()), "min": int(freq.min()), "median": int(freq.median()), "max": int(freq.max())},
        "share_of_rows": shares,
        "share_of_draws_one": float((freq == 1).sum() / freq.sum().clamp(min=1)),
    }


def compare(
    snippets: torch.Tensor, freq: torch.Tensor, path: Path, encoder: str, images: int, device: torch.device
) -> dict:
    """Cosines of a store's images to their nearest rows by one encoder, and how many rows are an image itself."""
    store = LatentDataset(path, encoder)
    number = min(images, len(store))
    rows = np.arange(number) * len(store) // number
    features = torch.from_numpy(np.array(store.features[rows, 0])).float()  # (M, F), original view
    cosine, index = nearest(features.to(device), snippets, f"{path.name}, {encoder}")
    drawn, exact = freq[index], cosine >= FINE
    alone, shared = drawn == 1, drawn > 1
    result = {
        "store": str(path),
        "encoder": encoder,
        "images": number,
        "of": len(store),
        "feature_norm": float(features.norm(dim=1).median()),
        "cosine": summary(cosine.double().numpy()),
        "exact": float(exact.double().mean()),
        "exact_at_rows_drawn_once": float(exact[alone].double().mean()) if alone.any() else None,
        "exact_at_other_rows": float(exact[shared].double().mean()) if shared.any() else None,
        # of the images at a row drawn for n of them, one is the row, if rows are images
        "expected_there_of_single_images": float((1 / drawn[shared].double()).mean()) if shared.any() else None,
        "frequencies_are_its_counts": None,
    }
    if number == len(store):
        counts = torch.bincount(index, minlength=len(freq))
        result["frequencies_are_its_counts"] = float((counts == freq).double().mean())
    return result


def nearest(features: torch.Tensor, snippets: torch.Tensor, title: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Highest cosine (M,) of each feature (M, F) among the rows (K, F), and that row's number (M,), on the CPU."""
    unit = normalize(features, dim=1)
    best = torch.full((len(unit),), -torch.inf, device=unit.device)
    index = torch.zeros(len(unit), dtype=torch.long, device=unit.device)
    for start in tqdm(range(0, len(snippets), ROWS), desc=title, unit="block"):
        block = normalize(snippets[start : start + ROWS].to(unit.device).float(), dim=1).nan_to_num()  # (n, F)
        score, at = (unit @ block.T).max(1)
        index = torch.where(score > best, at + start, index)
        best = torch.maximum(best, score)
    return best.cpu(), index.cpu()


def what_is_counted(total: int, stores: list[Path]) -> str | None:
    """Whose images the frequencies may count, by their sum; None if it is a multiple of no known number."""
    known = {f"the training images of {path}": read_meta(path)["num_images"] for path in stores}
    for name, count in (known | {"the training images of ImageNet-1k": IMAGENET}).items():
        times = total // count
        if total == times * count and 0 < times <= MOST_TIMES:
            return name + (", each once" if times == 1 else f", each {times} times (epochs, or views)")
    return None


def verdict(found: dict) -> dict:
    """The likeliest encoder, and whether rows are single images or means, each with its grounds."""
    ranked = sorted(found["encoders"], key=lambda one: one["cosine"]["mean"], reverse=True)
    if not ranked:
        dim = found["rows"]["dim"]
        return {"encoder": None, "because": f"no store was given with features of {dim} numbers", "rows": None}
    best = ranked[0]
    others = ", ".join(f"{one['encoder']} {one['cosine']['mean']:.3f}" for one in ranked[1:])
    because = f"mean cosine {best['cosine']['mean']:.3f}" + (f"; {others}" if others else ", the only one of this size")
    if best["cosine"]["mean"] < LIKELY:
        return {"encoder": None, "because": f"too low for any: {best['encoder']} {because}", "rows": None}
    return {"encoder": best["encoder"], "because": because, "rows": kind_of_rows(found["rows"], best)}


def kind_of_rows(rows: dict, best: dict) -> str:
    """Whether rows are images or means, by the encoder that made them; their lengths are told as they are."""
    length = rows["norm"]["median"]
    if rows["unit"] > 0.99:
        lengths = "normalised, so that lengths tell nothing"
    elif rows["norm"]["max"] < 1 + UNIT:
        lengths = f"shorter than 1 (median {length:.3f}), as means of normalised features are"
    else:
        lengths = f"of median length {length:.3g}, the features {best['feature_norm']:.3g}"
    alone, shared = best["exact_at_rows_drawn_once"], best["exact_at_other_rows"]
    if alone is not None and alone < 0.5 and not shared:
        return f"not to be told: the images at rows drawn once are not these rows, so the store is another; {lengths}"
    if shared is None:
        return f"single images: {best['exact']:.0%} of images are rows, and every row is drawn once; {lengths}"
    expected = best["expected_there_of_single_images"]
    kind = "single images" if shared > expected / 2 else "means"
    return (
        f"{kind}: at rows drawn for several images {shared:.1%} of images are the row itself, "
        f"where single images would give {expected:.1%}; {lengths}"
    )


def print_card(found: dict, stores: list[Path]) -> None:
    """The findings in words."""
    rows, freq, made = found["rows"], found["frequencies"], found["made"]
    norm, shares = rows["norm"], freq["share_of_rows"]
    print(f"{found['path']}: {rows['k']:,} rows of {rows['dim']} ({rows['dtype']})")
    print(
        f"lengths: {norm['min']:.4g} to {norm['max']:.4g}, mean {norm['mean']:.4g} ± {norm['std']:.2g}, "
        f"{rows['unit']:.1%} are 1; {rows['without_direction']:,} rows without a direction, "
        f"{rows['duplicates']:,} copies of another"
    )
    print(
        f"frequencies: sum {freq['sum']:,}, {freq['min']:,} to {freq['max']:,}, median {freq['median']:,}; "
        f"{shares['zero']:.1%} of rows are never drawn, {shares['one']:.1%} stand for one "
        f"({freq['share_of_draws_one']:.1%} of draws); they may count {freq['may_count'] or 'nothing known'}"
    )
    for one in found["encoders"]:
        cosine, counts = one["cosine"], one["frequencies_are_its_counts"]
        print(
            f"{one['encoder']} of {one['store']}: cosine to the nearest row {cosine['mean']:.4f} ± {cosine['std']:.4f} "
            f"({cosine['p05']:.4f} to {cosine['p95']:.4f}), {one['exact']:.1%} of {one['images']:,} images are a row"
            + ("" if counts is None else f"; {counts:.1%} of frequencies are the numbers of its images at a row")
        )
    for name in [] if not made else ("encoder", "rule", "iterations", "rows_of_one_image", "auc_train_vs_holdout"):
        print(f"bank.json: {name} {made.get(name)}")
    answer = found["verdict"]
    print(f"likely made by: {answer['encoder'] or 'not known'} ({answer['because']})")
    if answer["rows"]:
        print(f"rows are {answer['rows']}")


if __name__ == "__main__":
    execute(main)
