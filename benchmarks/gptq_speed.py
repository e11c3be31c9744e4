"""Time and memory of 4-bit GPTQ on two layers of the Llama-3.2-1B shape, beside llm-compressor in the same run.

    python benchmarks/gptq_speed.py --out RECORD.json --peer-python PEER/bin/python [--profile]

Random weights (the arithmetic does not depend on them), random tokens; the folder is made by this script. Each run is a
process of its own: wall time from after the imports to the saved folder (ours reads its weights in that time, theirs
before it), and that process's peak resident memory. Runs
alternate: ours, theirs, ours, ... The last run of ours is profiled with --profile (not timed).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from halve import compress, load_tokenizer
from halve.compression.windows import CalibrationOptions, make_windows
from halve.measure.machine import ask_for_huge_pages, resident_bytes
from halve.measure.records import new_record, write_record
from halve.texts import read_documents

PEER = Path(__file__).resolve().parent / "peers" / "llm_compressor.py"
ROLES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def make_model(folder: Path, layers: int, hidden: int, mlp: int, vocabulary: int, text_tokens: int) -> None:
    """A float32 Llama folder with random weights, a tokenizer of one word per token, and text.txt of random words."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 256,
        head_dim=64,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    write_tokenizer_and_text(folder, vocabulary, text_tokens)


def write_tokenizer_and_text(folder: Path, vocabulary: int, text_tokens: int) -> None:
    """A tokenizer of one word per token, and text.txt of random words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {f"w{index}": index for index in range(vocabulary)}
    inner = Tokenizer(models.WordLevel(words, unk_token="w0"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="w0").save_pretrained(folder)
    drawn = torch.randint(vocabulary, (text_tokens,)).tolist()
    (folder / "text.txt").write_text(" ".join(f"w{index}" for index in drawn), encoding="utf-8")


def worker(request: dict[str, Any]) -> None:
    """One run of ours in this process; prints a JSON line."""
    torch.set_num_threads(request["threads"])
    ask_for_huge_pages()  # as the command does

    def run() -> None:
        compress(
            request["model"],
            request["out"],
            [request["step"]],
            calibration=Path(request["model"]) / "text.txt",
            samples=request["samples"],
            window=request["window"],
        )

    load_tokenizer(request["model"])  # the peer, too, imports its libraries before its clock starts
    start, processor = time.perf_counter(), time.process_time()
    if request["profile"]:
        print(json.dumps({"profile": profile(run)}))
        return
    run()
    times = {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - processor}
    print(json.dumps({**times, "peak_resident_bytes": resident_bytes()["peak"]}))


def profile(run: Any) -> list[dict[str, Any]]:
    """The functions of this project and the operations of torch that took most, by their own time in seconds."""
    import cProfile
    import pstats

    recorder = cProfile.Profile()
    recorder.runcall(run)
    rows = []
    for (file, line, function), (_, calls, own, cumulative, _) in pstats.Stats(recorder).stats.items():  # type: ignore[attr-defined]
        place = f"{Path(file).name}:{line}" if line else "torch"
        rows.append({"where": f"{place} {function}", "calls": calls, "own_s": own, "cumulative_s": cumulative})
    rows.sort(key=lambda row: -row["own_s"])
    return [{k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()} for row in rows[:25]]


def spawn(command: list[str], threads: int) -> dict[str, Any]:
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(f"{command[0]} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def measure(args: argparse.Namespace, work: Path) -> dict[str, Any]:
    model = work / "model"
    make_model(model, args.layers, args.hidden, args.mlp, args.vocabulary, (args.samples * 9 // 8 + 1) * args.window)
    documents = read_documents(model / "text.txt")
    asked = CalibrationOptions("text.txt", args.samples, args.window)
    drawn = make_windows(documents, load_tokenizer(model), asked, args.vocabulary)
    save_file({"input_ids": drawn.windows}, str(work / "windows.safetensors"))
    step = f"gptq:bits=4,group_size={args.group_size}"
    ours = {"model": str(model), "step": step, "samples": args.samples, "window": args.window, "threads": args.threads}
    names = [
        f"model.layers.{layer}.{'mlp' if role in ROLES[4:] else 'self_attn'}.{role}"
        for layer in range(args.layers)
        for role in ROLES
    ]
    theirs = {
        "model": str(model),
        "windows": str(work / "windows.safetensors"),
        "bits": 4,
        "groups": {str(args.group_size): names},
        "damping": 0.01,
        "threads": args.threads,
    }
    runs: dict[str, list[dict[str, Any]]] = {"halve": [], "llm-compressor": []}
    for number in range(args.runs):
        request = {**ours, "out": str(work / f"ours-{number}"), "profile": False}
        runs["halve"].append(spawn([sys.executable, __file__, "--worker", json.dumps(request)], args.threads))
        print("halve", runs["halve"][-1], flush=True)
        if args.peer_python:
            path = work / "request.json"
            path.write_text(json.dumps({**theirs, "out": str(work / f"theirs-{number}")}))
            runs["llm-compressor"].append(spawn([args.peer_python, str(PEER), str(path)], args.threads))
            print("llm-compressor", runs["llm-compressor"][-1], flush=True)
    figures: dict[str, Any] = {"threads": args.threads, "step": step, "runs": {k: v for k, v in runs.items() if v}}
    figures["median_s"] = {k: statistics.median(r["seconds"] for r in v) for k, v in runs.items() if v}
    figures["median_cpu_s"] = {k: statistics.median(r["cpu_seconds"] for r in v) for k, v in runs.items() if v}
    figures["peak_bytes"] = {k: max(r["peak_resident_bytes"] for r in v) for k, v in runs.items() if v}
    if args.peer_python:
        figures["time_ratio"] = figures["median_s"]["halve"] / figures["median_s"]["llm-compressor"]
        figures["cpu_time_ratio"] = figures["median_cpu_s"]["halve"] / figures["median_cpu_s"]["llm-compressor"]
        figures["memory_ratio"] = figures["peak_bytes"]["halve"] / figures["peak_bytes"]["llm-compressor"]
    if args.profile:
        request = {**ours, "out": str(work / "profiled"), "profile": True}
        figures |= spawn([sys.executable, __file__, "--worker", json.dumps(request)], args.threads)
    return figures


def main() -> None:
    if sys.argv[1:2] == ["--worker"]:
        worker(json.loads(sys.argv[2]))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--peer-python", help="the Python of an environment with llm-compressor")
    parser.add_argument("--profile", action="store_true", help="say where the time of ours goes")
    parser.add_argument("--runs", type=int, default=1)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--mlp", type=int, default=8192)
    parser.add_argument("--vocabulary", type=int, default=128_256)
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--window", type=int, default=512)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        figures = measure(args, Path(name))
    shape = (
        f"{args.layers} layers, hidden {args.hidden}, MLP {args.mlp}, {args.samples} x {args.window} tokens, float32"
    )
    command = f"gptq_speed.py --runs {args.runs} --threads {args.threads}{' --profile' if args.profile else ''}"
    record = new_record("gptq-speed", shape, command=command, recipe=[figures["step"]], **figures)
    write_record(args.out, record)
    print(
        json.dumps(
            {
                k: figures[k]
                for k in ("median_s", "peak_bytes", "time_ratio", "cpu_time_ratio", "memory_ratio")
                if k in figures
            }
        )
    )


if __name__ == "__main__":
    main()
