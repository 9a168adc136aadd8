#!/usr/bin/env bash
# GMem's first release: SiT-XL/2 on snippets, with the alignment of REPA. The same command again continues.
#   bash scripts/train-gmem-xl.sh [flags of train.py]
# Variables: STEPS, OUT, MODEL, and those of imagenet.sh. On one GPU the batch of 256 is accumulated.
# Hardware  1, 2, 4 or 8 GPUs of 80 GB, or of 40 with MICRO_BATCH=32, by estimate. For 24 GB MICRO_BATCH=16, best with the
#           flag --checkpoint-activations: within 22 GiB, 23.6 GB, it took 16.5 GB at most, without the flag 21.6
#           (benchmarks/results/cards*-h200.json), its grid of samples included; with less room the grid is left out, with
#           a warning. By estimate MICRO_BATCH=8 with ALIGN=0 fits, too
# Memory    a GPU: 22 bytes · 683M parameters = 15.0 GB, and activations; the flag --dry-run prints an estimate. Measured
#           on one H200: 58.3 GB at 128 images, 25.8 at 32, without alignment; with it at most 65.3 and 31.9, for the
#           benchmark keeps other networks beside it (benchmarks/results/train-align-h200.json). The VAE takes about 1 GB
#           more for the grids of samples (none with --sample-every 0)
# Disk      16 · 683M = 10.9 GB a checkpoint, three at a time; 2.7 GB a snapshot every 50,000 steps
# Time      one H200 with alignment: 566 images/s at 128 images a step, 490 at 32
#           (benchmarks/results/train-align-h200.json). One alone, 128 images at once: 400,000 · 256 / 566 = 181,000 s = 50
#           hours, STEPS=2000000 251. Estimate for eight, 32 images each: 400,000 · 256 / (8 · 490) = 26,100 s = 7 hours,
#           STEPS=2000000 36, if eight lose nothing; two lost 12.4% at 32 images each, without alignment
#           (benchmarks/results/train-h200-x2-levers-plain.json): 8 and 41 hours. Four take 64 images each, where
#           NCCL_MAX_CTAS=16 NCCL_CGA_CLUSTER_SIZE=8 TORCH_NCCL_HIGH_PRIORITY=1 before the command lost 6.7% on two, NCCL's
#           choice 9 to 10 (benchmarks/results/train-h200-x2-*.json); four were not measured
# Alignment a step takes 13% longer with it: 639 images/s at 128 and 555 at 32 without, in the same run; 506 at 16, 256 a
#           step, within 22 GiB (benchmarks/results/train-memory.json). It needs the store's images, 252 GB; with tokens
#           stored instead (encode-imagenet.sh --patches) only a head is added, but they take
#           1,281,167 · 256 · 768 · 2 bytes = 504 GB; ALIGN=0 trains without
# Expected  published, FID-50K without guidance: 5.75 at 250,000 steps, 3.56 at 2,000,000. Not yet reproduced
set -euo pipefail
source "$(dirname "$0")/imagenet.sh"
launch train.py --store "$store" --bank "$bank" --out "${OUT:-runs/gmem-xl-$size}" --model "${MODEL:-SiT-XL/2}" \
    --steps "${STEPS:-400000}" "${batch_flags[@]}" "${align_flags[@]}" "$@"
