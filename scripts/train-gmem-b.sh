#!/usr/bin/env bash
# The same recipe for SiT-B/2: a fifth of the parameters, under a third of the time. The same command again continues.
#   bash scripts/train-gmem-b.sh [flags of train.py]
# Variables: as for train-gmem-xl.sh.
# Hardware  one GPU of 24 GB or more
# Memory    a GPU: 22 bytes · 131M parameters = 2.9 GB, and activations; the flag --dry-run prints an estimate. Within
#           22 GiB it took 18.0 GB with alignment, 128 images at once (one H200, benchmarks/results/cards-h200.json)
# Disk      16 · 131M = 2.1 GB a checkpoint, three at a time; 0.5 GB a snapshot every 50,000 steps
# Time      estimate from the H200 of train-gmem-xl.sh by the multiplications of an image (SiT's paper: 23.0 and 118.6
#           billion), and alignment's time as an XL's: 1 / (23.0 / 118.6 / 639 + 1/566 - 1/639) = 1,980 images/s at 128 a
#           step, 400,000 · 256 / 1,980 = 51,700 s = 14 hours on one GPU; 1 / (23.0 / 118.6 / 555 + 1/490 - 1/555) =
#           1,700 at 32, 400,000 · 256 / (8 · 1,700) = 7,530 s = 2 hours on eight
# Expected  no published figure for GMem; SiT-B/2 without memory: FID-50K 33.02 at 400,000 steps (published)
set -euo pipefail
export MODEL=${MODEL:-SiT-B/2} OUT=${OUT:-runs/gmem-b-${SIZE:-256}}
exec bash "$(dirname "$0")/train-gmem-xl.sh" "$@"
