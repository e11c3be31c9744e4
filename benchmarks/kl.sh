#!/usr/bin/env bash
# What a KL divergence means: models by round-to-nearest and pruning against their dense ones, on text and on an exam.
# Usage: benchmarks/kl.sh ASSETS [RESULTS [DENSE]]
# ASSETS holds models/ and data/; about 15 minutes on two cores. DENSE: a folder of a larger dense model, asked instead of the
# small ones (of 270 M parameters about 5 minutes). Records that are there already stay.
set -euo pipefail
assets=$(cd "$1" && pwd)
results=$(mkdir -p "${2:-benchmarks/results/kl}" && cd "${2:-benchmarks/results/kl}" && pwd)
dense=${3:+$(cd "$3" && pwd)}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
# relative names, so that records name models and not this machine's folders
cd "$work"
ask() { # RECORD MODEL QUESTION...
    [ -e "$results/$1.json" ] || { halve evaluate "$2" "${@:3}" --json "$1.json" && mv "$1.json" "$results"; }
}

if [ -n "$dense" ]; then
    cp "$assets/data/wikitext2_test.raw" "$assets/data/c4_sample_1000.jsonl" .
    model=$(basename "$dense")
    ln -s "$dense" "$model"
    while read -r name recipe; do
        out="$model-$name"
        halve compress "$model" "$out" --step "$recipe" --calibration c4_sample_1000.jsonl --samples 8 --window 512
        ask "$out-wikitext" "$out" --base "$model" --task perplexity --window 256 --limit 8 --data wikitext2_test.raw
        rm -r "$out"
    done <<'RECIPES'
int8-g128 rtn:bits=8,group_size=128
int4-g32 rtn:bits=4,group_size=32
int4-g128 rtn:bits=4,group_size=128
mlp0.02 prune-mlp:fraction=0.02,multiple_of=8
mlp0.05 prune-mlp:fraction=0.05,multiple_of=8
RECIPES
    exit
fi

cp "$assets/data/tinystories_317.txt" "$assets/data/story_cloze_615.jsonl" .
text=(--task perplexity --protocol documents --data tinystories_317.txt)
for model in stories260K babyllama-tok361; do
    cp -r "$assets/models/$model" "$model"
    while read -r name recipe; do
        out="$model-$name"
        halve compress "$model" "$out" --step "$recipe" --calibration tinystories_317.txt --samples 32
        ask "$out-text" "$out" --base "$model" "${text[@]}"
        ask "$out-cloze" "$out" --base "$model" --task multiple-choice --protocol pmi --template plain \
            --data story_cloze_615.jsonl
    done <<'RECIPES'
int8 rtn:bits=8,group_size=32,fallback=channel
int4 rtn:bits=4,group_size=32,fallback=channel
int3 rtn:bits=3,group_size=32,fallback=channel
int2 rtn:bits=2,group_size=32,fallback=channel
mlp0.05 prune-mlp:fraction=0.05,multiple_of=4
mlp0.2 prune-mlp:fraction=0.2,multiple_of=4
RECIPES
    # how far below the exact one KL from the most probable tokens alone lies
    for count in 8 32 128; do
        ask "$model-kept$count" "$model-int4" --base "$model" --save-base "$model.base" --base-tokens "$count" "${text[@]}"
    done
done
