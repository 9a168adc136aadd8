#!/usr/bin/env bash
# The model in assets/gmem-fashion-mnist: all of Fashion-MNIST to a small GMem in one file with its bank, and scores.
#   bash scripts/fashion-mnist.sh FOLDER [flags of train.py]       the same command again continues
# FOLDER holds Fashion-MNIST's idx files (train-images-idx3-ubyte.gz …); a tenth is held out of everything.
#   OUT=fashion-mnist             where everything goes; OUT/export is what is shipped
#   STEPS=10044 BATCH=512 LR=1e-3 MODEL=SiT-Ti/4 CODEC=pixels K=1200
#   SCALE=1                       factor on the snippet in the condition (snippet_scale)
#   IMAGES=10000 SAMPLER=euler EVALUATIONS=50
#   METRIC=FILE                   weights of the regnetx_002@64 that scores samples (default: the miniature's)
# Then `python -m scripts.make_assets model --source OUT` packs the asset.
# Time      4 minutes on an H200 that others used too, 2 of them for training; a CPU takes hours
# Disk      0.5 GB
# Expected  OUT/card.md with lines like those of assets/gmem-fashion-mnist/README.md, where FD to held-out images is 0.41;
#           they are of one run, and how far runs differ was not measured
set -euo pipefail
if [ $# -lt 1 ] || [[ $1 == -* ]]; then
    sed -n '2,/^set/s/^# \{0,1\}//p' "$0"
    exit 2
fi
absolute() { case $1 in /*) echo "$1" ;; *) echo "$PWD/$1" ;; esac; }
[ -z "${METRIC:-}" ] || METRIC=$(absolute "$METRIC")
source_folder=$(absolute "$1") work=$(absolute "${OUT:-fashion-mnist}")
export NPROC=1 # small enough that more processes only wait for each other
source "$(dirname "$0")/launch.sh"
store=$work/data bank=$work/bank run=$work/run samples=$work/samples
snippets=efficientnet-lite0@96 judge=regnetx_002@64
metric=${METRIC:-benchmarks/miniature/fashion/metric.safetensors}
steps=${STEPS:-10044} batch=${BATCH:-512} k=${K:-1200} images=${IMAGES:-10000} evaluations=${EVALUATIONS:-50}
count STEPS "$steps"
count BATCH "$batch"
count K "$k"
count IMAGES "$images"
count EVALUATIONS "$evaluations"
mkdir -p "$work"

launch -m scripts.encode_dataset "$source_folder" --out "$store" --codec "${CODEC:-pixels}" \
    --encoder $snippets --image-size 32 --holdout 0.1 --keep-images --batch-size 500 --no-compile
launch -m memory.build_bank --store "$store" --encoder $snippets --out "$bank" --k "$k" --passes 20
if [ ! -f "$work/export/model.safetensors" ]; then # remove OUT/export to train on
    launch train.py --store "$store" --bank "$bank" --out "$run" --model "${MODEL:-SiT-Ti/4}" --steps "$steps" \
        --model-options "snippet_scale=${SCALE:-1}" null_dropout=0.1 --batch-size "$batch" --lr "${LR:-1e-3}" \
        --ema-decay 0.9995 --log-every 500 --save-every 5000 --eval-every 5000 --snapshot-every 0 --sample-every 0 \
        --resident "${@:2}" # --resident last: what follows it stands in the model card as flags
    launch -m scripts.export "$run" --half --out "$work/export"
else
    echo "$work/export is there already and is not trained anew; remove it to train by other variables or flags"
fi
launch sample_ddp.py --checkpoint "$work/export" --bank "$bank" --out "$samples" --num-images "$images" --format npz \
    --sampler "${SAMPLER:-euler}" --steps "$evaluations" --batch-size 2000 --no-compile
launch -m scripts.encode_dataset "$source_folder" --out "$store" --add $judge --encoder-weights "$metric" \
    --batch-size 500 --no-compile
launch -m evaluations.controls "$store" "$samples" --store "$store" --bank "$bank" --out "$work/controls.json" \
    --encoder $judge --encoder-weights "$metric"
launch -m evaluations.copies --store "$store" --samples "$samples" --out "$work" --encoder $judge \
    --encoder-weights "$metric"
launch -m evaluations.card --controls "$work/controls.json" --copies "$work/copies.json" --bank "$bank" \
    --out "$work/card.md"
