#!/usr/bin/env bash
# The claim in miniature, whole: searches, every arm on glyphs and Fashion-MNIST, other glyph sets, figures and tables.
#   bash scripts/miniature.sh [flags of scripts.miniature]          the same command again continues
# evaluations/miniature.md is the protocol. Runs whose logs are finished are skipped, so as it stands this runs what
# benchmarks/miniature/ lacks, and with --again also those from before Heun's method was scored. All of it anew:
#   LOGS=runs/miniature-logs        folder of the logs, which gets the committed encoders that score: figures compare
# Flags go to each command and come last: --steps 1000 --num-images 1000 for a short run, --root FOLDER for another disk
# The same command on several GPUs (CUDA_VISIBLE_DEVICES) shares the runs; the last to end draws all of them.
# Sources   fonts of the packages that scripts/make_glyphs.py names; Fashion-MNIST's idx files, of Debian's package
#           dataset-fashion-mnist, or in ROOT/sources/fashion-mnist (ROOT: runs/miniature, or --root)
# Hardware  one GPU of 24 GB or more, since alignment wants 18 GB free; the records are of H200s
# Memory    a GPU: 64 · 1,280 · 2 · 54,056 = 8.9 GB for the alignment's patch tokens, which may take half of what is
#           free; without alignment less than a tenth of that for the store
# Disk      about 35 GB: 8.9 GB of patch tokens for each of glyphs and Fashion-MNIST, 0.13 GB for each of 117 runs
# Time      5 hours of an H200, by estimate: 29 runs of 8,000 steps at 4 minutes with their points by Euler's and Heun's
#           method, 80 of 4,000 at 2 (8 more are the search's own); making the data and other ways to sample come on top
# Expected  LOGS/*/table.md like those in benchmarks/miniature/, up to the seeds' spread (scripts.compare --check)
set -euo pipefail
flags=("$@")
export NPROC=1 # small enough that more processes only wait for each other
source "$(dirname "$0")/launch.sh"
logs=${LOGS:-benchmarks/miniature}
for name in glyphs fashion; do
    mkdir -p "$logs/$name"
    [ -f "$logs/$name/metric.safetensors" ] || cp "benchmarks/miniature/$name/metric.safetensors" "$logs/$name"
done
run() { launch -m scripts.miniature "$@" --logs "$logs" "${flags[@]}"; }

run glyphs none label nearest-10 own --search
run fashion none label nearest-10 own --search
run fashion-6 none label nearest-10 own --search

run glyphs none --seeds 0 1 2
run glyphs label --seeds 0 1 2
run glyphs label-align --seeds 0 1 2
run glyphs nearest-10 --seeds 0 1 2
run glyphs nearest-10-align --seeds 0 1 2
run glyphs own --seeds 0 1 2
run glyphs nearest-1 --seeds 0 --steps 4000
run glyphs nearest-50 --seeds 0 --steps 4000
run glyphs rows-10 --seeds 0 --steps 4000
run glyphs random --seeds 0 --steps 4000
run glyphs class-mean --seeds 0 --steps 4000
run glyphs label+nearest-10 --seeds 0 --steps 4000
run glyphs label+nearest-10-align --seeds 0 --steps 4000
run glyphs dropout-0 --seeds 0 --steps 4000
run glyphs dropout-40 --seeds 0 --steps 4000
run glyphs label-dropout-0 --seeds 0 --steps 4000

run fashion none --seeds 0 1 2
run fashion label --seeds 0 1 2
run fashion label-align --seeds 0 1 2
run fashion nearest-10 --seeds 0 1 2
run fashion nearest-10-align --seeds 0 1 2
run fashion own --seeds 0 1 2
run fashion nearest-1 --seeds 0
run fashion nearest-50 --seeds 0
run fashion rows-10 --seeds 0
run fashion random --seeds 0
run fashion class-mean --seeds 0
run fashion label+nearest-10 --seeds 0
run fashion label+nearest-10-align --seeds 0
run fashion dropout-0 --seeds 0
run fashion dropout-40 --seeds 0
run fashion label-dropout-0 --seeds 0

run fashion-6 none --seeds 0 1 2
run fashion-6 label --seeds 0 1 2
run fashion-6 label-align --seeds 0 1 2
run fashion-6 nearest-10 --seeds 0 1 2
run fashion-6 nearest-10-align --seeds 0 1 2
run fashion-6 own --seeds 0 1 2

for name in glyphs-100 glyphs-500 glyphs-6384 glyphs-half; do
    run $name none label nearest-10 own --seeds 0
done
for name in glyphs fashion fashion-6; do # the last weights of seed 0, in other ways
    run $name none label nearest-10 own --seeds 0 --variants
done

for by in "" "--by heun-50"; do
    launch -m scripts.compare "$logs/glyphs" "$logs"/glyphs-{100,500,6384,half} $by
    launch -m scripts.compare "$logs/fashion" $by
    launch -m scripts.compare "$logs/fashion-6" $by
done
