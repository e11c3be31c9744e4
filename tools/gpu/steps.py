"""The steps of benchmarks/gpu.sh. Each writes records into a folder and leaves out what is there already.

    python -m tools.gpu.steps STEP --out FOLDER [--device cuda] [--shape llama-3.2-3b]

`--device cpu --shape tiny` tries a step where there is no GPU: its records are marked as such and mean nothing.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import shutil
import tarfile
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from halve.kernels import triton_backend
from halve.measure.records import new_record, write_record
from halve.measure.speed.timed_model import BenchmarkOptions, Placement
from tools.gpu.models import SHAPES, Row, measure_row, step_error
from tools.gpu.peers import WAYS, measure_peer
from tools.gpu.products import bandwidths, find_tilings, measure_products, product_errors
from tools.ptx.cpu import serve_cpu

ROWS_3B = [
    Row("3b-bf16", "llama-3.2-3b"),
    Row("3b-int8", "llama-3.2-3b", bits=8, head_bits=8),
    Row("3b-int4-head8", "llama-3.2-3b", bits=4, group_size=128, head_bits=8),
    Row("3b-bf16-inputs-10", "llama-3.2-3b", kept_inputs=0.9, baseline="3b-bf16"),
    Row("3b-bf16-mlp-20", "llama-3.2-3b", mlp_share=0.8, baseline="3b-bf16"),
    Row("3b-int8-inputs-35", "llama-3.2-3b", bits=8, head_bits=8, kept_inputs=0.65, head_kept=0.65, baseline="3b-int8"),
    Row(
        "3b-int4-head8-inputs-10", "llama-3.2-3b", bits=4, group_size=128, head_bits=8, kept_inputs=0.9, head_kept=0.9,
        baseline="3b-int4-head8",
    ),
    Row("3b-int4-head8-mlp-20", "llama-3.2-3b", bits=4, group_size=128, head_bits=8, mlp_share=0.8, baseline="3b-int4-head8"),
]  # fmt: skip
ROWS_8B = [
    Row("8b-bf16", "llama-3.1-8b"),
    Row("8b-int8", "llama-3.1-8b", bits=8, head_bits=8),
    Row("8b-int4-head8", "llama-3.1-8b", bits=4, group_size=128, head_bits=8),
    Row("8b-bf16-depth-6", "llama-3.1-8b", dropped=6, baseline="8b-bf16"),
    Row("8b-int8-depth-6", "llama-3.1-8b", bits=8, head_bits=8, dropped=6, baseline="8b-int8"),
]
CONTEXTS = (2048, 16384)
ROWS_CONTEXT = [ROWS_3B[0], ROWS_3B[2], ROWS_8B[0]]


class Run:
    """Where records go and how they are measured."""

    def __init__(self, out: Path, device: str, shape: str | None, quick: bool) -> None:
        self.out, self.device, self.shape, self.quick = out, device, shape, quick
        backend = "triton" if device == "cpu" and triton_backend.runs_on(torch.device(device)) else "auto"
        self.placement = Placement(device, torch.bfloat16, backend, random_weights=True)
        out.mkdir(parents=True, exist_ok=True)

    def command(self, step: str) -> str:
        shape = f" --shape {self.shape}" if self.shape else ""
        return f"gpu.py {step} --device {self.device}{shape}"

    def missing(self, name: str) -> Path | None:
        """The record's place, None when it is there."""
        path = self.out / f"{name}.json"
        print(f"{name}: {'measured before' if path.exists() else 'measuring'}", flush=True)
        return None if path.exists() else path

    def settings(self, prompt_tokens: int = 128) -> BenchmarkOptions:
        if self.quick:
            return BenchmarkOptions(min(prompt_tokens, 32), 4, 1, 0)
        return BenchmarkOptions(prompt_tokens, 64, 5, 0)

    def rows(self, rows: list[Row], step: str, prompt_tokens: int = 128) -> None:
        for row in rows:
            suffix = "" if prompt_tokens == 128 else f"-context-{prompt_tokens}"
            path = self.missing(row.name + suffix)
            if path is None:
                continue
            made = replace(row, shape=self.shape) if self.shape else row
            record = measure_row(made, self.settings(prompt_tokens), self.placement, self.command(step))
            write_record(path, record)
            self.show(record)
            gc.collect()
            if self.device != "cpu":
                torch.cuda.empty_cache()

    def show(self, record: dict[str, Any]) -> None:
        keys = (
            "model",
            "decode_tokens_per_s",
            "decode_ms_median",
            "floor_share",
            "ttft_ms",
            "peak_memory_bytes",
            "decode_kernel",
        )
        print(json.dumps({key: record.get(key) for key in keys}), flush=True)


