#!/usr/bin/env bash
# What each part of GPTQ and of depth pruning is worth on two small real models: records for docs/gptq.md and docs/pruning.md.
# Usage: benchmarks/excess.sh ASSETS [RESULTS]   (ASSETS holds models/ and data/tinystories_317.txt; records there already stay)
set -euo pipefail
assets=$(cd "$1" && pwd)
here=$(cd "$(dirname "$0")" && pwd)
results=$(mkdir -p "${2:-$here/results/excess}" && cd "${2:-$here/results/excess}" && pwd)
python=${PYTHON:-python}
ask() { # NAME RECIPE...
    [ -e "$results/$1.json" ] || "$python" "$here/excess.py" --models "$assets/models/stories260K" "$assets/models/babyllama-tok361" \
        --text "$assets/data/tinystories_317.txt" --out "$results/$1.json" --recipes "${@:2}"
}
for bits in 4 3 2; do
    plain="gptq:bits=$bits,group_size=32,fallback=channel"
    ask "gptq-int$bits" "$plain,target=layer,refit=false,polish=0" "$plain,target=layer,refit=true,polish=0" \
        "$plain,target=layer,refit=true,polish=2" "$plain,target=dense,refit=false,polish=0" "$plain,target=dense,refit=true,polish=2"
done
for step in drop-layers:count=1 drop-layers:count=2 drop-attention:count=1 drop-mlp:count=1; do
    ask "${step//[:=]/-}" "$step,patch=false" "$step,patch=true"
done
