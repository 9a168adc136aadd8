#!/usr/bin/env bash
# 50,000 images from GMem's published weights as its authors sample them: SDE of 250 evaluations, no guidance.
#   bash scripts/sample-gmem-xl.sh [flags of sample_ddp.py]
#   CHECKPOINT=runs/gmem-xl-256 bash scripts/sample-gmem-xl.sh      from your own run
# The weights are GMem_XL_2Miter_ImageNet-1K_K640000_5epo.pth (4.7 GB, bank included) of the hub repository
# Tangentone/GMem, in the folder weights/. Variables: CHECKPOINT, OUT, IMAGES, BATCH (a GPU), GMEM_WEIGHTS.
# Hardware  one GPU or more; image i is the same picture on any number
# Memory    4.7 GB on one H200 with a bank of 640,000 (benchmarks/results/sample-h200.json); BATCH=32 for a small GPU
# Disk      9.8 GB for the npz (50,000 · 256·256·3 bytes) and as much while it is written; PNG files on top
# Time      8.27 images/s on one H200, compiled as by default, BATCH=256, decoding and files included
#           (benchmarks/results/sample-h200.json, random weights): 50,000 / 8.27 = 6,050 s = 1.7 hours; estimate for
#           eight: 13 minutes
# Expected  published: FID-50K 3.56. Not yet reproduced: the file was out of reach where this was written
set -euo pipefail
source "$(dirname "$0")/launch.sh"
checkpoint=${CHECKPOINT:-$weights/GMem_XL_2Miter_ImageNet-1K_K640000_5epo.pth}
need "$checkpoint" "gmem sd-vae-ft-mse" "4.7 GB, of the hub repository Tangentone/GMem"
launch sample_ddp.py --checkpoint "$checkpoint" --out "${OUT:-$(samples_of gmem-xl)}" --num-images "${IMAGES:-50000}" \
    ${BATCH:+--batch-size "$BATCH"} --sampler sde --steps 250 --uint8 truncate "$@"
