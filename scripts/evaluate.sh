#!/usr/bin/env bash
# Everything about one set of samples, ending with a one-page card: metrics with control rows, copies, bank, cost.
#   bash scripts/evaluate.sh STORE BANK SAMPLES REF OUT [OPTIONS of evaluations.controls: --inception, --encoder, …]
#   AUDIT=ENCODER   encoder of the store for the copy audit, unrelated to the snippets' (default: latents alone)
# STORE was encoded with --keep-images and --holdout. Writes OUT/{controls,copies}.json, card.md and the audit's pictures.
#
# Or the curve of a training run, also while it trains: samples and scores every checkpoint that has no result yet.
#   bash scripts/evaluate.sh RUN --quick [OPTIONS of evaluations.evaluator: --inception, --encoder, …]
#   REF=FILE        reference (default: the run's store, if it keeps its images)
#   IMAGES=10000 SAMPLER=euler STEPS=50 BATCH=64     the samples; KEEP=1 keeps them (2 GB a checkpoint at 256 px)
#   sbatch --array 0-3 scripts/slurm.sh scripts/evaluate.sh RUN --quick      four jobs share the checkpoints
# Writes RUN/quick/0050000.euler-50-n10000.json … and curve.png. No figure of it compares with tables of 50,000 images.
#
# Either runs on all GPUs of this machine (NPROC=1: on one). Scoring 50,000 images of 256 px against a reference of 10,000
# took 46 s on one H200 (benchmarks/results/evaluate-h200.json); the card scores three such sets more, and what the
# sampling takes for a curve stands in sample-gmem-xl-ode.sh.
set -euo pipefail
source "$(dirname "$0")/launch.sh"

can_score=' # what the evaluator would miss after the images are made
import sys
from evaluations.evaluator import parse
from evaluations.images import open_images
from evaluations.inception import find_weights
args = parse([sys.argv[1], "SAMPLES", *sys.argv[2:]])
open_images(args.reference)
args.encoder or find_weights(args.inception)'

ours() { # ours STEP: whether this job of an array, or the only one, takes the checkpoint of that step
    local sum
    sum=$(cksum <<<"$1") # of the number itself, because the list of checkpoints changes while training runs
    [ $((${sum%% *} % ${SLURM_ARRAY_TASK_COUNT:-1})) -eq $((${SLURM_ARRAY_TASK_ID:-0} - ${SLURM_ARRAY_TASK_MIN:-0})) ]
}

quick() { # quick RUN [OPTIONS]
    run=$1 reference=${REF:-}
    name=${SAMPLER:-euler}-${STEPS:-50}-n${IMAGES:-10000}
    [ -f "$run/config.json" ] || wrong "$run is no run of train.py: it has no config.json"
    if [ -z "$reference" ]; then
        reference=$(python -c 'import json, sys; print(json.load(open(sys.argv[1]))["args"]["store"])' "$run/config.json")
    fi
    python -c "$can_score" "$reference" "${@:2}"
    mkdir -p "$run/quick"
    for checkpoint in "$run"/checkpoints/[0-9]*.pt; do
        step=$(basename "$checkpoint" .pt)
        ours "${step%-*}" || continue
        samples=$run/quick/${step%-*}.$name # a full state and a snapshot of one step hold the same averaged weights
        if [ -f "$samples.json" ]; then
            echo "$checkpoint has a result"
        elif [ -f "$checkpoint" ] && launch sample_ddp.py --checkpoint "$checkpoint" --out "$samples" --format npz \
            --sampler "${SAMPLER:-euler}" --steps "${STEPS:-50}" --num-images "${IMAGES:-10000}" --batch-size "${BATCH:-64}"; then
            launch -m evaluations.evaluator "$reference" "$samples/samples.npz" --out "$samples.json" "${@:2}"
            [ -n "${KEEP:-}" ] || rm -r "$samples"
        elif [ -f "$checkpoint" ]; then
            exit 1
        else
            echo "$checkpoint is gone: training keeps the latest; skipped"
        fi
    done
    python -m scripts.curve "$run/quick"
}

if [ "${2:-}" = --quick ]; then
    quick "$1" "${@:3}"
    exit
elif [ $# -lt 5 ]; then
    sed -n '2,/^set/s/^# \{0,1\}//p' "$0"
    exit 2
fi
store=$1 bank=$2 samples=$3 reference=$4 out=$5
for argument in "STORE $store" "BANK $bank" "SAMPLES $samples" "REF $reference"; do
    [ -e "${argument#* }" ] || wrong "$argument is not there: expected an existing path, absolute or from $PWD"
done
mkdir -p "$out"
launch -m evaluations.controls "$reference" "$samples" --store "$store" --bank "$bank" --out "$out/controls.json" "${@:6}"
launch -m evaluations.copies --store "$store" --samples "$samples" --out "$out" ${AUDIT:+--encoder "$AUDIT"}
python -m evaluations.card --controls "$out/controls.json" --copies "$out/copies.json" --bank "$bank" --out "$out/card.md"
