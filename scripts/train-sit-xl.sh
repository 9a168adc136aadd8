#!/usr/bin/env bash
# Baseline: SiT-XL/2 on labels, with flips, without alignment and without clipping. The same command again continues.
#   VIEWS=2 KEEP_IMAGES=no bash scripts/encode-imagenet.sh && bash scripts/train-sit-xl.sh [flags of train.py]
# Variables: STEPS, OUT, MODEL, and those of imagenet.sh.
# Hardware, memory, disk   as for train-gmem-xl.sh
# Time      estimate as there, at the 560 images/s without alignment (benchmarks/results/train-h200-x1.json):
#           400,000 · 256 / (8 · 560) = 22,900 s = 6 hours on eight H200, STEPS=7000000 takes 111
# Expected  published, FID-50K without guidance, SDE: 17.19 at 400,000 steps, 8.26 at 7,000,000. Not yet reproduced;
#           the authors trained without autocast, this recipe in bf16
set -euo pipefail
export VIEWS=${VIEWS:-2}
source "$(dirname "$0")/imagenet.sh"
launch train.py --store "$store" --out "${OUT:-runs/sit-xl-$size}" --condition label --model "${MODEL:-SiT-XL/2}" \
    --steps "${STEPS:-400000}" --clip 1e9 "${batch_flags[@]}" "$@"
