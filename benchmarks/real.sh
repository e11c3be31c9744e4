#!/usr/bin/env bash
# A real language model and what recipes and other programs make of it: every row of benchmarks/real.py, on RACE-H too.
# Usage: benchmarks/real.sh GEMMA ASSETS WORK [--llama-quantize FILE] [--llm-compressor PYTHON]
# (GEMMA: a dense folder whose weights lie on no quantization grid; hours on two cores; what WORK holds is not made again)
set -euo pipefail
exec python "$(dirname "$0")/real.py" "$@" --examine
