#!/usr/bin/env bash
# Published weights and references into one folder, on a machine with a network and Python 3.11, nothing installed.
#   bash scripts/fetch.sh                  what encoding, sampling and evaluating need: 4 GB
#   bash scripts/fetch.sh gmem sit repa    the authors' networks: 4.7, 2.7 and 2.7 GB
#   bash scripts/fetch.sh --check          without a network, in seconds: is all there? (--hash reads the files, too)
# Interrupted downloads continue. Copy the folder (weights, or $GMEM_WEIGHTS) to where there is no network.
set -euo pipefail
cd "$(dirname "$0")/.."
exec "${PYTHON:-python3}" -m scripts.fetch "$@"
