"""Codecs: pixels to moments (what a store keeps), moments to latents (what the network sees), latents back to pixels.

A codec is a VAE read by diffusers' `AutoencoderKL` or the pixels themselves. Both obey one rule, so that nothing
outside this file knows a scale: latents = (mean + std·noise − shift)·scale, where `scale` and `shift` are numbers or
one number a channel and travel in `Codec.meta` with the store and the checkpoint. The pixel codec has no std, and its
scale and shift take uint8 to [−1, 1].
"""

import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from memory.files import read_json, reading, sha256, weights_folder
from models.hub import from_hub

ROOT = Path(__file__).resolve().parents[1]
SD_SCALE = 0.18215  # of Stable Diffusion's VAEs (Rombach et al., arXiv 2112.10752)
DECODED_PIXELS = 2**22  # a VAE decodes this many pixels at a time (64 images of 256×256), to bound memory
DECODED_PIXELS_GPU = 2**20  # and on a GPU these, so that cards of 16 GB suffice
CONFIG, WEIGHTS = "config.json", "diffusion_pytorch_model.safetensors"  # the two files of diffusers' folder format
MOST_LAYERS = 32  # in a block; Stable Diffusion's have 2
REMEDY = "run `bash scripts/fetch.sh` where there is a network, or name any folder with the two files by --codec"


class Codec(Protocol):
    """What every codec offers; `load_codec` makes one."""

    def meta(self, image_size: int) -> dict:
        """What defines the latents of square images: name, scale, shift, shapes (C, h, w) and (P, h, w), dtype,
        image channels, SHA-256 of the weights (None without weights). Raises ValueError for an impossible size."""

    def encode(self, images: Tensor) -> Tensor:
        """uint8 images (B, c, H, W) to moments (B, P, h, w)."""

    def compile_encoder(self) -> None:
        """Let torch.compile make `encode` faster, which pays for many batches of one size."""

    def decode(self, latents: Tensor) -> Tensor:
        """Latents (B, C, h, w) to float32 images (B, c, H, W), clamped to [−1, 1]."""

    def compile_decoder(self) -> None:
        """The same for `decode`."""


class PixelCodec:
    """The identity: moments are the uint8 pixels, latents the pixels in [−1, 1]; exact there and back by rounding."""

    def __init__(self, name: str, device: str | torch.device, dtype: torch.dtype, channels: int | None):
        self.name, self.device = name, torch.device(device)
        self.channels = 3 if channels is None else channels
        if self.channels not in (1, 3):
            raise ValueError(f"codec {name!r}: channels is {channels}, expected 1 (grey) or 3 (RGB)")

    def meta(self, image_size: int) -> dict:
        shape = [self.channels, image_size, image_size]
        return {
            "name": self.name,
            "scale": 1 / 127.5,
            "shift": 127.5,
            "latent_shape": shape,
            "moments_shape": shape,
            "dtype": "uint8",
            "image_channels": self.channels,
            "sha256": None,
        }

    def encode(self, images: Tensor) -> Tensor:
        return fit_channels(images, self.channels, self.name).to(self.device)  # (B, c, H, W) uint8

    def compile_encoder(self) -> None:
        """Nothing is computed that could be compiled."""

    def decode(self, latents: Tensor) -> Tensor:
        return latents.to(self.device, torch.float32).clamp(-1, 1)

    def compile_decoder(self) -> None:
        """Nothing is computed that could be compiled."""


def read_config(folder: Path) -> dict:
    """The configuration of a VAE; ValueError for a number of layers that would be built for hours."""
    config = read_json(folder / CONFIG)
    layers = config.get("layers_per_block", 1)
    if type(layers) is not int or not 0 < layers <= MOST_LAYERS:
        raise ValueError(f"{folder / CONFIG}: layers_per_block is {layers!r}, expected 1 to {MOST_LAYERS}")
    return config


