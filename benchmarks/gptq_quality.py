"""Held-out loss after 4-bit GPTQ: this project's, round-to-nearest and, with --peer-python, llm-compressor's.

    python benchmarks/gptq_quality.py --models FOLDER... --text STORIES.txt --out RECORD.json --peer-python PEER/bin/python

Documents are split once: the first `--train` of them are calibration text, the last `--held-out` are judged. Every draw
(seed) takes other windows of the calibration text; both tools get the very same windows. Both results are saved, loaded
back from disk by the same code and judged on whole documents (BOS + document, cut at the context): mean nats a token.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from halve import compress, load_model, load_tokenizer
from halve.checkpoint.reader import open_checkpoint
from halve.compression.windows import CalibrationOptions, make_windows
from halve.measure.records import new_record, write_record
from halve.model.decoder import Model
from halve.texts import read_documents

PEER = Path(__file__).resolve().parent / "peers" / "llm_compressor.py"
BATCH = 16  # documents judged at once


def batches(folder: Path, documents: list[str]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Right-padded token ids [B, T] and which of them are predicted, bool [B, T-1]; of near-equal length."""
    tokenizer, limit = load_tokenizer(folder), open_checkpoint(folder).config.max_positions
    rows = sorted((tokenizer.encode(text, bos=True)[:limit] for text in documents), key=len)
    for first in range(0, len(rows), BATCH):
        part = rows[first : first + BATCH]
        longest = len(part[-1])
        lengths = torch.tensor([len(row) for row in part])
        yield (
            torch.tensor([row + [0] * (longest - len(row)) for row in part]),
            torch.arange(1, longest).unsqueeze(0) < lengths.unsqueeze(1),
        )


@torch.inference_mode()
def held_out_loss(model: Model, data: list[tuple[torch.Tensor, torch.Tensor]]) -> float:
    """Mean nats per predicted token."""
    nats, count = 0.0, 0
    for tokens, real in data:
        logits = model(tokens)[:, :-1].float().log_softmax(-1)
        taken = logits.gather(-1, tokens[:, 1:, None])[..., 0]
        nats -= float(taken[real].sum(dtype=torch.float64))
        count += int(real.sum())
    return nats / count


def run_peer(python: str, request: dict[str, Any], work: Path) -> dict[str, Any]:
    """llm-compressor on the same windows; returns what its process printed."""
    path = work / "request.json"
    path.write_text(json.dumps(request))
    done = subprocess.run([python, str(PEER), str(path)], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"llm-compressor failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def peer_groups(folder: Path, group_size: int) -> dict[str, list[str]]:
    """Group size (or -1 where it does not divide) -> names of the linears, the head left out."""
    groups: dict[str, list[str]] = {}
    for shape in open_checkpoint(folder).linear_shapes():
        if shape.layer is not None:
            size = group_size if shape.in_features % group_size == 0 else -1
            groups.setdefault(str(size), []).append(shape.name)
    return groups


def run_model(folder: Path, args: argparse.Namespace, documents: list[str], peer_versions: dict[str, str]) -> Any:
    train, judged = documents[: args.train], documents[-args.held_out :]
    data = list(batches(folder, judged))
    step = f"gptq:bits={args.bits},group_size={args.group_size},fallback=channel,{args.options}".rstrip(",")
    plain = f"rtn:bits={args.bits},group_size={args.group_size},fallback=channel"
    losses: dict[str, list[float]] = {"halve": [], "rtn": [], "llm-compressor": []}
    config = open_checkpoint(folder).config
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        text = work / "train.txt"
        text.write_text("<|endoftext|>".join(train), encoding="utf-8")
        compress(folder, work / "rtn", [plain])
        losses["rtn"].append(held_out_loss(load_model(work / "rtn"), data))
        for seed in range(args.draws):
            ours, theirs = work / f"ours-{seed}", work / f"theirs-{seed}"
            compress(folder, ours, [step], calibration=text, samples=args.samples, window=args.window, seed=seed)
            losses["halve"].append(held_out_loss(load_model(ours), data))
            if args.peer_python:
                tokenizer = load_tokenizer(folder)
                asked = CalibrationOptions(text.name, args.samples, min(args.window, config.max_positions), seed)
                drawn = make_windows(read_documents(text), tokenizer, asked, config.vocab_size)
                save_file({"input_ids": drawn.windows}, str(work / "windows.safetensors"))
                request = {
                    "model": str(folder),
                    "out": str(theirs),
                    "windows": str(work / "windows.safetensors"),
                    "bits": args.bits,
                    "groups": peer_groups(folder, args.group_size),
                    "damping": 0.01,
                    "threads": torch.get_num_threads(),
                }
                peer_versions |= run_peer(args.peer_python, request, work)["versions"]
                losses["llm-compressor"].append(held_out_loss(load_model(theirs), data))
            print(folder.name, seed, {k: round(v[-1], 5) for k, v in losses.items() if v}, flush=True)
        windows = json.loads((work / "ours-0" / "halve.json").read_text())["calibration"]
    row = {
        "model": folder.name,
        "dense_loss_nats": held_out_loss(load_model(folder), data),
        "loss_nats": {k: v for k, v in losses.items() if v},
        "mean_loss_nats": {k: statistics.fmean(v) for k, v in losses.items() if v},
        "predicted_tokens": sum(int(real.sum()) for _, real in data),
        "step": step,
        "calibration": {k: windows[k] for k in ("windows", "window_tokens", "tokens", "documents_available")},
    }
    if args.peer_python:
        means = row["mean_loss_nats"]
        row["halve_over_llm_compressor"] = means["halve"] / means["llm-compressor"]
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, nargs="+", required=True)
    parser.add_argument("--text", type=Path, required=True, help="documents separated by <|endoftext|>")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--peer-python", help="the Python of an environment with llm-compressor")
    parser.add_argument("--draws", type=int, default=5)
    parser.add_argument("--samples", type=int, default=48)
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--train", type=int, default=217)
    parser.add_argument("--held-out", type=int, default=100)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=32)
    parser.add_argument("--options", default="", help="further options of the gptq step, key=value,...")
    args = parser.parse_args()
    documents = read_documents(args.text)
    if args.train + args.held_out > len(documents):
        raise SystemExit(f"--train {args.train} and --held-out {args.held_out} overlap: {len(documents)} documents")
    versions: dict[str, str] = {}
    rows = [run_model(folder, args, documents, versions) for folder in args.models]
    configuration = {
        "symmetric": True,
        "actorder": "static",
        "dampening_frac": 0.01,
        "observer": "memoryless_minmax (its default)",
        "group_size": args.group_size,
        "channel_where": "the group size does not divide",
        "batch_size": 1,
    }
    peer: dict[str, Any] = {"versions": versions, "configuration": configuration}
    record = new_record(
        "gptq-quality",
        ", ".join(folder.name for folder in args.models),
        command=f"gptq_quality.py --models {' '.join(m.name for m in args.models)} --text {args.text.name} "
        f"--draws {args.draws} --samples {args.samples} --window {args.window} --train {args.train} "
        f"--held-out {args.held_out} --bits {args.bits} --group-size {args.group_size} --options '{args.options}'",
        recipe=[rows[0]["step"]],
        text={"file": args.text.name, "calibration": f"first {args.train}", "held_out": f"last {args.held_out}"},
        results=rows,
        peer=peer if args.peer_python else None,
    )
    write_record(args.out, record)


if __name__ == "__main__":
    main()
