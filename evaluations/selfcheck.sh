#!/usr/bin/env bash
# Does this evaluator give ADM's numbers? Downloads ADM's reference and samples (up to 12 GB) and the Inception weights
# (96 MB), scores them, and compares with what ADM's authors printed. Files that are there are used as they are.
#   bash evaluations/selfcheck.sh [FOLDER]     FOLDER: where the files go (default weights), from the repository
#   PROCESSES=8                                processes (default 1)
set -euo pipefail
cd "$(dirname "$0")/.."
folder=${1:-${GMEM_WEIGHTS:-weights}}
reference=VIRTUAL_imagenet256_labeled.npz
samples=admnet_guided_upsampled_imagenet256.npz
weights=weights-inception-2015-12-05-6726825d.pth
bash scripts/fetch.sh --folder "$folder" reference-256 admnet-256 inception
torchrun --standalone --nproc-per-node "${PROCESSES:-1}" -m evaluations.evaluator "$folder/$reference" \
    "$folder/$samples" --inception "$folder/$weights" --out "$folder/selfcheck.json"
python - "$folder/selfcheck.json" <<'PYTHON'
import json
import sys

published = {  # metric: value printed by ADM's evaluator, tolerance
    "Inception Score": (215.84, 0.2),
    "FID": (3.943, 0.01),
    "sFID": (6.140, 0.02),
    "Precision": (0.8265, 0.003),
    "Recall": (0.5309, 0.003),
}
result = json.load(open(sys.argv[1]))
passed = not result["warnings"]
for name, (value, tolerance) in published.items():
    difference = result["metrics"][name] - value
    good = abs(difference) <= tolerance
    passed &= good
    print(f"{name}: published {value}, here {result['metrics'][name]:.6g}, {'good' if good else 'OUT OF TOLERANCE'}")
sys.exit(0 if passed else "this evaluator does not reproduce ADM's numbers here")
PYTHON
