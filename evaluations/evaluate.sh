#!/usr/bin/env bash
# Everything about one set of samples, ending with a one-page card: metrics with control rows, copies, bank, cost.
#   bash evaluations/evaluate.sh STORE BANK SAMPLES REF OUT [OPTIONS of evaluations.controls: --inception, --encoder, …]
#   AUDIT=ENCODER   encoder of the store for the copy audit, unrelated to the snippets' (default: latents alone)
#   PROCESSES=8     processes (default 1)
# STORE was encoded with --keep-images and --holdout. Writes OUT/{controls,copies}.json, card.md and the audit's pictures.
set -euo pipefail
if [ $# -lt 5 ]; then
    sed -n '2,6s/^# //p' "$0"
    exit 2
fi
store=$1 bank=$2 samples=$3 reference=$4 out=$5
launch() {
    if [ "${PROCESSES:-1}" = 1 ]; then python -m "$@"; else torchrun --standalone --nproc-per-node "$PROCESSES" -m "$@"; fi
}
mkdir -p "$out"
launch evaluations.controls "$reference" "$samples" --store "$store" --bank "$bank" --out "$out/controls.json" "${@:6}"
launch evaluations.copies --store "$store" --samples "$samples" --out "$out" ${AUDIT:+--encoder "$AUDIT"}
python -m evaluations.card --controls "$out/controls.json" --copies "$out/copies.json" --bank "$bank" --out "$out/card.md"
