#!/usr/bin/env bash
# GMem's first release: SiT-XL/2 on snippets, with the alignment of REPA. The same command again continues.
#   bash scripts/train-gmem-xl.sh [flags of train.py]
# Variables: STEPS, OUT, MODEL, and those of imagenet.sh. On one GPU the batch of 256 is accumulated.
# Hardware  1, 2, 4 or 8 GPUs of 80 GB, or of 40 with MICRO_BATCH=32, by estimate. For 24 GB MICRO_BATCH=16, best with the
#           flag --checkpoint-activations: within 22 GiB, 23.6 GB, it took 16.5 GB at most, without the flag 21.6
#           (benchmarks/results/cards*-h200.json), a grid of samples included; one that finds no room is left out with a
#           warning. By estimate MICRO_BATCH=8 with ALIGN=0 fits, too
# Memory    a GPU: 22 bytes · 683M parameters = 15.0 GB, and activations; the flag --dry-run prints an estimate. Measured
#           on one H200: 65.3 GB at 128 images, 31.9 GB at 32; without alignment 58.3 GB at 128, 25.8 GB at 32 and 20.5 GB
#           at 16 (benchmarks/results/train-*h200.json);
#           the VAE takes about 1 GB more for the grids of samples (none with --sample-every 0)
# Disk      16 · 683M = 10.9 GB a checkpoint, three at a time; 2.7 GB a snapshot every 50,000 steps
# Time      one H200: 490 images/s at 32 a step, 566 at 128 (benchmarks/results/train-align-h200.json; without alignment 555
#           and 639 in the same run; 506 at 16, 256 a step, within 22 GiB, train-memory.json). Estimate: 400,000 · 256 /
#           (8 · 490) = 26,100 s = 7 hours on eight, STEPS=2000000 36, if eight lose nothing; two lost 8 to 11 ms a step
#           without alignment (5% at 128 images each, 10% at 64, 12% at 32), by which it would be 8 and 41 hours;
#           one alone, 128 images at once: 400,000 · 256 / 566 = 181,000 s = 50 hours
# Alignment 11% of the rate at 128 images, 12% at 32: the encoder on the store's images, 252 GB, and a head. With tokens
#           stored instead (encode-imagenet.sh --patches) only the head is added, but they take
#           1,281,167 · 256 · 768 · 2 bytes = 504 GB; ALIGN=0 trains without
# Expected  published, FID-50K without guidance: 5.75 at 250,000 steps, 3.56 at 2,000,000. Not yet reproduced
set -euo pipefail
source "$(dirname "$0")/imagenet.sh"
launch train.py --store "$store" --bank "$bank" --out "${OUT:-runs/gmem-xl-$size}" --model "${MODEL:-SiT-XL/2}" \
    --steps "${STEPS:-400000}" "${batch_flags[@]}" "${align_flags[@]}" "$@"
