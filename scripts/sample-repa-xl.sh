#!/usr/bin/env bash
# Baseline: 50,000 images from the published SiT-XL/2 + REPA of 4 million steps, random labels, SDE of 250 evaluations.
#   bash scripts/sample-repa-xl.sh [flags of sample_ddp.py]
#   GUIDANCE=1.8 bash scripts/sample-repa-xl.sh     with guidance, at times from 0 to 0.7 as the authors do
# The weights are their last.pt, as REPA-SiT-XL-2-256x256.pt in the folder weights/. Variables: CHECKPOINT, OUT, IMAGES,
# BATCH (a GPU).
# Hardware, memory, disk   as for sample-gmem-xl.sh
# Time      as there: 1.7 hours on one H200; guidance at seven tenths of the times adds as many tenths
# Expected  published: FID-50K 5.9, with guidance 1.42. Not yet reproduced
set -euo pipefail
source "$(dirname "$0")/launch.sh"
checkpoint=${CHECKPOINT:-$weights/REPA-SiT-XL-2-256x256.pt}
need "$checkpoint" "repa sd-vae-ft-ema" "2.7 GB, of REPA's authors"
guide=() out=$(samples_of repa-xl)
if [ -n "${GUIDANCE:-}" ]; then
    guide=(--guide null --guidance-scale "$GUIDANCE" --guidance-interval 0 0.7) out=$out-guided-$GUIDANCE
fi
launch sample_ddp.py --checkpoint "$checkpoint" --out "${OUT:-$out}" --num-images "${IMAGES:-50000}" \
    ${BATCH:+--batch-size "$BATCH"} --labels random --sampler sde --steps 250 --uint8 truncate "${guide[@]}" "$@"
