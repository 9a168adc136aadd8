#!/usr/bin/env bash
# The memory bank: 640,000 snippets by five passes of k-means over ImageNet's class tokens.
#   bash scripts/build-bank-imagenet.sh [flags of memory.build_bank]
# Variables: K, PASSES, and those of imagenet.sh.
# Hardware  one GPU or more; the same bank on any number
# Memory    16 · 640,000 · 768 = 7.9 GB for the snippets and 6 · 768 · 1,281,167 = 5.9 GB for the features, the latter
#           shared among the GPUs; measured in all 16.1 GB on one H200, 12.1 GB on each of two
# Disk      4 · 640,000 · 768 = 2.0 GB
# Time      five passes over random features of this size took 2.7 s on one H200, 1.5 s on two a week before
#           (benchmarks/results/kmeans-h200-x*.json); reading features and writing the bank come on top
# Expected  bank.json says how many rows hold one image; two images a row are few, so many do
set -euo pipefail
source "$(dirname "$0")/imagenet.sh"
launch -m memory.build_bank --store "$store" --encoder "$encoder" --out "$bank" --k "${K:-640000}" \
    --passes "${PASSES:-5}" "$@"