class VAECodec:
    """A KL-regularised autoencoder in diffusers' folder format; its moments are the posterior's mean and std."""

    def __init__(self, name: str, folder: Path, device: str | torch.device, dtype: torch.dtype, scale: float | None):
        from diffusers import AutoencoderKL  # here, because the pixel codec must work where diffusers is not installed

        for file in (CONFIG, WEIGHTS):
            if not (folder / file).is_file():
                raise ValueError(
                    f"codec {name!r}: no {file} in {folder}; expected a folder in diffusers' AutoencoderKL format, "
                    f"that is {CONFIG} and {WEIGHTS}; `bash scripts/fetch.sh` gets those of sd-vae-ft-mse and -ema"
                )
        self.name, self.device, self.dtype = name, torch.device(device), dtype
        self.memory_format = torch.contiguous_format
        self.sha256 = sha256(folder / WEIGHTS)
        read_config(folder)  # a check, before diffusers builds what it says
        with reading(f"codec {name!r} in {folder}"):
            options = {"torch_dtype": dtype, "use_safetensors": True, "output_loading_info": True}
            self.vae, found = AutoencoderKL.from_pretrained(folder, **options)
            if found["missing_keys"]:  # diffusers draws them at random
                raise ValueError(f"{WEIGHTS} lacks {', '.join(sorted(found['missing_keys'])[:4])}; copy it again")
            self.vae.to(self.device).eval().requires_grad_(False)
            self._take(self.vae.config, scale)
        if self.device.type == "cuda":
            self.suit_gpu()

    def suit_gpu(self) -> None:
        """Compute the same faster on a GPU: channels innermost, as its convolutions want them, and the encoder's
        attention as two plain products, because fused kernels are made for narrower heads than its one of 512."""
        from diffusers.models.attention_processor import Attention, AttnProcessor

        self.memory_format = torch.channels_last
        self.vae.to(memory_format=self.memory_format)
        for part in self.vae.encoder.modules():
            if isinstance(part, Attention):
                part.set_processor(AttnProcessor())

    def _take(self, config: object, scale: float | None) -> None:
        """Channels, downsampling, scale and shift from a VAE's configuration; ValueError if they are no numbers."""
        self.channels, self.latent_channels = config.in_channels, config.latent_channels
        self.downsampling = 2 ** (len(config.block_out_channels) - 1)
        self.scale, self.shift = config.scaling_factor if scale is None else scale, config.shift_factor or 0.0
        if config.latents_std is not None:  # some VAEs are normalised channel by channel
            self.scale = [self.scale / std for std in config.latents_std]
            self.shift = list(config.latents_mean)
        for key, value in (("scaling_factor", self.scale), ("shift_factor", self.shift)):
            if not torch.tensor(value, dtype=torch.float64).isfinite().all():
                raise ValueError(f"{key} is {value!r} in {CONFIG}, expected finite numbers")

    def meta(self, image_size: int) -> dict:
        side = self.latent_side(image_size)
        return {
            "name": self.name,
            "scale": self.scale,
            "shift": self.shift,
            "latent_shape": [self.latent_channels, side, side],
            "moments_shape": [2 * self.latent_channels, side, side],
            "dtype": "float16",
            "image_channels": self.channels,
            "sha256": self.sha256,
        }

    def latent_side(self, pixels: int) -> int:
        """Latent side of an image side; ValueError unless the downsampling factor divides it."""
        if pixels < 1 or pixels % self.downsampling:
            raise ValueError(
                f"codec {self.name!r}: an image side of {pixels} pixels is not a multiple of its downsampling factor "
                f"{self.downsampling}; choose another image size"
            )
        return pixels // self.downsampling

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        for pixels in images.shape[-2:]:
            self.latent_side(pixels)
        images = fit_channels(images, self.channels, self.name).to(self.device)  # (B, c, H, W) uint8
        images = (images.float() / 127.5 - 1).to(self.dtype, memory_format=self.memory_format)
        posterior = self.vae.encode(images).latent_dist
        return torch.cat([posterior.mean, posterior.std], dim=1).half().contiguous()  # (B, 2C, h, w)

    def compile_encoder(self) -> None:
        self.vae.encoder.compile(dynamic=False)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        latents = latents.to(self.device, torch.float32)
        latents = latents / channelwise(self.scale, latents) + channelwise(self.shift, latents)  # (B, C, h, w)
        latents = latents.to(self.dtype, memory_format=self.memory_format)
        limit = DECODED_PIXELS_GPU if self.device.type == "cuda" else DECODED_PIXELS
        pixels = latents[:, 0].numel() * self.downsampling**2
        parts = latents.chunk(math.ceil(pixels / limit))  # of one size, to compile once
        return torch.cat([self.vae.decode(part).sample.float() for part in parts]).clamp(-1, 1)  # (B, c, H, W)

    def compile_decoder(self) -> None:
        self.vae.decoder.compile(dynamic=False)


def hub_vae(repository: str, scale: float | None = None) -> Callable[..., VAECodec]:
    """A maker of the codec kept in a Hugging Face repository: from the weights folder, the hub's cache, or the hub."""

    def make(name: str, device: str | torch.device, dtype: torch.dtype, channels: int | None) -> VAECodec:
        folder = weights_folder() / repository.split("/")[1]
        if not folder.is_dir():
            folder = from_hub(f"codec {name!r}", repository, (CONFIG, WEIGHTS), folder, REMEDY)[0].parent
        return VAECodec(name, folder, device, dtype, scale)

    return make


