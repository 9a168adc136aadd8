# Sourced by the recipes: `launch WORDS…` runs `python WORDS…` on every GPU of this machine, or of several machines.
#   NPROC=4                     processes on this machine (default: its GPUs, or one on the CPU)
#   NODES=2 NODE=0 HEAD=name    machines, this one's number, the first one's name; scripts/slurm.sh sets them. PORT is on HEAD
# Paths that are not absolute start at the repository. Uses the active environment, or .venv where there is none.
#
# Ctrl-C, a hang-up, SIGTERM and SIGUSR1 stop a recipe after training has saved its running step, and end it with status
# 143 (STATUS_WHEN_STOPPED); the same command continues. The workers are signalled, not torchrun, which would kill them
# after 30 seconds, too early for a checkpoint of 11 GB, and fail.

cd "$(dirname "${BASH_SOURCE[0]}")/.."
if [ -z "${VIRTUAL_ENV:-}" ] && [ "${CONDA_DEFAULT_ENV:-base}" = base ] && [ -x .venv/bin/python ]; then
    source .venv/bin/activate
fi
weights=${GMEM_WEIGHTS:-weights}
nodes=${NODES:-1}
nproc=${NPROC:-$(python -c 'import torch; print(torch.cuda.device_count() or 1)')} || {
    echo "no Python with PyTorch here: activate an environment, or run pip install -r requirements.txt" >&2
    exit 1
}

wrong() { # wrong LINES…: leave with the status of a command that is used wrongly, and say what to do
    printf '%s\n' "$@" >&2
    exit 2
}

count() { # count NAME VALUE: leave unless the variable NAME is a whole number from 1 on
    [[ $2 =~ ^[1-9][0-9]{0,11}$ ]] || wrong "$1=$2: expected a whole number of at least 1"
}
count NPROC "$nproc"
count NODES "$nodes"
[ "$nodes" = 1 ] || [ -n "${HEAD:-}" ] || wrong "HEAD is not set: with NODES=$nodes it names the first machine"

launcher='' stopped=''
stop() {
    stopped=yes
    [ -n "$launcher" ] || return 0
    { [ $((nodes * nproc)) -gt 1 ] && pkill -TERM -P "$launcher"; } || kill -TERM "$launcher" || true
}
trap stop INT HUP TERM USR1

launch() {
    local command=(python) status=0
    [ -z "$stopped" ] || exit "${STATUS_WHEN_STOPPED:-143}" # a signal came between two commands
    if [ $((nodes * nproc)) -gt 1 ]; then
        command+=(-m torch.distributed.run --nproc-per-node "$nproc")
        if [ "$nodes" -gt 1 ]; then
            command+=(--nnodes "$nodes" --rdzv-backend c10d --rdzv-endpoint "$HEAD:${PORT:-29500}")
            command+=(--rdzv-id "${SLURM_JOB_ID:-gmem}" --rdzv-conf "is_host=$((${NODE:-${SLURM_NODEID:-0}} == 0))")
        else
            command+=(--standalone)
        fi
    fi
    set -m # a process group of its own, so that Ctrl-C reaches this shell alone
    (trap '' USR1 && exec "${command[@]}" "$@") </dev/null &
    launcher=$!
    set +m
    wait "$launcher" || status=$?
    while [ -n "$stopped" ] && kill -0 "$launcher" 2>/dev/null; do # a signal ended the waiting
        wait "$launcher" || true
    done
    launcher=''
    [ -z "$stopped" ] || exit "${STATUS_WHEN_STOPPED:-143}"
    return $status
}

micro_batch() { # micro_batch BATCH MOST: images of a forward pass, the largest share of a process's images up to MOST
    local images=$(($1 / (nodes * nproc))) parts=1
    while [ $parts -lt $images ] && { [ $((images / parts)) -gt "$2" ] || [ $((images % parts)) -ne 0 ]; }; do
        parts=$((parts + 1))
    done
    echo $((images < parts ? 1 : images / parts))
}

need() { # need FILE NAMES ORIGIN: leave with what to do unless the checkpoint FILE is there; NAMES are fetch.sh's
    case $1 in hf:*) return 0 ;; esac # a name on the hub
    [ ! -e "$1" ] || return 0
    local absent="$1 is not there"
    [[ $1 == /* ]] || absent+=" (relative paths start at the repository: $PWD/$1)"
    [ -z "${CHECKPOINT:-}" ] ||
        wrong "CHECKPOINT=$absent: expected a file, a run's folder, or hf:ORGANISATION/REPOSITORY/FILE@REVISION"
    wrong "$absent: $3." \
        "On a machine with internet, this gets it and the VAE that decodes its latents into the folder $weights:" \
        "    bash scripts/fetch.sh $2" \
        "GMEM_WEIGHTS names another folder, CHECKPOINT another checkpoint, such as your own run: CHECKPOINT=runs/NAME"
}

samples_of() { # samples_of NAME: the folder for images of the published weights NAME, or of CHECKPOINT
    local made_by=${CHECKPOINT:-$1}
    made_by=${made_by%/}
    made_by=${made_by%.pt}
    made_by=${made_by/\/checkpoints\//-}
    echo "samples/${made_by##*/}"
}
