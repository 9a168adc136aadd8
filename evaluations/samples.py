"""Samples under evaluation: their images, what their maker says about them, and which encoder their snippets came from.

`sample_ddp.py` leaves a samples.json beside its images; samples of other makers have none, and then the encoder of the
snippets is unknown.
"""

from pathlib import Path

from evaluations.images import open_images
from memory.files import read_json

FAMILIES = ("dinov2", "dinov3", "dino", "siglip", "clip", "mae", "efficientnet", "mobilenet", "convnext", "resnet")


MADE = {"settings": dict, "num_images": int, "complete": bool}
SETTINGS = {"seed": int, "encoder": str | None, "sampler": str, "guidance": dict | None}


class Samples:
    """A set of samples: its images, how many of them count, and what samples.json beside them says."""

    def __init__(self, path: Path, num_samples: int | None):
        self.images = open_images(path)
        self.path = self.images.path
        beside = path / "samples.json" if path.is_dir() else path.with_suffix(".json")
        made = read_json(beside) if beside.is_file() else {}
        self.made = {} if "metrics" in made else made  # the evaluator's own result, by `--out`, tells of no maker
        self.settings = self.made.get("settings", {})
        for facts, kinds in ((self.made, MADE), (self.settings, SETTINGS)):
            for key in facts.keys() & kinds:
                if not isinstance(facts[key], kinds[key]):
                    raise ValueError(f"{beside}: {key} is {facts[key]!r:.80}; restore or remove this file")
        found, intended = len(self.images), self.made.get("num_images", len(self.images))
        if found != intended or not self.made.get("complete", True):
            raise ValueError(f"{path}: holds {found:,} images; {beside}: {intended:,}; run its sampling command again")
        self.count = found if num_samples is None else num_samples
        if not 4 <= self.count <= found:
            many = f"4 to {found:,}" if found >= 4 else "at least 4; sample more"
            raise ValueError(f"{path}: holds {found:,} images, {self.count:,} asked for; expected {many}")

    def protocol(self) -> str:
        """How many images, and how they were sampled, as far as samples.json says."""
        made, guidance = self.settings, self.settings.get("guidance")
        words = [f"{self.count:,} images"]
        if "sampler" in made:
            words.append(f"{made['sampler']} {made.get('steps')}")
        if guidance:
            words.append(f"guidance {guidance.get('scale')} on {guidance.get('interval')}")
        return ", ".join(words)

    def related_to(self, encoder: str) -> bool:
        """Whether `encoder` is of the family that made the snippets, which samples match by construction."""
        return family(self.settings.get("encoder")) == family(encoder)


def family(encoder: str | None) -> str | None:
    """The kind of network behind an encoder's name: one of FAMILIES, or the name itself without its input size."""
    name = encoder and encoder.partition("@")[0]
    return next((kind for kind in FAMILIES if kind in (name or "").lower()), name)