codecs: dict[str, Callable[..., Codec]] = {
    "pixels": PixelCodec,
    "sd-vae-ft-mse": hub_vae("stabilityai/sd-vae-ft-mse", SD_SCALE),
    "sd-vae-ft-ema": hub_vae("stabilityai/sd-vae-ft-ema", SD_SCALE),
}


def load_codec(
    name: str, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32, channels: int | None = None
) -> Codec:
    """Make the codec called `name`: a key of `codecs`, a folder in diffusers' AutoencoderKL format, from the working
    directory, from this repository, so that what assets/ names is found anywhere, or from the weights folder, or a hub
    name (`organisation/repository`). A VAE computes in `dtype`; `channels` (1 or 3) are those of the pixel codec.

    Raises ValueError if the name is unknown or a file is missing, naming the file and where it was looked for.
    """
    if name in codecs:
        return codecs[name](name, device, dtype, channels)
    for folder in (Path(name), ROOT / name, weights_folder() / name):
        if folder.is_dir():
            return VAECodec(name, folder, device, dtype, scale=None)
    if name.count("/") == 1 and all(name.split("/")):
        return hub_vae(name)(name, device, dtype, channels)
    raise ValueError(
        f"codec {name!r} is none of {', '.join(codecs)}, no folder here or in {weights_folder()}, and no hub name "
        "(organisation/repository): give its folder by --codec"
    )


def latents_from_moments(moments: Tensor, codec_meta: dict, noise: Tensor | None) -> Tensor:
    """Sample latents: (mean + std·noise − shift)·scale, in float32.

    `moments` (B, P, h, w) as a codec gave them, `codec_meta` its `meta`, `noise` (B, C, h, w) standard normal or None
    for the posterior mean. With P = C (no std, as for pixels) the noise has no effect.
    """
    channels = codec_meta["latent_shape"][0]
    latents = moments[:, :channels].float()  # (B, C, h, w)
    if noise is not None and moments.shape[1] == 2 * channels:
        latents = latents + moments[:, channels:].float() * noise
    return (latents - channelwise(codec_meta["shift"], latents)) * channelwise(codec_meta["scale"], latents)


def to_uint8(images: Tensor, mode: str = "round") -> Tensor:
    """Images in [−1, 1] to uint8 of the same shape: 255·(x + 1)/2 clamped to [0, 255], then by `mode` "round" (SiT) or
    "truncate" (GMem and REPA, half a grey level darker on average); ValueError for another mode."""
    if mode not in ("round", "truncate"):
        raise ValueError(f"--uint8 is {mode!r}, expected round or truncate")
    levels = (127.5 * (images.float() + 1)).clamp(0, 255)
    return (levels.round() if mode == "round" else levels).to(torch.uint8)


def check_codec(codec_meta: dict, expected: dict, owner: str) -> None:
    """Raise ValueError, showing both sides, unless two `meta`s define the same latents; `owner` names the expected one.

    The name is not compared: one VAE may lie in different folders. Nor is a hash that one side does not know (None).
    """
    unknown = {"sha256"} if None in (codec_meta.get("sha256"), expected.get("sha256")) else set()
    compared = expected.keys() - {"name"} - unknown
    differing = [key for key in expected if key in compared and codec_meta.get(key) != expected[key]]
    if differing:
        raise ValueError(
            f"codec {codec_meta['name']!r} does not fit {owner}, made with {expected['name']!r}: "
            + "; ".join(f"{key} is {codec_meta.get(key)}, expected {expected[key]}" for key in differing)
        )


def channelwise(number: float | list[float], like: Tensor) -> Tensor:
    """`scale` or `shift` as a tensor that broadcasts over (B, C, h, w)."""
    return _constant(tuple(number) if isinstance(number, list) else (number,), like.device)


@functools.cache
def _constant(numbers: tuple[float, ...], device: torch.device) -> Tensor:
    """(C, 1, 1), made once: copying a number to a GPU makes the host wait for it, which a training step must not."""
    return torch.tensor(numbers, dtype=torch.float32, device=device).reshape(-1, 1, 1)


def fit_channels(images: Tensor, channels: int, name: str) -> Tensor:
    """uint8 images with `channels` channels: grey is repeated, anything else that differs is a ValueError."""
    if images.dtype != torch.uint8 or images.ndim != 4:
        raise ValueError(f"codec {name!r} takes uint8 images (B, c, H, W), got {images.dtype} {tuple(images.shape)}")
    if images.shape[1] not in (1, channels):
        raise ValueError(
            f"codec {name!r} takes {channels}-channel images, got {images.shape[1]} channels; "
            "convert the images or choose another codec"
        )
    return images.expand(-1, channels, -1, -1)
