#!/usr/bin/env bash
# GMem on real images in minutes, on a CPU: 64 images of the trained model in assets/, then the whole path from scratch,
# smaller: encode, bank, train, sample, look, evaluate. Every line is the command of the ImageNet recipe with smaller
# numbers. The same command again continues.
#   bash scripts/demo.sh [FOLDER]     FOLDER: where everything goes (default demo)
#   STEPS=3000 bash scripts/demo.sh   trains longer; SOURCE, K and IMAGES change the data, the bank and the samples, SHIPPED
#                                     (64) the number of images of the model in assets/
set -euo pipefail
if [[ ${1:-} == -* ]]; then
    sed -n '2,/^set/s/^# \{0,1\}//p' "$0"
    exit 2
fi
work=${1:-demo}
case $work in /*) ;; *) work=$PWD/$work ;; esac
source "$(dirname "$0")/setup.sh"
install -r requirements.txt
begin=$SECONDS
step() { printf '\n[%3d s] %s\n' $((SECONDS - begin)) "$1"; }
store=$work/data/fashion
bank=$work/banks/fashion
run=$work/runs/gmem-ti
encoder=efficientnet-lite0@96
steps=${STEPS:-900}
samples=$work/samples/$steps-steps

step "${SHIPPED:-64} images of the model in assets/, which was trained on all of Fashion-MNIST on a GPU"
python sample_ddp.py --checkpoint assets/gmem-fashion-mnist --out "$work/shipped" \
    --num-images "${SHIPPED:-64}" --sampler euler --steps 50
python -m scripts.neighbours "$work/shipped" --among assets/fashion-mnist --called "the shipped images" \
    --out "$work/shipped.png"
echo "look at $work/shipped.png"

step "now from scratch, smaller: images -> latents of a small VAE, and features of an ImageNet encoder; 10% held out"
python -m scripts.encode_dataset "${SOURCE:-assets/fashion-mnist}" --out "$store" --codec assets/fashion-mnist-vae \
    --encoder $encoder --image-size 32 --holdout 0.1 --keep-images

step "features -> memory bank"
python -m memory.build_bank --store "$store" --encoder $encoder --out "$bank" --k "${K:-400}" --passes 10

step "train SiT-Ti/2 on latents and snippets"
python train.py --store "$store" --bank "$bank" --out "$run" --model SiT-Ti/2 --model-options snippet_scale=6 \
    --steps "$steps" --batch-size 64 --lr 1e-3 --ema-decay 0.995 \
    --log-every 50 --save-every 450 --eval-every 450 --sample-every 0

for sampler in sde euler; do
    step "sample with $sampler"
    case $sampler in sde) evaluations=100 ;; *) evaluations=50 ;; esac
    python sample_ddp.py --checkpoint "$run" --out "$samples/$sampler" --sampler $sampler --steps $evaluations \
        --num-images "${IMAGES:-256}" --batch-size 64
done

step "look: each sample beside the training image nearest to it; is it a copy?"
python -m evaluations.copies --store "$store" --samples "$samples/sde" --out "$work"

step "evaluate, with real held-out images as the yardstick"
score() { # score NAME SAMPLES
    python -m evaluations.evaluator "$store" "$2" --encoder $encoder --num-samples "${IMAGES:-256}" \
        --out "$work/metrics/$1.json" >"$work/metrics/$1.log"
}
mkdir -p "$work/metrics"
score held-out "$store-holdout"
score sde "$samples/sde/samples.npz"
score euler "$samples/euler/samples.npz"
python -m scripts.table "$work"/metrics/{held-out,sde,euler}.json

step "done: look at $work/shipped.png (the model in assets/) and $work/neighbours.png (the one trained here)"
