#!/usr/bin/env bash
# Baseline: SiT-XL/2 on labels with the alignment of REPA, without flips. The same command again continues.
#   bash scripts/train-repa-xl.sh [flags of train.py]
# Variables: STEPS, OUT, MODEL, and those of imagenet.sh.
# Hardware, memory, disk   as for train-gmem-xl.sh
# Time      estimate as there: 400,000 steps take 7 hours on eight H200, STEPS=4000000 takes 73
# Expected  published, FID-50K without guidance: 7.9 at 400,000 steps, 5.9 at 4,000,000. Not yet reproduced; the authors
#           trained in fp16, this recipe in bf16
set -euo pipefail
source "$(dirname "$0")/imagenet.sh"
launch train.py --store "$store" --out "${OUT:-runs/repa-xl-$size}" --condition label --model "${MODEL:-SiT-XL/2}" \
    --steps "${STEPS:-400000}" "${batch_flags[@]}" "${align_flags[@]}" "$@"
