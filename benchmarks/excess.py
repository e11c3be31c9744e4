"""What recipes cost beyond the dense model: excess loss and KL divergence on held-out text, over several calibration draws.

    python benchmarks/excess.py --models FOLDER... --text STORIES.txt --recipes "STEP ..." ... --out RECORD.json

The first recipe is what the others are measured against. Documents are split once: the first `--train` of them are
calibration text, the last `--held-out` are judged, whole documents (BOS + document, cut at the context). With --judge FILE
all of --text is for calibration, and that text is judged in `--judge-windows` windows of `--window` tokens, BOS first.
Every draw (seed) takes other windows of the calibration text. With --work, folders are kept there and used again.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from gptq_quality import batches

from halve import compress, load_model, load_tokenizer
from halve.measure.records import new_record, write_record
from halve.model.decoder import Model
from halve.texts import read_documents

Batch = tuple[torch.Tensor, torch.Tensor]  # token ids [B, T] and which of them are predicted, bool [B, T-1]


def text_windows(folder: Path, text: Path, count: int, window: int) -> Iterator[Batch]:
    """The first windows of a text, each begun as the tokenizer begins one."""
    tokenizer = load_tokenizer(folder)
    begin = list(tokenizer.bos_ids)
    tokens = tokenizer.encode(text.read_text(encoding="utf-8"), bos=False)
    body = window - len(begin)
    for first in islice(range(0, len(tokens) - body + 1, body), count):
        yield torch.tensor([begin + tokens[first : first + body]]), torch.ones(1, window - 1, dtype=torch.bool)


@torch.inference_mode()
def excess(dense: Model, model: Model, data: list[Batch]) -> dict[str, float]:
    """Mean over predicted tokens of the loss beyond the dense model's, of KL(dense, model), and the share of tokens that
    both hold likeliest."""
    nats = divergence = same = count = 0.0
    for tokens, real in data:
        p, q = (m(tokens)[:, :-1].float().log_softmax(-1) for m in (dense, model))
        taken = tokens[:, 1:, None]
        nats += float((p - q).gather(-1, taken)[..., 0][real].sum(dtype=torch.float64))
        same += float((p.argmax(-1) == q.argmax(-1))[real].sum())
        divergence += float((p.exp() * (p - q)).sum(-1)[real].sum(dtype=torch.float64))
        count += int(real.sum())
    return {"excess_nats": nats / count, "kl_nats": divergence / count, "same_top_share": same / count}


def run_recipe(folder: Path, recipe: str, args: argparse.Namespace, text: Path, data: list[Batch], work: Path) -> Any:
    dense, draws, seconds = load_model(folder), [], []
    for seed in range(args.draws):
        out = work / "-".join((folder.name, *"".join(c if c.isalnum() else " " for c in recipe).split(), str(seed)))
        started = time.monotonic()
        if not out.exists():
            compress(folder, out, recipe.split(), calibration=text, samples=args.samples, window=args.window, seed=seed)
            seconds.append(time.monotonic() - started)
        draws.append(excess(dense, load_model(out), data))
        if args.work is None:
            shutil.rmtree(out)
    keys = ("excess_nats", "kl_nats", "same_top_share")
    means = {key: statistics.fmean(draw[key] for draw in draws) for key in keys}
    spread = {
        f"{key}_deviation": statistics.stdev(d[key] for d in draws) if len(draws) > 1 else None for key in keys[:2]
    }
    return {"model": folder.name, "step": recipe, **means, **spread, "seconds": seconds, "draws": draws}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, nargs="+", required=True)
    parser.add_argument(
        "--text", type=Path, required=True, help="documents: a .txt with <|endoftext|> between, or .jsonl"
    )
    parser.add_argument("--recipes", nargs="+", required=True, help="each of one or more steps with spaces between")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--work", type=Path)
    parser.add_argument("--draws", type=int, default=5)
    parser.add_argument("--samples", type=int, default=48)
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--train", type=int, default=217)
    parser.add_argument("--held-out", type=int, default=100)
    parser.add_argument("--judge", type=Path)
    parser.add_argument("--judge-windows", type=int, default=20)
    args = parser.parse_args()
    documents, rows = read_documents(args.text), []
    if args.judge is None and args.train + args.held_out > len(documents):
        raise SystemExit(f"--train {args.train} and --held-out {args.held_out} overlap: {len(documents)} documents")
    with tempfile.TemporaryDirectory() as name:
        work, text = args.work or Path(name), args.text
        if args.judge is None:
            text = Path(name) / "train.txt"
            text.write_text("<|endoftext|>".join(documents[: args.train]), encoding="utf-8")
        for folder in args.models:
            if args.judge is None:
                data = list(batches(folder, documents[-args.held_out :]))
            else:
                data = list(text_windows(folder, args.judge, args.judge_windows, args.window))
            first: Any = None
            for recipe in args.recipes:
                row = run_recipe(folder, recipe, args, text, data, work)
                first = first or row
                row |= {f"{key}_ratio": row[key] / first[key] for key in ("excess_nats", "kl_nats")}
                rows.append(row)
                print(folder.name, recipe, {k: round(v, 4) for k, v in row.items() if isinstance(v, float)}, flush=True)
    judged = (
        f"last {args.held_out} documents"
        if args.judge is None
        else f"{args.judge_windows} windows of {args.judge.name}"
    )
    record = new_record(
        "recipe-excess",
        ", ".join(folder.name for folder in args.models),
        command=f"excess.py --models {' '.join(m.name for m in args.models)} --text {args.text.name} --draws {args.draws} "
        f"--samples {args.samples} --window {args.window} --recipes ...",
        recipe=args.recipes,
        text={"file": args.text.name, "judged": judged},
        calibration={"samples": args.samples, "window": args.window, "draws": args.draws},
        results=rows,
    )
    write_record(args.out, record)


if __name__ == "__main__":
    main()
