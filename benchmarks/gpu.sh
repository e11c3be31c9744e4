#!/usr/bin/env bash
# All GPU figures from a plain checkout, step by step; nothing is installed. Steps take under 8 minutes each on one H100 or
# H200; a record that is there is not measured again, so an interrupted step is continued by the same command.
#   benchmarks/gpu.sh STEP [RECORDS]     RECORDS: folder of the records (default benchmarks/results/gpu)
# Steps, in this order (all: all of them, and which failed at the end; the first needs no GPU):
#   compile    the kernels through ptxas: registers, spills, instructions a weight
#   verify     products and steps against float64 and torch; figures mean nothing where it fails
#   tune       tile sizes for every product, used by what follows
#   3b         Llama-3.2-3B shape: bf16, int8, int4, prompt 128
#   kernels    products against the measured bandwidth, beside torch.linear and torch._weight_int4pack_mm
#   peers      Hugging Face eager, and static cache + compile
#   3b-pruned  the 3B rows, pruned
#   8b         Llama-3.1-8B shape and depth-pruned
#   contexts   prompts of 2,048 and 16,384 tokens
#   pdl        verify and the first rows again with programmatic dependent launch (HALVE_PDL=1), into RECORDS/pdl
#   tests      the kernels' and the decode step's tests on the device (needs pytest; pytest-xdist makes it shorter)
#   gptq       GPTQ of 2 layers of the 8B shape, 128 x 2,048 tokens, extrapolated
#   check      pruned rows' peak memory is below that of the rows they were made from
#   pack       all records in one file, RECORDS.tar.gz
# HALVE_GPU_DEVICE=cpu HALVE_GPU_SHAPE=tiny tries a step without a GPU (TRITON_INTERPRET=1: with the kernels interpreted,
# HALVE_GPU_EMULATE=1: with the compiled kernels run on the CPU; verify needs no shape).
set -euo pipefail
step=${1:?which step? see the head of this file}
root=$(cd "$(dirname "$0")/.." && pwd)
records=${2:-$root/benchmarks/results/gpu}
device=${HALVE_GPU_DEVICE:-cuda}
python=${PYTHON:-python3}
export PYTHONPATH="$root/src:$root${PYTHONPATH:+:$PYTHONPATH}"
"$python" -c "import torch" 2>/dev/null || { echo "$python has no PyTorch: name one that has, as in PYTHON=.venv/bin/python" >&2; exit 1; }
mkdir -p "$records"
[ -f "$records/tilings.json" ] && export HALVE_TRITON_TUNED=${HALVE_TRITON_TUNED:-$records/tilings.json}
echo "tile sizes: ${HALVE_TRITON_TUNED:-by rule of thumb}"

run() { timeout 470 "$python" -m tools.gpu.steps "$1" --out "$2" --device "$device" ${HALVE_GPU_SHAPE:+--shape "$HALVE_GPU_SHAPE"}; }

case $step in
    compile) [ -f "$records/compile.json" ] || "$python" -m tools.ptx.compile --out "$records/compile.json" ;;
    tests)
        at_once=$("$python" -c "import os, xdist; print('-n', min(8, os.cpu_count() or 1))" 2>/dev/null) || at_once=
        # shellcheck disable=SC2086
        cd "$root" && timeout 470 "$python" -m pytest -p no:cacheprovider $at_once tests/kernels/test_triton.py tests/decode/test_gpu_step.py
        ;;
    pdl) HALVE_PDL=1 run verify "$records/pdl" && HALVE_PDL=1 run 3b "$records/pdl" ;;
    all)
        failed=
        for each in compile verify tune 3b kernels peers 3b-pruned 8b contexts pdl tests gptq check pack; do
            bash "$0" "$each" "$records" || failed="$failed $each"
        done
        [ -z "$failed" ] || { echo "failed:$failed" >&2; exit 1; }
        ;;
    *) run "$step" "$records" ;;
esac
