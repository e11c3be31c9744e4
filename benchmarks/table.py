"""What a quantized table of embedding and head costs: KL from the dense model with nothing else changed, by width and group.

    python benchmarks/table.py --models FOLDER... --data STORIES.txt --train 217 --out RECORD.json
    python benchmarks/table.py --models FOLDER --calibration C4.jsonl --data WIKI.raw --window 512 --limit 20 --out RECORD.json

Every result is saved, loaded back from disk and judged. With --train, the first documents of DATA are calibration text and the
others are judged whole; without it DATA is judged in windows. The record is written after every row; rows that it has
already, of the same models and texts, stay.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from halve import compress, evaluate
from halve.checkpoint.reader import open_checkpoint
from halve.checkpoint.tensors import SafetensorsFolder
from halve.compression.plan import state_of
from halve.measure.records import new_record, write_record
from halve.quantization import QuantSpec
from halve.texts import read_documents

WIDTHS = {8: (-1, 128, 32), 4: (-1, 128, 64, 32), 3: (32,)}


def steps_for(folder: Path, widths: dict[int, tuple[int, ...]], methods: list[str]) -> list[str]:
    """The steps whose groups divide the model's rows, and are not the whole of them."""
    checkpoint = open_checkpoint(folder)
    width = checkpoint.table_shape.in_features
    return [
        f"{method}:bits={bits},group_size={group},targets=embed_tokens"
        for bits, groups in widths.items()
        for group in groups
        if group == -1 or (group < width and QuantSpec(bits, group).divides(width))
        for method in methods
    ]


def measure(folder: Path, step: str, args: argparse.Namespace, work: Path) -> dict[str, Any]:
    """One row: bytes of the table and of all, and how far the predictions are from the dense model's."""
    out = compress(
        folder, work / "out", [step], calibration=work / "train.txt" if args.train else args.calibration,
        samples=args.samples, window=args.window or 512, overwrite=True,
    ).out  # fmt: skip
    asked: dict[str, Any] = {"protocol": "documents" if args.train else "windows", "limit": args.limit}
    data = work / "judged.txt" if args.train else args.data
    judged: dict[str, Any] = dict(evaluate(out, task="perplexity", data=data, base=folder, window=args.window, **asked))
    state = state_of(open_checkpoint(out), None)
    dense = state_of(open_checkpoint(folder), None)
    return {
        "model": folder.name if args.name is None else args.name,
        "step": step,
        "dense_table_bytes": dense.table.nbytes(dense.dtype),
        "table_bytes": state.table.nbytes(state.dtype),
        "weight_bytes": SafetensorsFolder(out).nbytes,
        **{
            key: judged[key]
            for key in ("kl_nats_per_token", "same_top_share", "perplexity", "base_perplexity", "tokens")
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, nargs="+", required=True)
    parser.add_argument("--name", help="what to call the model, when its folder has another name")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--train", type=int, help="documents of DATA that are calibration text")
    parser.add_argument("--calibration", default="c4")
    parser.add_argument("--samples", type=int, default=48)
    parser.add_argument("--window", type=int)
    parser.add_argument("--limit", type=int)
    parser.add_argument("--steps", nargs="+", help="these instead of rtn and gptq in every width and group")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    rows = json.loads(args.out.read_text())["results"] if args.out.exists() else []
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        if args.train:
            documents = read_documents(args.data)
            (work / "train.txt").write_text("<|endoftext|>".join(documents[: args.train]), encoding="utf-8")
            (work / "judged.txt").write_text("<|endoftext|>".join(documents[args.train :]), encoding="utf-8")
        for folder in args.models:
            title = folder.name if args.name is None else args.name
            for step in args.steps or steps_for(folder, WIDTHS, ["rtn", "gptq"]):
                if any((row["model"], row["step"]) == (title, step) for row in rows):
                    continue
                rows.append(measure(folder, step, args, work))
                print(rows[-1], flush=True)
                texts = {"data": args.data.name, "calibration": Path(args.calibration).name, "train": args.train}
                record = new_record(
                    "table-quality",
                    ", ".join(dict.fromkeys(row["model"] for row in rows)),
                    command=f"table.py --samples {args.samples} --window {args.window} --limit {args.limit}",
                    recipe=[],
                    text=texts,
                    results=rows,
                )
                write_record(args.out, record)


if __name__ == "__main__":
    main()