def tune(run: Run) -> None:
    """Tile sizes for every product of the shapes, into tilings.json, which the other steps use."""
    path = run.out / "tilings.json"
    tuned: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"tilings": {}, "microseconds": {}}
    for shape in [run.shape] if run.shape else ["llama-3.2-3b", "llama-3.1-8b"]:
        known = set(tuned["tilings"])
        for key, best, best_us, rule_us in find_tilings(shape, run.device, known, 1 if run.quick else None):
            tuned["tilings"][key] = list(asdict(best).values())
            tuned["microseconds"][key] = {"best": best_us, "rule": rule_us}
            path.write_text(json.dumps(tuned, indent=2) + "\n")
            print(f"{key}: {best} {best_us:.1f} us, by the rule {rule_us:.1f} us", flush=True)


def kernels(run: Run) -> None:
    """Products of the 3B shape for 1, 4 and 16 rows of x, beside torch's."""
    path = run.missing("kernels")
    if path is None:
        return
    counts = (1,) if run.device == "cpu" else (1, 4, 16)
    before, results = bandwidths(run.device), []
    for found in measure_products(run.shape or "llama-3.2-3b", counts, run.device):
        results.append(found)
        print(json.dumps(found), flush=True)
    best = {k: max(v, before[k]) for k, v in bandwidths(run.device).items()}
    for found in results:
        found["share"] = found["gb_per_s"] / max(best.values())
    body = {"device": run.device, "bandwidth_gb_per_s": best, "results": results, "pdl": triton_backend.pdl()}
    write_record(path, new_record("gpu-kernels", "random weights", command=run.command("kernels"), recipe=[], **body))


def peers(run: Run) -> None:
    """Hugging Face eager and static + compile at the 3B shape."""
    for way in WAYS:
        path = run.missing(f"3b-{way}")
        if path is None:
            continue
        steps, runs = (16, 3) if run.quick else (64, 5)
        shape = run.shape or "llama-3.2-3b"
        record = measure_peer(way, shape, run.settings().prompt_tokens, steps, runs, run.device, run.command("peers"))
        write_record(path, record)
        run.show(record)


