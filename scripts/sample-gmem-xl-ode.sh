#!/usr/bin/env bash
# The same images by the ODE: Euler with 50 evaluations, a fifth of the time.
#   bash scripts/sample-gmem-xl-ode.sh [flags of sample_ddp.py, such as --sampler heun --steps 125]
# Variables, hardware, memory, disk   as for sample-gmem-xl.sh
# Time      estimate from there: 6,050 s · 50 / 250 = 20 minutes on one H200, and decoding
# Expected  no published figure; an ODE scores a little worse than the SDE (SiT, published: 9.35 against 8.26)
set -euo pipefail
source "$(dirname "$0")/launch.sh"
export NPROC=$nproc OUT=${OUT:-$(samples_of gmem-xl)-ode}
exec bash scripts/sample-gmem-xl.sh --sampler euler --steps 50 "$@"
