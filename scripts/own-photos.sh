#!/usr/bin/env bash
# Your own images on one GPU of 24 GB: encode, bank, train, sample, and a page of metrics with the copy audit.
#   bash scripts/own-photos.sh FOLDER [flags of train.py]          the same command again continues
# FOLDER has a few thousand images or more at any depth, or is a zip; what cannot be read is named and left out. 5% are
# held out; the bank has a tenth as many snippets as there are images, so that it cannot remember single ones.
#   OUT=photos                    where everything goes
#   INIT=weights/….pth            start from GMem's weights or others; the network is then theirs (default: from scratch)
#   STEPS=30000 BATCH=128 MICRO_BATCH=64 MODEL=SiT-B/2 SIZE=256 HOLDOUT=0.05
#   VIEWS=2 (1: never mirrored)   K (snippets; a tenth of the images)
#   IMAGES=1000 EVALUATIONS=250   samples at the end, by the SDE
#   RATE=200                      training images/s of your GPU, for the hours printed at the start
#   CODEC ENCODER ENCODER_WEIGHTS AUDIT      a VAE, the snippets' encoder, and an unrelated one to judge the images with
# Memory    printed first; B/2 takes 22 bytes · 131M parameters = 2.9 GB, and 6.4 GB for 64 images; an XL, such as
#           GMem's, 17.7 GB with 8 images at once (H200, benchmarks/results/train-memory.json), and by estimate 1 GB more
#           while it decodes samples. python -m benchmarks.own tries all of this within 22 GiB a process: B/2 fits,
#           11.2 GB at most (H200, benchmarks/results/own-h200.json)
# Disk      0.2 MB an image for pixels, 33 kB for latents; 2.1 GB a checkpoint of B/2, three at a time
# Time      estimate: 30,000 · 128 images at 200/s = 5.3 hours. 200/s is 40% of an RTX 3090's 71 TFLOP/s (datasheet)
#           for 6 · 23.0 billion operations an image (SiT's paper)
# Expected  OUT/samples/*/preview.png, OUT/evaluation/*/card.md; no quality is stated, because your images decide it
set -euo pipefail
if [ $# -lt 1 ] || [[ $1 == -* ]]; then
    sed -n '2,/^set/s/^# \{0,1\}//p' "$0"
    exit 2
fi
absolute() { case $1 in /*) echo "$1" ;; *) echo "$PWD/$1" ;; esac; }
photos=$(absolute "$1") work=$(absolute "${OUT:-photos}")
for name in INIT ENCODER_WEIGHTS; do
    [ ! -e "${!name:-}" ] || printf -v $name %s "$(absolute "${!name}")"
done
if [ ! -e "$photos" ]; then
    echo "$photos is not there: expected a folder of images, or a zip" >&2
    exit 2
fi
source "$(dirname "$0")/setup.sh"
install -r requirements.txt
source scripts/launch.sh
store=$work/data/photos bank=$work/bank run=$work/run
encoder=${ENCODER:-dinov2-vitb14} audit=${AUDIT:-efficientnet-lite0}
steps=${STEPS:-30000} batch=${BATCH:-128} rate=${RATE:-200} model=${MODEL:-SiT-B/2} most=64
count STEPS "$steps"
count BATCH "$batch"
count RATE "$rate"
count MICRO_BATCH "${MICRO_BATCH:-1}"
samples=$work/samples/$steps-steps page=$work/evaluation/$steps-steps
if [ -n "${INIT:-}" ]; then
    show='import sys, models.checkpoint as c; print(c.load_model(sys.argv[1], bank=False)[1]["model_config"]["model"])'
    model=$(python -c "$show" "$INIT")
fi
case $model in *XL*) most=8 ;; *-L*) most=32 ;; esac # room is left for the VAE that decodes the grids of samples
train=(train.py --store "$store" --bank "$bank" --out "$run" --model "$model" --steps "$steps" --batch-size "$batch")
train+=(--micro-batch "$(micro_batch "$batch" "${MICRO_BATCH:-$most}")" ${INIT:+--init "$INIT"} "${@:2}")

tenths=$((steps * batch / rate / 360))
echo "training: $steps steps of $batch images, $((tenths / 10)).$((tenths % 10)) hours at $rate images/s (an estimate: RATE)"
python "${train[@]}" --dry-run 2>/dev/null | grep -E '^(memory|disk)' || true # no store yet: for 256 pixels

launch -m scripts.encode_dataset "$photos" --out "$store" --codec "${CODEC:-sd-vae-ft-mse}" --image-size "${SIZE:-256}" \
    --views "${VIEWS:-2}" --holdout "${HOLDOUT:-0.05}" --keep-images --upright --skip-broken --batch-size 16 \
    --encoder "$encoder" ${ENCODER_WEIGHTS:+--encoder-weights "$ENCODER_WEIGHTS"}
launch -m scripts.encode_dataset "$photos" --out "$store" --add "$audit" --batch-size 16
rows() { [ ! -f "$1/files.txt" ] || wc -l <"$1/files.txt"; }
images=$(($(rows "$store") + 0)) held=$(($(rows "$store-holdout") + 0))
if [ $images -lt 10 ] || [ $held -lt 4 ]; then
    wrong "$photos: $images images, and $held held out for the page of metrics; expected at least 10 and 4." \
        "Add images, or hold out a larger share, HOLDOUT=0.1, with another OUT"
fi
launch -m memory.build_bank --store "$store" --encoder "$encoder" --out "$bank" --k "${K:-$((images / 10))}"
launch "${train[@]}"
launch sample_ddp.py --checkpoint "$run" --out "$samples" --num-images "${IMAGES:-1000}" --batch-size 64 \
    --steps "${EVALUATIONS:-250}"
AUDIT=$audit bash scripts/evaluate.sh "$store" "$bank" "$samples" "$store" "$page" --encoder "$audit"
echo "look at $samples/preview.png, $page/card.md and $page/neighbours.png"
