"""How far each method goes within a limit: the first system's table in its wider form, bytes at 95 %, and by KL.

    python benchmarks/search.py stories260K --model MODEL --exam story_cloze_615.jsonl --text tinystories_317.txt
    python benchmarks/search.py reader

One search a row (see SEARCHES), each an ordinary `halve search` whose search.json becomes
benchmarks/results/search/NAME-ROW.json; rows that are there already are left alone, an interrupted one goes on. --only
ROW ... runs some rows. The first --calibration-documents documents of the text calibrate, and questions about them are
left out of the exam, half of which is searched on and half confirms; searches on a text take its other documents in the
same way. docs/search.md shows the tables.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch

from halve import search
from halve.checkpoint.reader import DTYPES, open_checkpoint
from halve.compression.windows import CalibrationOptions
from halve.demo.run import READER
from halve.errors import HalveError
from halve.measure.quality.options import EvaluationOptions
from halve.measure.quality.race import read_questions
from halve.measure.quality.splits import shared_articles
from halve.studies.search.options import Floor, SearchOptions
from halve.texts import read_documents

RESULTS = Path(__file__).parent / "results" / "search"
HALF_RIGHT = Floor(0.5)
DOCUMENTS = 64  # of a text, to search on


@dataclass(frozen=True)
class Material:
    """A model, its exam and its calibration text, and a group size that divides its inputs."""

    group_size: int
    lower_bound: bool  # its interval is narrow enough for the lower end to clear 95 % of the dense accuracy
    limit: int  # questions of searches for an absolute floor


MATERIALS = {
    "stories260K": Material(64, False, 120),
    "reader": Material(128, True, 120),
}


@dataclass(frozen=True)
class Row:
    """One search: recipe, what varies, and how."""

    steps: tuple[str, ...]
    vary: tuple[str, ...]
    floor: Floor = HALF_RIGHT
    dtype: torch.dtype | None = None
    resolution: float | None = None
    trials: int | None = None


def rows(group_size: int, lower_bound: bool, layers: int) -> dict[str, Row]:
    """Every search by its name; those of the first system prune after quantizing, as it did."""
    found = {}
    for kind in ("dense", "8bit", "4bit"):
        quantize = [] if kind == "dense" else [f"gptq:bits={kind[0]},group_size={group_size},fallback=channel"]
        for side in ("inputs", "outputs"):
            found[f"{kind}-{side}"] = Row((*quantize, f"l1-{side}"), (f"l1-{side}.fraction=0..0.5",))
            head = f"l1-{side}:targets=lm_head"
            found[f"{kind}-{side}-head"] = Row((*quantize, head), (f"l1-{side}.fraction=0..0.9",))
        found[f"{kind}-prune-mlp"] = Row(("prune-mlp:multiple_of=4", *quantize), ("prune-mlp.fraction=0..0.9",))
        drop = "drop-attention:count=1,select=influence"
        found[f"{kind}-drop-attention"] = Row((drop, *quantize), (f"drop-attention.count=1..{layers - 1}",))
    # both sides in bfloat16, so that the type alone saves nothing; on all questions of the search part
    floor, bf16 = Floor(0.95, True, lower_bound), DTYPES["bf16"]
    gptq = f"gptq:group_size={group_size},fallback=channel"
    for side in ("inputs", "outputs"):
        found[f"95-l1-{side}"] = Row((f"l1-{side}",), (f"l1-{side}.fraction=0..0.2",), floor, bf16, 0.005)
    found["95-gptq"] = Row((gptq,), ("gptq.bits=2|3|4|8",), floor, bf16)
    both = ("prune-mlp.fraction=0..0.4", "gptq.bits=2|3|4|8")
    found["95-prune-gptq"] = Row(("prune-mlp:multiple_of=4", gptq), both, floor, bf16, 0.05, 16)
    # on a text: what KL to the dense model allows, and the least of it in so many bytes
    tenth = Floor(0.1, figure="kl")
    found["kl-0.1-gptq"] = Row((gptq,), ("gptq.bits=2|3|4|8",), tenth, bf16)
    found["kl-0.1-prune-mlp"] = Row(("prune-mlp:multiple_of=4",), both[:1], tenth, bf16)
    third = Floor(0.3, True, figure="bytes")
    found["bytes-30-prune-gptq"] = Row(("prune-mlp:multiple_of=4", gptq), both, third, bf16, 0.05, 12)
    return found


def texts(folder: Path, exam: Path, text: Path, documents: int) -> tuple[Path, Path]:
    """Calibration text and exam that share nothing, written into `folder`."""
    calibration, questions = folder / "calibration.txt", folder / exam.name
    chosen = read_documents(text)[:documents]
    calibration.write_text("<|endoftext|>".join(chosen), encoding="utf-8")
    shared = {question.article for question in shared_articles(read_questions(exam), chosen)}
    lines = [
        line for line in exam.read_text(encoding="utf-8").splitlines() if json.loads(line)["article"] not in shared
    ]
    questions.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return calibration, questions


def main() -> None:
    """The program."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("subject", choices=sorted(MATERIALS))
    parser.add_argument("--model", type=Path, default=READER)
    parser.add_argument("--exam", type=Path, default=READER / "exam_cloze.jsonl")
    parser.add_argument("--text", type=Path, default=READER / "calibration.txt")
    parser.add_argument("--calibration-documents", type=int, default=64)
    parser.add_argument("--only", nargs="+", help="names of the rows to run")
    parser.add_argument("--work", type=Path, default=Path("search-work"), help="folder of the searches while they run")
    asked = parser.parse_args()
    material = MATERIALS[asked.subject]
    searches = rows(material.group_size, material.lower_bound, len(open_checkpoint(asked.model).config.layers))
    RESULTS.mkdir(parents=True, exist_ok=True)
    work = asked.work / asked.subject
    work.mkdir(parents=True, exist_ok=True)
    if not (work / asked.subject).exists():
        shutil.copytree(asked.model, work / asked.subject)  # records name the model, not where it lies here
    calibration, exam = texts(work, asked.exam, asked.text, asked.calibration_documents)
    for name in asked.only or searches:
        target = RESULTS / f"{asked.subject}-{name}.json"
        if target.exists():
            continue
        row = searches[name]
        try:
            on_text = row.floor.figure != "accuracy"
            search(
                work / asked.subject, work / name, row.steps, row.vary, floor=row.floor,
                evaluation=EvaluationOptions("perplexity", asked.text, "documents", limit=DOCUMENTS)
                if on_text
                else EvaluationOptions("multiple-choice", exam, "pmi", "plain",
                                       None if row.floor.relative else material.limit),
                calibration=CalibrationOptions(str(calibration), samples=64, window=512),
                options=SearchOptions(resolution=row.resolution, trials=row.trials, leave_out_shared=on_text,
                                      command=f"python benchmarks/search.py {asked.subject} --only {name}"),
                dtype=row.dtype,
            )  # fmt: skip
        except HalveError as error:
            print(f"{name}: {error}", flush=True)
        found = work / name / "search.json"
        if found.exists():
            shutil.copyfile(found, target)
            if len(row.vary) > 1:
                shutil.copyfile(work / name / "pareto.png", target.with_suffix(".png"))
            winner = json.loads(found.read_text())["winner"] or {}
            shown = {
                key: winner.get(key) for key in ("values", "accuracy", "kl_nats_per_token", "bytes_share", "confirmed")
            }
            print(f"{name}: {json.dumps(shown)}", flush=True)


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
