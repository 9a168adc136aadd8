#!/usr/bin/env bash
# Baseline: 50,000 images from the published SiT-XL/2 of 7 million steps, random labels, SDE of 250 evaluations.
#   bash scripts/sample-sit-xl.sh [flags of sample_ddp.py]
#   GUIDANCE=1.5 bash scripts/sample-sit-xl.sh      with guidance, of the first three channels as the authors do
# The weights are SiT-XL-2-256x256.pt in the folder weights/. Variables: CHECKPOINT, OUT, IMAGES, BATCH (a GPU).
# Hardware, memory, disk   as for sample-gmem-xl.sh
# Time      as there: 1.7 hours on one H200; guidance doubles it
# Expected  published: FID-50K 8.26, with guidance 2.06. Not yet reproduced
set -euo pipefail
source "$(dirname "$0")/launch.sh"
checkpoint=${CHECKPOINT:-$weights/SiT-XL-2-256x256.pt}
need "$checkpoint" "sit sd-vae-ft-ema" "2.7 GB, of SiT's authors"
guide=() out=$(samples_of sit-xl)
if [ -n "${GUIDANCE:-}" ]; then
    guide=(--guide null --guidance-scale "$GUIDANCE" --guidance-channels 3) out=$out-guided-$GUIDANCE
fi
launch sample_ddp.py --checkpoint "$checkpoint" --out "${OUT:-$out}" --num-images "${IMAGES:-50000}" \
    ${BATCH:+--batch-size "$BATCH"} --labels random --sampler sde --steps 250 "${guide[@]}" "$@"
