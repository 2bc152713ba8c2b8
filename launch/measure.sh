#!/usr/bin/env bash
# Checks and measures one accelerator: correctness of the kernels, and the benchmarks.
#
#   launch/measure.sh [OUT]      # default: measured/; writes a JSON file per program, and the output to report.txt
#
# Compares the kernels with plain implementations on this device; then runs `hybridgen bench` on: training a prior and a
# decoder of 1B parameters; cached decoding at batch 8 with guidance, 775M and 3B; a cascade of a 775M prior, DiT-XL
# with 25 guided steps and the decoder of the latents, 64 images at 256 px at a time. This takes ten minutes on an H100,
# most of it for compiling. On a smaller chip, programs that do not fit fail, and the script continues with the next.
set -euo pipefail
cd "$(dirname "$0")/.."

out=${1:-measured}
if [[ -z ${PYTHON:-} ]]; then
  PYTHON=python3
  [[ ! -x .venv/bin/python ]] || PYTHON=.venv/bin/python
fi
mkdir -p "$out"
exec > >(tee "$out/report.txt") 2>&1

export XLA_PYTHON_CLIENT_MEM_FRACTION="${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.9}"
flags=$("$PYTHON" -m hybridgen.launch --flags auto)
eval "$flags"
failed=0

say() { printf '\n== %s\n' "$*"; }

bench() {
  local name=$1
  shift
  say "$name: hybridgen bench $*"
  "$PYTHON" -m hybridgen.bench "$@" --cached --json "$out/$name.json" || failed=$?
}

say "kernels"
# the tests use the CPU unless JAX_PLATFORMS is set
JAX_PLATFORMS="${JAX_PLATFORMS:-}" "$PYTHON" -m pytest -q -n 0 -p no:cacheprovider -k on_this_device tests/tools/test_gpu.py || failed=$?

vq=configs/tokenizers/vq.py:f16
bench train-prior-1b --config configs/ar/raster.py:1b --what train
bench train-decoder-1b --config configs/diffusion/dit.py:1b --what train
bench decode-775m --config configs/ar/llamagen.py:xl --config.parts.tokenizer=$vq --what sample --count 8
bench cascade-256px --config configs/hybrid/cascade.py:xl --what sample
bench decode-3b --config configs/ar/llamagen.py:3b --config.parts.tokenizer=$vq --what sample --count 8
exit $failed
