#!/usr/bin/env bash
# Any recipe on a SLURM cluster, on one node or several: saves ten minutes before the time limit, and requeues itself.
#   sbatch scripts/slurm.sh scripts/train-gmem-xl.sh [flags]                 from the repository
#   sbatch --nodes 4 --gpus-per-node 4 --cpus-per-task 32 --partition NAME --time 12:00:00 scripts/slurm.sh …
# Every node runs the recipe once, on all its GPUs; variables (STEPS, SIZE …) are those of the shell that submits.
# A recipe that finishes ends the job; one that fails ends it with its status and is not requeued.
# Ten minutes: training finishes its step and saves. The 10.8 GB of an XL took 12 and 19 s on the local disk of an H200's
# machine that others used, too (benchmarks/results/save-h200.json); in 480 s (PATIENCE) a shared file system of 23 MB/s
# still does it. On a slower one, or with longer evaluations: --signal=B:USR1@1200 and PATIENCE=1000.
#SBATCH --job-name=gmem
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@600
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%x-%j.log
set -euo pipefail
if [ $# -lt 1 ] || [ -z "${SLURM_SUBMIT_DIR:-}" ]; then
    echo "expected sbatch and a recipe: sbatch scripts/slurm.sh scripts/train-gmem-xl.sh" >&2
    exit 2
fi
cd "$SLURM_SUBMIT_DIR"
NODES=$SLURM_JOB_NUM_NODES
HEAD=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
HEAD=${HEAD%%$'\n'*} # the first line; a pipe to head could break under scontrol and end this script
PORT=$((20000 + SLURM_JOB_ID % 20000)) # jobs may share a node
STATUS_WHEN_STOPPED=0                  # else the first node to leave would end the others while they save
export NODES HEAD PORT STATUS_WHEN_STOPPED
unset NODE # every task has its own, SLURM_NODEID
stopped='' status=0
trap 'stopped=yes' USR1
srun --kill-on-bad-exit=1 --ntasks-per-node=1 ${SLURM_CPUS_PER_TASK:+--cpus-per-task="$SLURM_CPUS_PER_TASK"} bash "$@" &
step=$!
wait "$step" || status=$?
[ -n "$stopped" ] || exit "$status"

echo "the time limit is near: saving, then requeueing"
scancel --signal=USR1 "$SLURM_JOB_ID" || true # to the recipe on every node, if it still runs; launch.sh passes it on
for ((second = 0; second < ${PATIENCE:-480}; second++)); do # whoever has not saved by then continues from before
    kill -0 "$step" 2>/dev/null || break
    sleep 1
done
scontrol requeue "$SLURM_JOB_ID"
