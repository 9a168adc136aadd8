# Sourced by demo.sh, test.sh and own-photos.sh: an environment with everything the project needs.
# Uses the active virtual or conda environment (but not conda's base); makes .venv where there is none.
# TORCH_INDEX_URL=https://download.pytorch.org/whl/cpu takes PyTorch's CPU build, a fraction of the download.

cd "$(dirname "${BASH_SOURCE[0]}")/.."
new_enough() { # new_enough PYTHON: leave if it is not
    "$1" - <<'EOF'
import sys
if sys.version_info < (3, 11):
    sys.exit(f"Python {sys.version.split()[0]}: this project needs 3.11 or newer")
EOF
}
if [ -z "${VIRTUAL_ENV:-}" ] && [ "${CONDA_DEFAULT_ENV:-base}" = base ]; then
    if [ ! -x .venv/bin/pip ]; then # which Debian leaves out where python3-venv is missing
        new_enough python3 # else an environment would stay that no later run could use
        python3 -m venv .venv
    fi
    source .venv/bin/activate
fi
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-PASSIVE} # threads that wait must not steal time on a busy machine
new_enough python

install() { # pip leaves alone what is there already, without asking the network
    if ! python -c 'import sys; from importlib.util import find_spec; sys.exit(not find_spec("torch"))'; then
        echo "Installing into $(python -c 'import sys; print(sys.prefix)')"
        if [ -n "${TORCH_INDEX_URL:-}" ]; then
            echo "  PyTorch from $TORCH_INDEX_URL (the CPU build and everything else: a fraction of the 3.2 GB of the CUDA build)"
            python -m pip install --quiet --index-url "$TORCH_INDEX_URL" "torch>=2.11" "torchvision>=0.26"
        else
            echo "  about 3.2 GB to download on Linux, most of it PyTorch's CUDA build; with"
            echo "  TORCH_INDEX_URL=https://download.pytorch.org/whl/cpu, for a machine without a GPU, a fraction of it"
        fi
    fi
    python -m pip install --quiet "$@"
}
