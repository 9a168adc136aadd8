#!/usr/bin/env bash
# ImageNet's training images to latents of sd-vae-ft-mse and class tokens of DINOv2 ViT-B/14; 1% are held out.
#   IMAGENET=/data/imagenet/train bash scripts/encode-imagenet.sh [flags of scripts.encode_dataset]
# IMAGENET is a folder of class folders, a zip or a tar. Variables: HOLDOUT, KEEP_IMAGES=no, and those of imagenet.sh.
# Hardware  any number of GPUs, with five CPU cores each for the JPEGs, or three for two views (a core decodes 251 a second)
# Memory    4.8 GB of one H200 as the recipe does it, 64 images at once in one view (benchmarks/results/cards-h200.json);
#           9.3 GB for 64 in two views; the recipe takes 32 in two
# Disk      1,281,167 images at 256 px: 21 GB of latents (4·32·32 means and stds in 2 bytes), 2 GB of class tokens
#           (768 in 2 bytes), 252 GB of pixels for the alignment; at 512 px four times the latents and pixels
# Time      577 images/s in two views on one H200 (benchmarks/results/encode-h200-x1.json, random weights): 1,281,167 /
#           577 = 2,220 s = 37 minutes. One view, the default, was not timed: by both networks' rates 1 / (1/1,385 +
#           1/7,927) = 1,179 images/s, 18 minutes. Estimate for eight: an eighth, if the disk takes the pixels,
#           8 · 577 · 256·256·3 bytes = 0.9 GB a second in two views, 1.9 in one
# Expected  data/imagenet256 with 1% fewer images than the source, the others in data/imagenet256-holdout
set -euo pipefail
source "$(dirname "$0")/imagenet.sh"
[ -n "${IMAGENET:-}" ] || wrong "IMAGENET is not set: name the images, as in IMAGENET=/data/imagenet/train bash $0"
case ${KEEP_IMAGES:-yes} in
    yes) keep=--keep-images ;;
    no) keep= ;;
    *) wrong "KEEP_IMAGES=$KEEP_IMAGES: expected yes or no" ;;
esac
batch=$((64 * 256 ** 2 / size ** 2 / views))
launch -m scripts.encode_dataset "$IMAGENET" --out "$store" --codec "$codec" --image-size "$size" --views "$views" \
    --encoder "$encoder" "${encoder_weights[@]/#/--encoder-weights=}" --holdout "${HOLDOUT:-0.01}" $keep \
    --batch-size $((batch > 0 ? batch : 1)) "$@"
