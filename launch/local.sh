#!/usr/bin/env bash
# One machine with all its devices: a CPU, a box of GPUs, a TPU VM. Environment, then the trainer; no logic.
#   launch/local.sh --config configs/ar/raster.py:tiny --workdir runs/prior
set -euo pipefail
cd "$(dirname "$0")/.."

# compiled programs are kept, so that a restart begins at once; the folder is code that will run: only its owner may write
cache="${XDG_CACHE_HOME:-$HOME/.cache}/hybridgen"
mkdir -p -m 700 "$cache"
export JAX_COMPILATION_CACHE_DIR="${JAX_COMPILATION_CACHE_DIR:-$cache}"

# GPU: all but a tenth of the memory (JAX takes three quarters of it otherwise)
export XLA_PYTHON_CLIENT_MEM_FRACTION="${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.9}"

exec "${PYTHON:-python3}" -m hybridgen.train "$@"
