"""The memory bank: K snippets, how often each is drawn, and three ways to choose one.

Training takes the row nearest to an image; sampling the row that its starting noise points to, as the first release of
GMem (arXiv 2412.08781) does, or a row drawn by frequency (`snippet_rules`). That release's `bank.pth` and `bank.freq`
are read as is.
"""

import contextlib
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from memory.files import atomic, read_json, sha256, why_unreadable, write_json
from memory.kmeans import assign, normalised, ordered_sum, refuse, undirected

ROWS = 65536  # features brought to the bank's device at once

# What a safe loader must know to read arrays and numbers of NumPy, which wrote its functions under another module name
# up to version 1.
_FUNCTIONS = {"_reconstruct": np.empty(0).__reduce__()[0], "scalar": np.float64(0).__reduce__()[0]}
NUMPY = (
    np.ndarray,
    np.dtype,
    *{type(np.dtype(kind)) for kind in "?bBhHiIlLqQefd"},
    *((_FUNCTIONS[name], f"numpy.{core}.multiarray.{name}") for name in _FUNCTIONS for core in ("core", "_core")),
)


class MemoryBank:
    """Snippets (K, F) with integer frequencies (K,), and what is known about them.

    `snippets` float32 as stored, `freq` long, `assignment` (N, V) int32 the nearest row of each image's view or None,
    `meta` the content of bank.json ({} if absent), `path` the file it was loaded from or None. Raises ValueError,
    naming the file where there is one, for shapes that do not fit together, snippets without a direction (zeros, NaN,
    infinity) and frequencies that are negative, fractional or all zero.
    """

    def __init__(
        self,
        snippets: torch.Tensor,
        freq: Sequence[int] | torch.Tensor,
        assignment: torch.Tensor | None = None,
        meta: dict | None = None,
        path: str | os.PathLike | None = None,
    ):
        self.path = None if path is None else Path(path)
        name, freq_name = ("snippets", "freq") if path is None else (str(path), str(self.path.with_suffix(".freq")))
        if not isinstance(snippets, torch.Tensor) or snippets.ndim != 2 or not snippets.is_floating_point():
            remedy = "" if path is None else "; pass the bank's folder, or its bank.pth"
            raise ValueError(f"{name}: expected one float tensor (K, F), got {_describe(snippets)}{remedy}")
        freq = _frequencies(freq, len(snippets), freq_name, name)
        _check_assignment(assignment, len(snippets), name)
        self.snippets = snippets.detach().float()  # (K, F)
        self.freq = freq.long().to(snippets.device)  # (K,)
        self.assignment = None if assignment is None else assignment.int().cpu()  # (N, V)
        self.meta = {} if meta is None else meta
        self._unit = None  # the normalised snippets, made when first searched
        self._cumulative = self.freq.cpu().cumsum(0)  # (K,)
        refuse(name, undirected(self.snippets))

    @classmethod
    def load(cls, path: str | os.PathLike) -> "MemoryBank":
        """Read a bank from its `bank.pth` or the folder that holds it, with the sibling `bank.freq` (a list, tensor or
        array of K integers) and, where present, `bank.assign` and `bank.json`."""
        path = Path(path)
        path = path / "bank.pth" if path.is_dir() else path
        if not path.is_file():
            raise ValueError(f"no bank at {path}: expected a file bank.pth, or the folder that holds one")
        freq, assignment, meta = (path.with_suffix(suffix) for suffix in (".freq", ".assign", ".json"))
        if not freq.is_file():
            raise ValueError(
                f"{path} has no frequencies beside it: {freq} is missing; a bank is a folder, or its bank.pth with "
                "bank.freq beside it, as memory.build_bank writes them; copy both, build the bank, or in Python make "
                'one of rows (K, F): MemoryBank(rows, [1] * len(rows)).save(f"{DIR}/bank.pth")'
            )
        return cls(
            _read(path),
            _read(freq),
            _read(assignment) if assignment.is_file() else None,
            read_json(meta) if meta.is_file() else None,
            path,
        )

    def save(self, path: str | os.PathLike) -> None:
        """Write `bank.pth` and its siblings, all of them or, where the disk is full, none.

        bank.json, with the hashes of the others, comes last and marks the bank as complete; a bank.json or bank.assign
        of an earlier bank of this name is removed.
        """
        path = Path(path)
        freq, assignment, meta = (path.with_suffix(suffix) for suffix in (".freq", ".assign", ".json"))
        files = {path: self.snippets.cpu(), freq: self.freq.tolist()}
        if self.assignment is not None:
            files[assignment] = self.assignment
        with contextlib.ExitStack() as renames:  # run in reverse when all are written: bank.pth takes its name last
            for file, value in files.items():
                with open(renames.enter_context(atomic(file)), "wb") as stream:
                    torch.save(value, stream)  # given a path, it would write the temporary name into the file
            for stale in (meta, assignment):
                stale.unlink(missing_ok=True)
        self.meta = self.meta | {"sha256": {file.name: sha256(file) for file in files}}
        write_json(meta, self.meta)

    def to(self, device: str | torch.device) -> "MemoryBank":
        """The same bank with snippets and frequencies on another device; the assignment stays in main memory."""
        return MemoryBank(self.snippets.to(device), self.freq, self.assignment, self.meta, self.path)

    @property
    def dim(self) -> int:
        """Length F of a snippet."""
        return self.snippets.shape[1]

    def __len__(self) -> int:
        return len(self.snippets)

    def __getitem__(self, indices: torch.Tensor | Sequence[int]) -> torch.Tensor:
        """Snippets (B, F) of unit length, on the bank's device, for rows `indices` (B,) (or of any other
        shape, a single number too)."""
        chosen = self.snippets[torch.as_tensor(indices, device=self.snippets.device)]
        return normalised(chosen.view(-1, self.dim)).view(chosen.shape)

    def indices_from_noise(self, z: torch.Tensor) -> torch.Tensor:
        """Rows (B,) long that the starting noises z (B, C, H, W) ~ N(0, 1) point to, each with probability freq/Σfreq.

        The mean of a noise times the root of its number of entries is standard normal; its normal distribution function
        u picks the first row whose cumulative frequency exceeds u·Σfreq, the last row of non-zero frequency at u = 1.
        In float64 and in a fixed order of summation, so that one noise means one row on any device, in any batch.
        """
        entries = math.prod(z.shape[1:])
        mean = ordered_sum(z.flatten(1).double()) / entries  # (B,)
        u = torch.special.ndtr(mean.cpu() * math.sqrt(entries))
        total = self._cumulative[-1]
        index = torch.searchsorted(self._cumulative.double(), u * total, right=True)
        last = torch.searchsorted(self._cumulative, total)  # the first row that reaches the total
        return index.clamp(max=last).to(self.snippets.device)

    def indices_from_uniform(self, u: torch.Tensor) -> torch.Tensor:
        """Rows (B,) long that uniform numbers u (B,) float64 in [0, 1) draw, each with probability freq/Σfreq."""
        drawn = (u.cpu() * self._cumulative[-1]).long()
        return torch.searchsorted(self._cumulative, drawn, right=True).to(self.snippets.device)

    def sample(self, n: int, generator: torch.Generator | None = None) -> torch.Tensor:
        """Rows (n,) long drawn independently with probability freq/Σfreq, from a generator on the CPU."""
        draw = torch.randint(int(self._cumulative[-1]), (n,), generator=generator)
        return torch.searchsorted(self._cumulative, draw, right=True).to(self.snippets.device)

    def nearest(self, features: torch.Tensor) -> torch.Tensor:
        """Rows (B,) long of highest cosine with features (B, F), the lowest among equals; see `kmeans.assign`.

        The features may lie in main memory and the bank on a GPU; they travel in chunks. The first call keeps a
        normalised copy of the bank.
        """
        if features.ndim != 2 or features.shape[1] != self.dim:
            raise ValueError(f"features: expected (B, {self.dim}) for this bank, got {tuple(features.shape)}")
        if self._unit is None:
            self._unit = normalised(self.snippets)
        found = []
        for some in features.split(ROWS):
            some = some.to(self.snippets.device)
            refuse("features", undirected(some), len(found) * ROWS)
            found.append(assign(normalised(some), self._unit))
        return torch.cat(found)

    def assign(self, features: np.ndarray) -> torch.Tensor:
        """Nearest rows (N, V) int32, in main memory, of features (N, V, F), an array that may lie on disk."""
        chunks = (torch.from_numpy(np.array(features[start : start + ROWS])) for start in range(0, len(features), ROWS))
        return torch.cat([self.nearest(some.flatten(0, 1)).view(some.shape[:2]).int().cpu() for some in chunks])