def gptq(run: Run) -> None:
    """4-bit GPTQ of 1 and of 2 layers of the 8B shape on 128 x 2,048 tokens; the rest is extrapolated and says so."""
    path = run.missing("gptq-8b-2-layers")
    if path is None:
        return
    from benchmarks.gptq_speed import write_tokenizer_and_text
    from halve import compress
    from halve.checkpoint.reader import open_checkpoint

    samples, window = (2, 16) if run.quick else (128, 2048)
    shape = SHAPES / (run.shape or "llama-3.1-8b")
    group, vocabulary = 128, 8192  # embedding and head are not quantized here: small ones are sooner written and read
    total = len(open_checkpoint(shape, random_weights=True).config.layers)
    seconds, peak = [], []
    with tempfile.TemporaryDirectory() as name:
        for number, layers in enumerate((1, 1, 2)):  # the first run loads libraries and is not counted
            folder, out = Path(name) / "model", Path(name) / "out"
            _write_folder(shape, folder, layers, vocabulary)
            write_tokenizer_and_text(folder, vocabulary, (samples * 9 // 8 + 2) * window)
            if run.device != "cpu":
                torch.cuda.reset_peak_memory_stats()
            start = time.perf_counter()
            compress(
                folder, out, [f"gptq:bits=4,group_size={group}"], calibration=folder / "text.txt",
                samples=samples if number else 2, window=window, device=run.device,
            )  # fmt: skip
            if number:
                seconds.append(time.perf_counter() - start)
                peak.append(None if run.device == "cpu" else torch.cuda.max_memory_allocated())
                print(f"{layers} layers: {seconds[-1]:.1f} s", flush=True)
            shutil.rmtree(folder)
            shutil.rmtree(out)
    body = {
        "device": run.device,
        "samples": samples,
        "window": window,
        "vocabulary": vocabulary,
        "seconds_1_layer": seconds[0],
        "seconds_2_layers": seconds[1],
        "seconds_per_layer": seconds[1] - seconds[0],
        "layers_of_the_model": total,
        "extrapolated_seconds_whole_model": seconds[0] + (total - 1) * (seconds[1] - seconds[0]),
        "extrapolation": "1 layer measured + the other layers at (2 layers - 1 layer); not a measurement of the whole model",
        "peak_memory_bytes": peak[1],
    }
    recipe = [f"gptq:bits=4,group_size={group}"]
    write_record(path, new_record("gptq-speed", shape.name, command=run.command("gptq"), recipe=recipe, **body))


def _write_folder(shape: Path, folder: Path, layers: int, vocabulary: int) -> None:
    """A folder of the shape with so many layers, tokens and random bfloat16 weights."""
    from safetensors.torch import save_file

    from halve.checkpoint.reader import open_checkpoint

    folder.mkdir()
    config = json.loads((shape / "config.json").read_text())
    config |= {"num_hidden_layers": layers, "vocab_size": vocabulary}
    (folder / "config.json").write_text(json.dumps(config))
    tensors = open_checkpoint(folder, random_weights=True, dtype=torch.bfloat16).tensors
    save_file({name: tensors.get(name) for name in tensors.shapes}, str(folder / "model.safetensors"))


def pack(run: Run) -> None:
    """All records in one file."""
    path, records = run.out.with_suffix(".tar.gz"), sorted(run.out.rglob("*.json"))
    with tarfile.open(path, "w:gz") as archive:
        for record in records:
            archive.add(record, str(record.relative_to(run.out)))
    print(f"{path}: {len(records)} records")


def check(run: Run) -> None:
    """Fail where a pruned row's peak memory is not below that of the row it was made from."""
    wrong = []
    for path in sorted(run.out.glob("*.json")):
        record = json.loads(path.read_text())
        baseline = run.out / f"{record.get('baseline')}.json"
        if record.get("baseline") and baseline.exists() and record.get("peak_memory_bytes"):
            before = json.loads(baseline.read_text())["peak_memory_bytes"]
            print(f"{record['model']}: {record['peak_memory_bytes'] / 1e9:.2f} GB of {before / 1e9:.2f} GB")
            if record["peak_memory_bytes"] >= before:
                wrong.append(record["model"])
    if wrong:
        raise SystemExit(f"pruned, but peak memory did not go down: {', '.join(wrong)}")


def verify(run: Run) -> None:
    """Needs no pytest: fused products against float64, and a fused step against the forward of torch's own products."""
    worst = 0.0
    with torch.inference_mode():
        for name, error in product_errors(run.device):
            print(f"{name}: relative error {error:.1e}", flush=True)
            worst = max(worst, error)
        for row in (*ROWS_3B, ROWS_8B[3]):
            # half of the inputs: of so few, a tenth is none
            kept = {key: 0.5 for key in ("kept_inputs", "head_kept") if getattr(row, key) < 1}
            tiny = replace(row, shape="tiny", **kept)
            error, how = step_error(tiny, run.placement)
            if run.device != "cpu" and not how.startswith("fused kernels"):
                raise SystemExit(f"{row.name}: decode steps ran {how}")
            print(f"{row.name} at a tiny shape, {how}: logits differ by {error:.1e}", flush=True)
            worst = max(worst, error)
    # several roundings to bfloat16 (2^-8 each) through a few layers
    if not worst < 0.05:
        raise SystemExit(f"a relative error of {worst:.2g}: the kernels are wrong here, figures would mean nothing")
    path = run.out / "verify.json"
    body = {"device": run.device, "largest_relative_error": worst}
    write_record(path, new_record("gpu-verify", "tiny", command=run.command("verify"), recipe=[], **body))


def contexts(run: Run) -> None:
    for tokens in CONTEXTS:
        run.rows(ROWS_CONTEXT, "contexts", tokens)


STEPS = {
    "verify": verify,
    "tune": tune,
    "kernels": kernels,
    "3b": lambda run: run.rows(ROWS_3B[:3], "3b"),
    "3b-pruned": lambda run: run.rows(ROWS_3B[3:], "3b-pruned"),
    "peers": peers,
    "8b": lambda run: run.rows(ROWS_8B, "8b"),
    "contexts": contexts,
    "gptq": gptq,
    "check": check,
    "pack": pack,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("step", choices=STEPS)
    parser.add_argument("--out", type=Path, required=True, help="folder of the records")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--shape", choices=sorted(p.name for p in SHAPES.iterdir()), help="instead of the steps' own")
    arguments = parser.parse_args()
    quick = arguments.device == "cpu"
    if not quick and not torch.cuda.is_available():
        parser.error(
            f"PyTorch finds no {arguments.device} here: --device cpu (HALVE_GPU_DEVICE=cpu for gpu.sh) tries a step"
        )
    if quick and os.environ.get("TRITON_INTERPRET") == "1":
        serve_cpu()
    elif quick and os.environ.get("HALVE_GPU_EMULATE") == "1":
        from tools.ptx.emulate import emulate

        serve_cpu()
        emulate()
    STEPS[arguments.step](Run(arguments.out, arguments.device, arguments.shape, quick))


if __name__ == "__main__":
    main()
