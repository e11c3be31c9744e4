"""Models exported as GGUF and run by llama.cpp: how far its logits are from ours, and what its arithmetic adds.

    python benchmarks/gguf_logits.py FOLDER... --text TEXT --peer-python PEER/bin/python --out RECORD.json

Each folder is exported as it is (dense ones also with `--dtype` fp16), and once more as the very numbers that its file
holds, in float32: llama.cpp rounds activations to 8 bits in blocks where weights are quantized, and what that adds is the
difference between the two rows. Ours are the logits of the folder in float32, of the same tokens: the first `--tokens` of
the text. The ids that llama.cpp makes of the text are compared with the tokenizer's.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from halve import convert, export, load_model, load_tokenizer
from halve.checkpoint.export import Exported
from halve.checkpoint.reader import open_checkpoint
from halve.measure.records import new_record, write_record

PEER = Path(__file__).resolve().parent / "peers" / "llama_cpp_logits.py"


def files_of(folder: Path, work: Path) -> Iterator[tuple[str, Exported]]:
    """The files to be judged, each with what it is."""
    yield "as it is", export(folder, work / "own.gguf", to="gguf")
    if not open_checkpoint(folder).schemes:
        yield "in F16", export(folder, work / "half.gguf", to="gguf", dtype=torch.float16)
        return
    dense = convert(work / "own.gguf", work / "numbers", dtype=torch.float32)
    yield "the same numbers in F32", export(dense, work / "numbers.gguf", to="gguf")


def run_peer(python: str, request: dict[str, Any], work: Path) -> tuple[dict[str, Any], Tensor]:
    path, out = work / "request.json", work / "logits.npy"
    path.write_text(json.dumps(request | {"out": str(out)}))
    done = subprocess.run([python, str(PEER), str(path)], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"llama.cpp failed on {request['file']}:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1]), torch.from_numpy(np.load(out))


@torch.inference_mode()
def differences(theirs: Tensor, ours: Tensor) -> dict[str, float]:
    """Logits [tokens, vocabulary] against ours: KL in nats, the same top token, relative norm of the difference."""
    divergences, distances, norms = [], [], []
    for one, other in zip(ours.split(32), theirs.split(32), strict=True):
        log_p, log_q = one.double().log_softmax(-1), other.double().log_softmax(-1)
        divergences.append((log_p.exp() * (log_p - log_q)).sum(-1))
        distances.append((other - one).double().norm())
        norms.append(one.double().norm())
    return {
        "kl_nats": float(torch.cat(divergences).mean()),
        "same_top_share": float((theirs.argmax(-1) == ours.argmax(-1)).double().mean()),
        "relative_difference": float(torch.stack(distances).norm() / torch.stack(norms).norm()),
    }


def run_folder(folder: Path, text: str, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    tokenizer, limit = load_tokenizer(folder), open_checkpoint(folder).config.max_positions
    ids = tokenizer.encode(text, bos=True)
    tokens = ids[: min(args.tokens, limit)]
    with torch.inference_mode():
        ours = load_model(folder, dtype=torch.float32)(torch.tensor([tokens]))[0].float()
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        for what, made in files_of(folder, work):
            request = {
                "file": str(made.path),
                "text": text,
                "tokens": tokens,
                "threads": args.threads,
            }
            said, theirs = run_peer(args.peer_python, request, work)
            row = {
                "folder": folder.name,
                "file": what,
                "types": ", ".join(f"{count} {kind}" for kind, count in made.types.items()),
                "rounding": made.rounding,
                "file_bytes": made.nbytes,
                "tokens": len(tokens),
                "text_tokens": len(ids),
                "same_tokens": said["tokens"] == ids,
                **differences(theirs, ours),
                "program_version": said["version"],
                "program_build": said["build"],
            }
            print(json.dumps(row), flush=True)
            yield row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--characters", type=int, default=20_000, help="of the text, its beginning")
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--peer-python", required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    text = args.text.read_text(encoding="utf-8")[: args.characters].replace("<|endoftext|>", "").strip()
    rows = [row for folder in args.folders for row in run_folder(folder, text, args)]
    names = " ".join(folder.name for folder in args.folders)
    command = f"gguf_logits.py {names} --text {args.text.name} --tokens {args.tokens} --threads {args.threads}"
    versions = {"program": "llama.cpp", **{key: rows[0].pop(key) for key in ("program_version", "program_build")}}
    for row in rows[1:]:
        del row["program_version"], row["program_build"]
    record = new_record("gguf-logits", names, command=command, recipe=[], text=args.text.name, **versions, results=rows)
    write_record(args.out, record)


if __name__ == "__main__":
    main()