# How images choose their rows (B,) of a bank: by their starting noise z (B, C, H, W) or a uniform number u (B,) each.
snippet_rules: dict[str, Callable[[MemoryBank, torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "noise": lambda bank, z, u: bank.indices_from_noise(z),
    "random": lambda bank, z, u: bank.indices_from_uniform(u),
}


def read_snippets(path: str, flag: str = "--snippets") -> torch.Tensor:
    """Rows (M,) long of a bank (or other whole numbers), or vectors (M, F) float32, from the text or npy file that a
    command's `flag` names.

    Raises:
        ValueError: no such file, nothing in it, another shape or type, or a vector without a direction.
    """
    file = Path(path)
    if not file.is_file() or file.suffix not in (".txt", ".npy"):
        raise ValueError(f"{flag} {path}: expected a rule that --help lists, or an existing .txt or .npy file")
    try:
        if file.suffix == ".npy":
            array = np.load(file, allow_pickle=False)[...]  # an npz of this name has no such part
        else:
            array = np.array(file.read_text().split(), np.int64)
    except Exception as error:  # of every kind, whatever is wrong with the file
        raise ValueError(f"{flag} {path}: no whole numbers as text and no plain array ({error})") from error
    if array.size and array.ndim == 1 and array.dtype.kind in "iu":
        return torch.from_numpy(array.astype(np.int64))
    if not array.size or array.ndim != 2 or array.dtype.kind != "f":
        raise ValueError(f"{flag} {path} is {array.dtype} {array.shape}: expected M integers or (M, F) floats")
    vectors = torch.from_numpy(array.astype(np.float32))
    bad = undirected(vectors)  # (M,)
    if bad.any():
        raise ValueError(f"{flag} {path}: {bad.sum()} vectors are zero or not finite, row {bad.int().argmax()} first")
    return vectors


def _frequencies(freq: object, rows: int, freq_name: str, name: str) -> torch.Tensor:
    """`freq` as a tensor (K,); ValueError unless it holds a whole number for each of the rows, and not zeros alone."""
    if not isinstance(freq, torch.Tensor | np.ndarray | Sequence) or isinstance(freq, str):
        raise ValueError(f"{freq_name}: expected a list or tensor of K integers, got {_describe(freq)}")
    freq = torch.as_tensor(freq)
    if freq.shape != (rows,):
        raise ValueError(
            f"{freq_name}: {_describe(freq)} does not fit the {rows} snippets of {name}; take both files from one bank"
        )
    if not torch.equal(freq, freq.long().to(freq.dtype)):
        raise ValueError(f"{freq_name}: expected integers, got {freq.dtype} with fractions, NaN or infinity")
    if (freq < 0).any() or not (freq > 0).any():
        raise ValueError(
            f"{freq_name}: frequencies must be 0 or more and not all 0, got {freq.min()} to {freq.max()}; "
            "build the bank again"
        )
    return freq


def _check_assignment(assignment: object, rows: int, name: str) -> None:
    """Raise ValueError unless an assignment is None, or integers (N, V) that number the rows."""
    if assignment is None:
        return
    if not isinstance(assignment, torch.Tensor) or assignment.ndim != 2 or assignment.is_floating_point():
        raise ValueError(f"assignment of {name}: expected integers (N, V), got {_describe(assignment)}")
    if not (assignment.min() >= 0 and assignment.max() < rows):
        raise ValueError(
            f"assignment of {name}: rows {assignment.min()} to {assignment.max()} of a bank of {rows}; "
            "take all files from one bank"
        )


def _read(path: Path) -> object:
    """The object in a torch file, by the safe loader; ValueError naming the file if it holds none."""
    try:
        with torch.serialization.safe_globals(list(NUMPY)):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of every kind, whatever is wrong with the file
        raise ValueError(
            f"{path} cannot be read as a torch.save file of plain values: {why_unreadable(error)}"
        ) from error


def _describe(value: object) -> str:
    """A value's type, and a tensor's dtype and shape, for an error message."""
    if isinstance(value, torch.Tensor):
        return f"{value.dtype} of shape {tuple(value.shape)}"
    return type(value).__name__
