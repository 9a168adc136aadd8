#!/usr/bin/env bash
# GMem's first release: SiT-XL/2 on snippets, with the alignment of REPA. The same command again continues.
#   bash scripts/train-gmem-xl.sh [flags of train.py]
# Variables: STEPS, OUT, MODEL, and those of imagenet.sh. On one GPU the batch of 256 is accumulated.
# Hardware  1, 2, 4 or 8 GPUs of 80 GB, or of 40 with MICRO_BATCH=32, by estimate. For 24 GB MICRO_BATCH=16, best with the
#           flag --checkpoint-activations: within 22 GiB, 23.6 GB, it took 16.5 GB at most, without the flag 21.6
#           (benchmarks/results/cards*-h200.json), its grid of samples included; with less room the grid is left out, with
#           a warning. By estimate MICRO_BATCH=8 with ALIGN=0 fits, too
# Memory    a GPU: 22 bytes · 683M parameters = 15.0 GB, and activations; the flag --dry-run prints an estimate. Measured
#           without alignment on one H200: 58.3 GB at 128 images, 20.5 GB at 16 (benchmarks/results/train-*h200*.json);
#           the VAE takes about 1 GB more for the grids of samples (none with --sample-every 0)
# Disk      16 · 683M = 10.9 GB a checkpoint, three at a time; 2.7 GB a snapshot every 50,000 steps
# Time      one H200 without alignment: 560 images/s at 32 a step, 645 at 128, 506 at 16, 256 a step, within 22 GiB
#           (benchmarks/results/train-*.json). Estimate: with the encoder 1 / (1/560 + 1/8,099) = 524, and 400,000 · 256 /
#           (8 · 524) = 24,400 s = 7 hours on eight, STEPS=2000000 34, if eight lose nothing; two lost 10 to 11 ms a step
#           (5% at 128 images each, 10% at 64), which at 32 would be 16%: 8 and 40 hours;
#           one alone, 128 images at once: 1 / (1/645 + 1/8,099) = 597, 48 hours
# Alignment the encoder alone does 8,099 images/s on one H200 (benchmarks/results/encode-h200-x1.json), compiled, 128 at once;
#           train.py runs it uncompiled, 32 at once, and trains a head (2% of the operations), which was not timed: the
#           hours above are a lower bound. It needs the store's images, 252 GB; with tokens stored instead
#           (encode-imagenet.sh --patches) only the head is added, but they take 1,281,167 · 256 · 768 · 2 bytes = 504 GB;
#           ALIGN=0 trains without
# Expected  published, FID-50K without guidance: 5.75 at 250,000 steps, 3.56 at 2,000,000. Not yet reproduced
set -euo pipefail
source "$(dirname "$0")/imagenet.sh"
launch train.py --store "$store" --bank "$bank" --out "${OUT:-runs/gmem-xl-$size}" --model "${MODEL:-SiT-XL/2}" \
    --steps "${STEPS:-400000}" "${batch_flags[@]}" "${align_flags[@]}" "$@"
