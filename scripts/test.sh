#!/usr/bin/env bash
# Check style and run every test (GPU tests only where there is a GPU). More words go to pytest: bash scripts/test.sh -k bank
set -euo pipefail
source "$(dirname "$0")/setup.sh"
install -r requirements.txt -r tests/requirements.txt
ruff check .
ruff format --check .
exec python -m pytest "$@"
