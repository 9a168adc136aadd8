"""The folder of a training run: its settings, its log and its checkpoints, and whether a command is of the same run."""

import json
import re
from pathlib import Path

import torch

from memory.files import atomic, read_json, reading, write_json
from models.checkpoint import read_checkpoint

# What may differ when a run continues. Store and bank are compared by what is in them, not by where they lie.
FREE = {
    "steps", "log_every", "save_every", "snapshot_every", "eval_every", "sample_every", "keep", "workers", "wandb",
    "micro_batch", "compile", "dry_run", "out", "store", "holdout", "bank", "codec", "stage", "path",
    "resident", "checkpoint_activations",
}  # fmt: skip
ADDED_LATER = {"warmup": 0}  # flags that older runs do not name, with what these did


class RunFolder:
    """`path`, which one process of a run writes to; `args` is the command line's, `facts` what its data are."""

    def __init__(self, path: Path, args: dict, facts: dict):
        self.path, self.args, self.facts = path, args, facts
        self.config, self.log = path / "config.json", path / "log.jsonl"

    @property
    def checkpoints(self) -> list[Path]:
        """Full states in order of their steps."""
        found = (path for path in (self.path / "checkpoints").glob("*.pt") if path.stem.isdigit())
        return sorted(found, key=lambda path: int(path.stem))

    def check_same(self) -> None:
        """Compare this command with what the folder's last checkpoint, or a run still without one, was made by.

        Raises:
            ValueError: a setting differs that may not; the message lists them.
        """
        settings = {"args": self.args, "store": self.facts["store"], "bank": self.facts["bank"] or {}}
        if self.checkpoints:
            there = read_checkpoint(self.checkpoints[-1])
        elif self.config.exists() and self.log.exists():
            there = read_json(self.config)
        else:
            return
        with reading(self.path):
            there["args"] = ADDED_LATER | there["args"]
            lines = [
                f"{label}{key.replace('_', '-')}: the run has {short((there[part] or {}).get(key))}, "
                f"this command {short(value)}"
                for part, label in (("args", ""), ("store", "store "), ("bank", "bank "))
                for key, value in settings[part].items()
                if key not in FREE and (there[part] or {}).get(key) != value
            ]
        if lines:
            raise ValueError(
                f"--out {self.path} holds a run with other settings; choose another folder\n  " + "\n  ".join(lines)
            )

    def note(self, step: int, made: dict) -> None:
        """Write the settings, and where each part of the run was made, the one from `step` on by `made`."""
        parts = read_json(self.config).get("runs", []) if self.config.exists() else []
        with reading(self.config):
            parts = [part for part in parts if part["from_step"] < step]  # later ones are about to be repeated
        write_json(self.config, {"args": self.args, **self.facts, "runs": [*parts, {"from_step": step, **made}]})

    def record(self, line: dict) -> None:
        """Append a line to the log."""
        with open(self.log, "a") as file:
            file.write(json.dumps(line) + "\n")

    def rewind_log(self, step: int) -> None:
        """Drop lines beyond `step`: those steps are about to be repeated, with the same numbers."""
        if self.log.exists():
            with reading(self.log):  # a line without its end was cut off by a kill or a full disk
                lines = [line for line in self.log.read_text().splitlines(keepends=True) if line.endswith("\n")]
                lines = [line for line in lines if json.loads(line)["step"] <= step]
            with atomic(self.log) as temporary:
                temporary.write_text("".join(lines))

    def write_checkpoint(self, name: str, state: dict) -> None:
        """Write a checkpoint whole; through a stream, because torch.save puts a file's name into it."""
        with atomic(self.path / "checkpoints" / f"{name}.pt") as temporary, open(temporary, "wb") as stream:
            torch.save(state, stream)

    def remove_old(self) -> None:
        """Remove all full states but the last `--keep`."""
        for path in self.checkpoints[: -self.args["keep"]]:
            path.unlink()


def short(value: object) -> object:
    """A value for a message: of a hash the first 12 digits, which tell it."""
    return value[:12] if isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) else value
