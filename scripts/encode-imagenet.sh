#!/usr/bin/env bash
# ImageNet's training images to latents of sd-vae-ft-mse and class tokens of DINOv2 ViT-B/14; 1% are held out.
#   IMAGENET=/data/imagenet/train bash scripts/encode-imagenet.sh [flags of scripts.encode_dataset]
# IMAGENET is a folder of class folders, a zip or a tar. Variables: HOLDOUT, KEEP_IMAGES=no, and those of imagenet.sh.
# Hardware  any number of GPUs; as many CPU cores as there are for the JPEGs
# Memory    estimate: 64 · 128 · 256 · 256 · 4 bytes = 2.1 GB for a map of the VAE's first layers, a few at once
# Disk      1,281,167 images at 256 px: 21 GB of latents (4·32·32 means and stds in 2 bytes), 2 GB of class tokens
#           (768 in 2 bytes), 252 GB of pixels for the alignment; at 512 px four times the latents and pixels
# Time      estimate: 2,048 images in two views took 32 s on one H200, start included (benchmarks/results), that is 64
#           images/s at the least; 1,281,167 / (8 · 64) = 2,500 s on eight
# Expected  data/imagenet256 with 1% fewer images than the source, the others in data/imagenet256-holdout
set -euo pipefail
source "$(dirname "$0")/imagenet.sh"
: "${IMAGENET:?is not set: name the training images, as in IMAGENET=/data/imagenet/train bash $0}"
keep=--keep-images
[ "${KEEP_IMAGES:-yes}" = yes ] || keep=
launch -m scripts.encode_dataset "$IMAGENET" --out "$store" --codec "$codec" --image-size "$size" --views "$views" \
    --encoder "$encoder" "${encoder_weights[@]/#/--encoder-weights=}" --holdout "${HOLDOUT:-0.01}" $keep \
    --batch-size $((64 * 256 ** 2 / size ** 2 / views)) "$@"
