#!/usr/bin/env bash
# First results: two real models by round-to-nearest, reloaded, perplexity and speed, as records.
# Usage: benchmarks/first.sh ASSETS [RESULTS]   (ASSETS holds models/ and data/tinystories_317.txt)
set -euo pipefail
assets=$(cd "$1" && pwd)
results=$(mkdir -p "${2:-benchmarks/results/first}" && cd "${2:-benchmarks/results/first}" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
# relative names, so that records name models and not this machine's folders
cd "$work"
cp "$assets/data/tinystories_317.txt" .
mkdir records
for model in stories260K babyllama-tok361; do
    cp -r "$assets/models/$model" "$model"
    halve compress "$model" "$model-int8" --step rtn:bits=8
    halve compress "$model" "$model-int4" --step rtn:bits=4,group_size=32,fallback=channel
    for variant in "$model" "$model-int8" "$model-int4"; do
        halve evaluate "$variant" --task perplexity --protocol documents --data tinystories_317.txt \
            --json "records/$variant-perplexity.json"
    done
    halve benchmark "$model" "$model-int8" "$model-int4" --prompt-tokens 128 --new-tokens 64 --long-prompt-tokens 0 \
        --json "records/$model-speed"
done
cp -r records/. "$results"
