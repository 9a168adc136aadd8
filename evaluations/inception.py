"""The Inception network of FID, as ADM's evaluation uses it: three outputs of the 2015 TensorFlow graph, in PyTorch.

torch-fidelity's port of `inception-2015-12-05` with its published weights. Images enter as uint8 at their native size
and are resized to 299 × 299 inside the network as TensorFlow 1 did: bilinear, no antialias, corners not aligned, so
that output pixel i reads input position i · size / 299.
"""

import io
import os
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from memory.files import reading, sha256, weights_folder
from memory.kmeans import full_precision
from scripts.fetch import url_of

WEIGHTS = "weights-inception-2015-12-05-6726825d.pth"
SAME_FILE = "pt_inception-2015-12-05-6726825d.pth"  # pytorch-fid's name for the same bytes
URL = url_of(WEIGHTS)
REMEDY = f"`bash scripts/fetch.sh` gets {WEIGHTS} from {URL}"
VARIABLE = "INCEPTION_WEIGHTS"
SPATIAL_CHANNELS = 7


class Features(NamedTuple):
    """What a network gives for a batch; encoders other than Inception give `pool` alone."""

    pool: torch.Tensor  # (B, F)
    spatial: torch.Tensor | None = None  # (B, 2023)
    probs: torch.Tensor | None = None  # (B, 1008)


def find_weights(path: str | os.PathLike | None = None) -> Path:
    """The weights file: `path`, else $INCEPTION_WEIGHTS, else in the weights folder, else in torch hub's cache;
    ValueError says where it looked."""
    for source, given in (("--inception", path), (f"${VARIABLE}", os.environ.get(VARIABLE))):
        if given:
            if not Path(given).is_file():
                raise ValueError(f"{source} {given}: no such file; {REMEDY}")
            return Path(given)
    cache = Path(torch.hub.get_dir()) / "checkpoints"
    for place in (weights_folder() / WEIGHTS, cache / WEIGHTS, cache / SAME_FILE):
        if place.is_file():
            return place
    raise ValueError(
        f"the Inception weights {WEIGHTS} are missing: looked at --inception (not given), ${VARIABLE} (not set), in "
        f"{weights_folder()} and in {cache}; {REMEDY} where there is a network; or take another by --encoder NAME"
    )


class Inception(nn.Module):
    """Images → pool features, spatial features and class probabilities.

    `pool` (B, 2048): the graph's `pool_3:0`, for FID, precision and recall. `spatial` (B, 2023): the first 7 channels
    of `mixed_6/conv:0` (the 1×1 branch of the third 17 × 17 block, `Mixed_6d.branch1x1`), flattened in
    height-width-channel order, for sFID. They are taken after the ReLU: that graph names a convolution's steps
    `conv/Conv2D`, `conv/batchnorm`, `conv/CheckNumerics`, `conv/control_dependency` and then the bare scope `conv`,
    which is the only node left to be the activation. `probs` (B, 1008): softmax of the logits without their bias, for
    the inception score.

    The file is read with `weights_only=True`; torch-fidelity's constructor, which unpickles whatever it is given, gets
    those tensors back in a buffer written here. ValueError if it is another network.
    """

    name = "inception"

    def __init__(self, path: str | os.PathLike, device: torch.device | str = "cpu"):
        super().__init__()
        buffer = io.BytesIO()
        torch.save(read_weights(path), buffer)
        buffer.seek(0)
        with reading(path):
            self.network = FeatureExtractorInceptionV3(self.name, ["2048", "logits_unbiased"], buffer)
        self.network.Mixed_6d.branch1x1.register_forward_hook(self.keep_spatial)
        on_gpu = (
            torch.device(device).type == "cuda"
        )  # where float32 convolutions are a fifth faster the other way round
        self.layout = torch.contiguous_format if on_gpu else torch.channels_last
        self.to(device, memory_format=self.layout)
        self.sha256 = sha256(path)
        self.published = self.sha256.startswith("6726825d")

    def keep_spatial(self, module: nn.Module, inputs: tuple, output: torch.Tensor) -> None:
        """Forward hook of Mixed_6d.branch1x1."""
        self.spatial = output[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)  # (B, 192, 17, 17) -> (B, 2023)

    def identity(self) -> dict:
        """What determines the features, as plain values."""
        return {"name": self.name, "sha256": self.sha256}

    @torch.inference_mode()
    def forward(self, images: torch.Tensor) -> Features:
        """uint8 images (B, 3, H, W) in RGB, any size."""
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False), full_precision():  # tf32 keeps 10 bits
            images = images.contiguous(memory_format=self.layout)
            pool, logits = self.network(images)  # (B, 2048), (B, 1008)
        return Features(pool, self.spatial, logits.softmax(1))


def read_weights(path: str | os.PathLike) -> dict[str, torch.Tensor]:
    """The state dict of the 2015 Inception (1008 classes; torchvision's has 1000); ValueError for anything else."""
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of every kind, whatever is wrong with the file
        raise ValueError(f"{path}: not a whole file of nothing but weights; {REMEDY}") from error
    classifier = weights.get("fc.weight") if isinstance(weights, dict) else None
    shape = tuple(classifier.shape) if isinstance(classifier, torch.Tensor) else None
    if shape != (1008, 2048) or "Mixed_6d.branch1x1.conv.weight" not in weights:
        expected = f"a state dict with fc.weight of shape (1008, 2048), found {shape}"
        raise ValueError(f"{path}: not the Inception of 2015: expected {expected}; {REMEDY}")
    return weights
