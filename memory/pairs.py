"""The pairs that training sees: latents of a store and the conditions that belong to them, on the training device.

A store and a bank are joined here once, before the long work, and checked against each other. Nothing in a step waits
for the device: what is looked up on the CPU is copied from pinned memory.
"""

import argparse
import shlex
import warnings
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from dataset import LatentDataset, read_meta, stage
from memory.bank import MemoryBank
from memory.files import sha256
from memory.kmeans import refuse, undirected
from memory.resident import ResidentDataset
from models.autoencoder import check_codec, latents_from_moments
from models.encoder import load_encoder
from models.sit import conditions

ALIGNED_AT_ONCE = 32  # images that the alignment's encoder takes: activations of 256 would be GBs beside the network


class Pairs:
    """The store and the bank, and what of them a step needs: latents, conditions, patch tokens to align with.

    Raises:
        ValueError: store, bank and settings do not fit each other; the message names flag, value and remedy.
    """

    def __init__(self, args: argparse.Namespace, device: torch.device):
        self.args, self.device = args, device
        self.condition = conditions[args.condition]
        self.with_labels, self.with_snippets = (kind in self.condition.reads for kind in ("label", "snippet"))
        self.bank = MemoryBank.load(args.bank) if args.bank else None
        self.meta = read_meta(args.store)
        self.encoder = self._snippet_encoder() if self.with_snippets else None
        self.codec = self.meta["codec"]
        self._check(args.store, self.meta)
        self._warn_of_another_store()
        self.patches, self.align_encoder = self._alignment() if args.align_coeff > 0 else (None, None)
        store = stage(args.store, args.stage) if args.stage and not args.dry_run else args.store
        self.train = self._open(store, patches=self.patches, images=self.align_encoder is not None)
        if args.resident and not args.dry_run:
            self.train = ResidentDataset(self.train, device)
            self.bank = self.bank and self.bank.to(device)
        self.holdout = None
        if args.holdout and args.eval_every:
            self._check(args.holdout, read_meta(args.holdout))
            self.holdout = self._open(args.holdout)

    def _check(self, store: str, meta: dict) -> None:
        """Raise ValueError unless a store has the labels, the features and the codec of this run."""
        check_codec(meta["codec"], self.codec, f"the store {self.args.store}")
        if self.with_labels and not meta.get("num_classes"):
            remedy = "encode images in one folder per class, or choose another --condition"
            raise ValueError(f"--condition {self.args.condition}: the store {store} has no labels; {remedy}")
        if not self.with_snippets:
            return
        features = meta["encoders"].get(self.encoder)
        if features is None:
            present = ", ".join(meta["encoders"]) or "none"
            raise ValueError(
                f"the store {store} has no features of the snippets' encoder {self.encoder}, but of {present}; "
                f"{_adding(store, meta, self.encoder)}"
            )
        if self.bank and self.bank.dim != features["dim"]:
            raise ValueError(
                f"--bank {self.args.bank} has snippets of dimension {self.bank.dim}, the {self.encoder} features of "
                f"{store} have {features['dim']}: build the bank from this store's features"
            )
        made_by = self.bank.meta.get("encoder_meta", features) if self.bank else features
        differing = [key for key in made_by | features if made_by.get(key) != features.get(key)]
        if differing:
            facts = "; ".join(f"{key} {made_by.get(key)}, here {features.get(key)}" for key in differing)
            raise ValueError(
                f"--bank {self.args.bank} was made by another {self.encoder} than the features of {store}: {facts}"
            )

    def _warn_of_another_store(self) -> None:
        """Say so if the bank stands for other images than the store's, which may be meant: no assignment is taken over,
        the nearest rows are searched for."""
        made_from = self.bank.meta.get("store_fingerprint") if self.bank else None
        if made_from not in (None, self.meta["fingerprint"]):
            store, its = self.args.store, self.bank.meta.get("store")
            warnings.warn(
                f"--bank {self.args.bank} was built from another store, {its} (fingerprint {made_from!s:.12}), than "
                f"--store {store} ({self.meta['fingerprint']:.12}): its snippets are of other images; if that is not "
                f"meant, build one from these: `python -m memory.build_bank --store {store} …`",
                stacklevel=2,
            )

    def _snippet_encoder(self) -> str:
        """The encoder that the snippets come from: the bank's, or --encoder where no bank says so, or without a bank
        the only one that the store has features of."""
        made_by, asked = self.bank.meta.get("encoder") if self.bank else None, self.args.encoder
        if made_by and asked and made_by != asked:
            raise ValueError(f"--encoder {asked}, but the bank {self.args.bank} was made by encoder {made_by}")
        if made_by or asked:
            return made_by or asked
        if self.bank:
            raise ValueError(f"--bank {self.args.bank} does not say which encoder made it: name that by --encoder")
        present = list(self.meta["encoders"])
        if len(present) != 1:
            raise ValueError(
                f"the store {self.args.store} has features of {', '.join(present) or 'no encoder'}: say by --encoder "
                f"which are the snippets; {_adding(self.args.store, self.meta, 'NAME')}"
            )
        return present[0]

    def _alignment(self) -> tuple[str | None, nn.Module | None]:
        """Where the alignment's patch tokens come from: a name in the store, or an encoder to run on its images."""
        stored = list(self.meta.get("patches") or {})
        name = self.args.align_encoder or (stored[0] if len(stored) == 1 else None)
        if name in stored:
            return name, None
        if name and self.meta.get("has_images"):
            place = {"device": self.device, "dtype": torch.bfloat16 if self.args.precision == "bf16" else torch.float32}
            return None, load_encoder(name, weights=self.args.align_encoder_weights, **place)
        if name:
            remedy = "encode it with --keep-images, or leave out --align-coeff"
            raise ValueError(f"--align-encoder {name}: the store {self.args.store} has no images: {remedy}")
        raise ValueError(
            f"--align-coeff {self.args.align_coeff} needs patch tokens: the store {self.args.store} holds them for "
            f"{', '.join(stored) or 'no encoder'} and no --align-encoder is named; encode the dataset with --patches, "
            "or with --keep-images and name --align-encoder"
        )

    def _open(self, store: str | Path, **options) -> LatentDataset:
        """A store that yields the snippets of this run: "index" of bank rows, or own "feature"."""
        if not self.with_snippets:
            return LatentDataset(store, **options)
        features = LatentDataset(store, encoder=self.encoder, **options)
        if self.args.snippet_from == "own":
            for start in range(0, len(features), 8192):
                some = torch.from_numpy(np.array(features.features[start : start + 8192]))  # (n, V, F)
                bad = undirected(some.flatten(0, 1)).view(some.shape[:2]).any(1)  # (n,)
                refuse(f"the {self.encoder} features of {store}", bad, start)
            return features
        assignment, made_from = self.bank.assignment, self.bank.meta.get("store_fingerprint")
        if assignment is None or made_from != features.meta["fingerprint"]:  # a bank that was not built from this store
            if self.args.dry_run:
                return features
            assignment = self.bank.to(self.device).assign(features.features)
        return LatentDataset(store, assignment=assignment, **options)

    @property
    def align_shape(self) -> tuple[int, ...]:
        """(T, F) of the patch tokens to align with, or nothing."""
        if self.patches:
            return tuple(self.meta["patches"][self.patches])
        return (self.align_encoder.num_patches, self.align_encoder.dim) if self.align_encoder else ()

    def options(self) -> dict[str, object]:
        """What the data say of the network: its `Options` of these names."""
        channels, size, _ = self.codec["latent_shape"]
        options = {"input_size": size, "in_channels": channels, "align_dims": self.align_shape[1:]}
        if self.with_snippets:
            options["snippet_dim"] = self.meta["encoders"][self.encoder]["dim"]
        if self.with_labels:
            options["num_classes"] = self.meta["num_classes"]
        return options

    def latents(self, batch: dict, posterior_noise: Tensor) -> Tensor:
        """(B, C, H, W) float32, sampled from the batch's moments."""
        return latents_from_moments(self._here(batch["moments"]), self.codec, posterior_noise)

    def cond(self, batch: dict) -> object:
        """What the network's embedder takes."""
        given = {}
        if self.with_labels:
            given["label"] = self._here(batch["label"])  # (B,)
        if self.with_snippets:
            found = self.bank[batch["index"]] if "index" in batch else batch["feature"]  # (B, F), of unit norm or not
            given["snippet"] = self._here(found).float()
        return self.condition.cond(given)

    def align_targets(self, batch: dict) -> list[Tensor]:
        """One (B, T, F) of frozen patch tokens for each alignment head."""
        if self.patches:
            return [self._here(batch["patches"])]
        if self.align_encoder is None:
            return []
        parts = self._here(batch["image"]).split(ALIGNED_AT_ONCE)
        with torch.no_grad():
            return [torch.cat([self.align_encoder(part, return_patches=True)[1] for part in parts])]

    def _here(self, tensor: Tensor) -> Tensor:
        """On the training device; from pinned memory, because the host waits for the GPU in any other copy."""
        if self.device.type == "cuda" and tensor.device.type == "cpu":
            tensor = tensor.pin_memory()  # returns itself where the loader has done so
        return tensor.to(self.device, non_blocking=True)

    def identity(self) -> dict:
        """What a checkpoint says of its data: names and hashes, not contents."""
        bank = None
        if self.bank:
            path = self.bank.path.resolve()
            bank = {"path": str(path), "sha256": sha256(path), "k": len(self.bank), "dim": self.bank.dim}
            bank["freq_sha256"] = sha256(path.with_suffix(".freq"))
            assignment = path.with_suffix(".assign")
            bank["assign_sha256"] = sha256(assignment) if assignment.exists() else None
        store = {key: self.meta[key] for key in ("fingerprint", "num_images", "image_size")}
        return {
            "codec": self.codec,
            "encoder": self.encoder,
            "bank": bank,
            "store": {"path": self.args.store, **store},
            "image_size": self.meta["image_size"],
            "num_classes": self.meta.get("num_classes"),
        }


def _adding(store: str, meta: dict, encoder: str) -> str:
    """How an encoder's features come into a store and its held-out part, which is given by either."""
    paths = str(meta.get("source") or "SOURCE"), str(store).rstrip("/").removesuffix("-holdout")
    source, out = map(shlex.quote, paths)
    return f"`python -m scripts.encode_dataset {source} --out {out} --add {encoder}` adds them"
