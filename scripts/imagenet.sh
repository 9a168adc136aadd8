# Sourced by the ImageNet recipes: what they share, every value to be overridden by a variable.
#   SIZE=512        pixels (default 256); the encoder then looks at 448 of them
#   VIEWS=2         a store with mirrored images too, as SiT's recipe wants (default 1: GMem's and REPA's)
#   STORE, BANK     their folders (default data/NAME, banks/NAME; NAME is imagenet256, imagenet512, imagenet256-flips …)
#   CODEC, ENCODER  by name from the weights folder (scripts/fetch.sh) or the hub; a folder, and ENCODER_WEIGHTS a file
#   ALIGN=0         no alignment (default 0.5, REPA's coefficient), for a store without images
#   BATCH, MICRO_BATCH   global batch, and the most images in a forward pass: the rest by accumulation
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"
size=${SIZE:-256} views=${VIEWS:-1} batch=${BATCH:-256} align=${ALIGN:-0.5}
count SIZE "$size"
count VIEWS "$views"
count BATCH "$batch"
count MICRO_BATCH "${MICRO_BATCH:-1}"
name=imagenet$size
[ "$views" = 1 ] || name=$name-flips
store=${STORE:-data/$name} bank=${BANK:-banks/$name} codec=${CODEC:-sd-vae-ft-mse}
[ "$size" -lt 512 ] && encoder=dinov2-vitb14 || encoder=dinov2-vitb14@448
encoder=${ENCODER:-$encoder}

encoder_weights=(${ENCODER_WEIGHTS:+"$ENCODER_WEIGHTS"})
most=$((128 * 256 ** 2 / size ** 2)) # images whose activations fit beside an XL in 80 GB
batch_flags=(--batch-size "$batch" --micro-batch "$(micro_batch "$batch" "${MICRO_BATCH:-$most}")")
align_flags=()
if [ "$align" != 0 ]; then # to patch tokens of the encoder, which runs on the store's images while training
    align_flags=(--align-coeff "$align" --align-encoder "$encoder" "${encoder_weights[@]/#/--align-encoder-weights=}")
fi
