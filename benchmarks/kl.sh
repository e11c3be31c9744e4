#!/usr/bin/env bash
# What a KL divergence means: models by round-to-nearest and pruning against their dense ones, on text and on an exam.
# Usage: benchmarks/kl.sh ASSETS [RESULTS]   (ASSETS holds models/ and data/; about 15 minutes on two cores; records that
# are there already stay)
set -euo pipefail
assets=$(cd "$1" && pwd)
results=$(mkdir -p "${2:-benchmarks/results/kl}" && cd "${2:-benchmarks/results/kl}" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
# relative names, so that records name models and not this machine's folders
cd "$work"
cp "$assets/data/tinystories_317.txt" "$assets/data/story_cloze_615.jsonl" .
ask() { # MODEL BASE
    [ -e "$results/$1-text.json" ] ||
        halve evaluate "$1" --base "$2" --task perplexity --protocol documents --data tinystories_317.txt \
            --json "$results/$1-text.json"
    [ -e "$results/$1-cloze.json" ] ||
        halve evaluate "$1" --base "$2" --task multiple-choice --protocol pmi --template plain \
            --data story_cloze_615.jsonl --json "$results/$1-cloze.json"
}
for model in stories260K babyllama-tok361; do
    cp -r "$assets/models/$model" "$model"
    for recipe in rtn:bits=8 rtn:bits=4 rtn:bits=3 rtn:bits=2; do
        out="$model-int${recipe##*=}"
        halve compress "$model" "$out" --step "$recipe,group_size=32,fallback=channel"
        ask "$out" "$model"
    done
    for fraction in 0.05 0.2; do
        out="$model-mlp$fraction"
        halve compress "$model" "$out" --step "prune-mlp:fraction=$fraction,multiple_of=4" --calibration tinystories_317.txt --samples 32
        ask "$out" "$model"
    done
    # how far below the exact one KL from the most probable tokens alone lies
    for count in 8 32 128; do
        halve evaluate "$model-int4" --base "$model" --save-base "$model.base" --base-tokens "$count" --task perplexity \
            --protocol documents --data tinystories_317.txt --json "$results/$model-kept$count.json"
    done
done
