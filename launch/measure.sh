#!/usr/bin/env bash
# What one accelerator does with this code: whether it computes the right numbers, and the speeds that it is judged by.
#
#   launch/measure.sh [OUT]      # default: measured/; a JSON file a program and all that is printed, in report.txt
#
# Kernels against the plain form on this device; then, each by `hybridgen bench`: training a prior and a decoder of 1B
# parameters; cached decoding at batch 8 with guidance, 775M and 3B; a cascade of a 775M prior, DiT-XL in 25 guided steps
# and the latents' decoder, 64 pictures at 256 px at a time. Ten minutes of an H100, most of it compiling; on a smaller
# chip what does not fit says so and the next goes on.
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
# not on the CPU, which the tests take unless they are told otherwise
JAX_PLATFORMS="${JAX_PLATFORMS:-}" "$PYTHON" -m pytest -q -n 0 -p no:cacheprovider -k on_this_device tests/test_gpu.py || failed=$?

vq=configs/tokenizers/vq.py:f16
bench train-prior-1b --config configs/ar/raster.py:1b --what train
bench train-decoder-1b --config configs/diffusion/dit.py:1b --what train
bench decode-775m --config configs/ar/llamagen.py:xl --config.parts.tokenizer=$vq --what sample --count 8
bench cascade-256px --config configs/hybrid/cascade.py:xl --what sample
bench decode-3b --config configs/ar/llamagen.py:3b --config.parts.tokenizer=$vq --what sample --count 8
exit $failed
