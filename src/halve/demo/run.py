"""`halve demo`: compress the bundled model in several ways, reload, examine and time each, one table and one plot."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from halve.benchmarking import Placement, Settings, benchmark_side_by_side
from halve.checkpoint import load_model
from halve.comparison import Comparison, compare
from halve.compression import compress
from halve.errors import OutputError
from halve.evaluation import evaluate
from halve.progress import progress
from halve.records import Record, checkpoint_recipe, new_record, read_records, write_record
from halve.tokenizer import load_tokenizer

COLUMNS = ["model", "weight_bytes", "perplexity", "accuracy 1", "accuracy 2", "peak_memory_bytes", "decode_ms_median"]
READER = Path(__file__).parent / "reader"
SPEED_RECORDS = Path(__file__).parents[3] / "benchmarks" / "results"  # there in a checkout, not in a wheel


@dataclass(frozen=True)
class Variant:
    """One way of compressing the bundled model."""

    name: str
    steps: tuple[str, ...]


VARIANTS = (
    Variant("int8", ("rtn:bits=8",)),
    Variant("gptq-8bit", ("gptq:bits=8,group_size=128",)),
    Variant("gptq-4bit", ("gptq:bits=4,group_size=128",)),
)


@dataclass(frozen=True)
class Exam:
    """One measurement of quality on the bundled data."""

    name: str
    options: dict[str, Any]


EXAMS = (
    Exam("questions", {"task": "multiple-choice", "data": READER / "exam_questions.jsonl", "protocol": "pmi"}),
    Exam(
        "cloze",
        {"task": "multiple-choice", "data": READER / "exam_cloze.jsonl", "protocol": "pmi", "template": "plain"},
    ),
    Exam("perplexity", {"task": "perplexity", "data": READER / "held_out_stories.txt", "protocol": "documents"}),
)


def demo(out: str | Path = "halve-demo", *, overwrite: bool = False) -> Comparison:
    """Make, examine and time every variant of the bundled model in the folder `out`; returns the table.

    Writes `out`/models/*, `out`/records/*.json and `out`/accuracy-size.png. Takes minutes on two cores, needs no network.
    """
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        if not overwrite:
            raise OutputError(f"{out}: exists and is not empty: choose another folder, or replace it with --overwrite")
        shutil.rmtree(out)
    records = out / "records"
    records.mkdir(parents=True)
    models = [READER]
    with progress("demo", total=2 + len(VARIANTS) + len(EXAMS) * (1 + len(VARIANTS))) as advance:
        for variant in VARIANTS:
            folder = out / "models" / variant.name
            folder.parent.mkdir(exist_ok=True)
            compress(READER, folder, variant.steps, calibration=READER / "calibration.txt", samples=64)
            models.append(folder)
            advance(1)
        for model in models:
            for record, exam in zip(examine(model), EXAMS, strict=True):
                write_record(records / f"{model.name}-{exam.name}.json", record)
                advance(1)
        settings = Settings(prompt_tokens=128, new_tokens=64, runs=5, long_prompt_tokens=0)
        timed = benchmark_side_by_side(models, settings, Placement(), command="halve demo")
        for model, record in zip(models, timed, strict=True):
            record["side_by_side"]["models"] = [m.name for m in models]
            write_record(records / f"{model.name}-speed.json", record | {"model": model.name})
            advance(1)
    made = read_records([records])
    table = compare(sorted(made, key=lambda r: [m.name for m in models].index(r["model"]))).only(COLUMNS)
    plot(made, out / "accuracy-size.png")
    return table


def examine(model: Path) -> list[Record]:
    """The records of every exam for one model folder, reloaded from disk.

    Computed in float32: the stored weights are what is examined, and few CPUs are quick in bfloat16.
    """
    loaded, tokenizer = load_model(model, dtype=torch.float32), load_tokenizer(model)
    return [
        new_record(
            "evaluation",
            model.name,  # not where it lies on this machine
            command="halve demo",
            recipe=checkpoint_recipe(model),
            dtype="float32",
            **evaluate(loaded, tokenizer, **exam.options),
        )
        for exam in EXAMS
    ]


def plot(records: list[Record], path: Path) -> None:
    """Accuracy with its interval against weight bytes, a point per model."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    size = {r["model"]: r["weight_bytes"] / 1e6 for r in records if r["kind"] == "benchmark"}
    figure, axes = pyplot.subplots(figsize=(7, 4.2), layout="constrained")
    for exam, marker in (("exam_questions.jsonl", "o"), ("exam_cloze.jsonl", "s")):
        rows = sorted((size[r["model"]], r) for r in records if r.get("data") == exam)
        if not rows:
            continue
        accuracy = [100 * r["accuracy"] for _, r in rows]
        low = [100 * (r["accuracy"] - r["accuracy_ci95"][0]) for _, r in rows]
        high = [100 * (r["accuracy_ci95"][1] - r["accuracy"]) for _, r in rows]
        label = exam.removeprefix("exam_").removesuffix(".jsonl")
        axes.errorbar([x for x, _ in rows], accuracy, yerr=[low, high], marker=marker, capsize=3, label=label)
        if exam == "exam_cloze.jsonl":  # the same models lie below
            for n, ((x, r), y) in enumerate(zip(rows, high, strict=True)):
                place = {"textcoords": "offset points", "xytext": (0, 8 + 11 * (n % 3)), "ha": "center", "fontsize": 8}
                axes.annotate(Path(r["model"]).name, (x, accuracy[n] + y), **place)
    axes.axhline(25, color="grey", linestyle=":", label="chance")
    axes.set(
        xlabel="weights (MB)", ylabel="accuracy (%)", title="The bundled reader: accuracy against size", ylim=(0, 100)
    )
    axes.legend(loc="lower right")
    axes.grid(alpha=0.3)
    temporary = path.with_suffix(".tmp.png")
    figure.savefig(temporary, dpi=150)
    pyplot.close(figure)
    temporary.replace(path)


def speed_table() -> Comparison | None:
    """The records of the Llama-3.2-1B shape on CPU, where this checkout has them."""
    paths = sorted(SPEED_RECORDS.glob("cpu/*.json")) if SPEED_RECORDS.is_dir() else []
    return compare(read_records(paths)) if paths else None
