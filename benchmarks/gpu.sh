#!/usr/bin/env bash
# All GPU figures from a plain checkout, step by step; nothing is installed. Steps take under 8 minutes each on one H100 or
# H200; a record that is there is not measured again, so an interrupted step is continued by the same command.
#   benchmarks/gpu.sh STEP [RECORDS]     RECORDS: folder of the records (default benchmarks/results/gpu)
# Steps, in this order (all: all of them; the first needs no GPU):
#   compile    the kernels through ptxas: registers, spills, load widths
#   tests      the kernels' and the decode step's tests on the device, in bfloat16 too (needs pytest)
#   verify     the same in short, without pytest; figures mean nothing where it fails
#   tune       tile sizes for every product, used by what follows
#   kernels    products against the measured bandwidth, beside torch.linear and torch._weight_int4pack_mm
#   3b         Llama-3.2-3B shape: bf16, int8, int4, prompt 128
#   3b-pruned  the same, pruned
#   peers      Hugging Face eager, and static cache + compile
#   8b         Llama-3.1-8B shape and depth-pruned
#   contexts   prompts of 2,048 and 16,384 tokens
#   gptq       GPTQ of 2 layers of the 8B shape, 128 x 2,048 tokens, extrapolated
#   pdl        the first rows again with programmatic dependent launch (HALVE_PDL=1), into RECORDS/pdl
#   check      pruned rows' peak memory is below that of the rows they were made from
#   pack       all records in one file, RECORDS.tar.gz
# HALVE_GPU_DEVICE=cpu HALVE_GPU_SHAPE=tiny tries a step without a GPU (TRITON_INTERPRET=1: with the kernels interpreted).
set -euo pipefail
step=${1:?which step? see the head of this file}
root=$(cd "$(dirname "$0")/.." && pwd)
records=${2:-$root/benchmarks/results/gpu}
device=${HALVE_GPU_DEVICE:-cuda}
python=${PYTHON:-python3}
export PYTHONPATH="$root/src:$root/benchmarks${PYTHONPATH:+:$PYTHONPATH}"
mkdir -p "$records"
[ -f "$records/tilings.json" ] && export HALVE_TRITON_TUNED=${HALVE_TRITON_TUNED:-$records/tilings.json}

run() { timeout 470 "$python" "$root/benchmarks/gpu.py" "$1" --out "$2" --device "$device" ${HALVE_GPU_SHAPE:+--shape "$HALVE_GPU_SHAPE"}; }

case $step in
    compile) [ -f "$records/compile.json" ] || "$python" "$root/benchmarks/gpu_compile.py" --out "$records/compile.json" ;;
    tests) cd "$root" && timeout 470 "$python" -m pytest -p no:cacheprovider tests/kernels/test_triton.py tests/test_cuda_decode.py ;;
    pdl) HALVE_PDL=1 run 3b "$records/pdl" ;;
    all) for each in compile tests verify tune kernels 3b 3b-pruned peers 8b contexts gptq pdl check pack; do bash "$0" "$each" "$records"; done ;;
    *) run "$step" "$records" ;;
esac
