"""`halve demo`: compress the bundled model in several ways, reload, examine and time each, one table and one plot."""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path

import torch

from halve.compression.compress import compress
from halve.files.study import StudyFolder
from halve.measure.kinds import EvaluationRecord
from halve.measure.machine import usable_cores
from halve.measure.pictures import GREY, new_figure, with_interval, write_png
from halve.measure.quality.evaluate import LoadedModel, evaluate_loaded, prepare
from halve.measure.quality.options import EvaluationOptions
from halve.measure.records import Record, find_records, write_record
from halve.measure.speed.benchmark import benchmark_side_by_side
from halve.measure.speed.timed_model import BenchmarkOptions, Placement
from halve.measure.table import Comparison, compare
from halve.measure.units import byte_unit
from halve.progress import progress
from halve.report.page import write_page

COLUMNS = ["model", "weight_bytes", "perplexity", "accuracy 1", "accuracy 2", "peak_memory_bytes", "decode_ms_median"]
READER = Path(__file__).parent / "reader"
SPEED_RECORDS = Path(__file__).parents[3] / "benchmarks" / "results"  # there in a checkout, not in a wheel


@dataclass(frozen=True)
class DemoVariant:
    """One way of compressing the bundled model."""

    name: str
    steps: tuple[str, ...]


INT8, GPTQ_8, GPTQ_4 = "rtn:bits=8", "gptq:bits=8,group_size=128", "gptq:bits=4,group_size=128"
VARIANTS = (
    DemoVariant("int8", (INT8,)),
    DemoVariant("gptq-8bit", (GPTQ_8,)),
    DemoVariant("gptq-4bit", (GPTQ_4,)),
    DemoVariant("4bit-table", (GPTQ_4, "rtn:bits=8,group_size=128,targets=embed_tokens")),
    # quantized, then pruned by L1 norm: every linear, or the head alone
    DemoVariant("8bit-l1-35", (GPTQ_8, "l1-inputs:fraction=0.35")),
    DemoVariant("8bit-head-l1-35", (GPTQ_8, "l1-inputs:fraction=0.35,targets=lm_head")),
    DemoVariant("4bit-l1-10", (GPTQ_4, "l1-inputs:fraction=0.1")),
    DemoVariant("4bit-head-l1-10", (GPTQ_4, "l1-inputs:fraction=0.1,targets=lm_head")),
    DemoVariant("prune-mlp-4bit", ("prune-mlp:fraction=0.33,multiple_of=128", GPTQ_4)),
    DemoVariant("drop-layer-int8", ("drop-layers:count=1", INT8)),
)


@dataclass(frozen=True)
class Exam:
    """One measurement of quality on the bundled data."""

    name: str
    options: EvaluationOptions


EXAMS = (
    Exam("questions", EvaluationOptions("multiple-choice", READER / "exam_questions.jsonl", "pmi")),
    Exam("cloze", EvaluationOptions("multiple-choice", READER / "exam_cloze.jsonl", "pmi", "plain")),
    Exam("perplexity", EvaluationOptions("perplexity", READER / "held_out_stories.txt", "documents")),
)


def demo(out: str | Path = "halve-demo", *, overwrite: bool = False) -> Comparison:
    """Make, examine and time every variant of the bundled model in the folder `out`; returns the table.

    Writes `out`/models/*, `out`/records/*.json, `out`/accuracy-size.png and `out`/report.html. Takes minutes on two cores,
    needs no network.
    """
    place = StudyFolder(
        out, ("models/", "records/", "accuracy-size.png"), keep={"the bundled model": READER}, overwrite=overwrite
    )
    with place.claim({"study": "demo", "variants": [asdict(variant) for variant in VARIANTS]}, resume=False) as folder:
        return _fill(folder)


def _fill(out: Path) -> Comparison:
    records = out / "records"
    records.mkdir()
    (out / "models").mkdir()
    models = [READER, *(out / "models" / variant.name for variant in VARIANTS)]
    # a model this small keeps one core busy at best: as many at a time as there are cores
    workers = ProcessPoolExecutor(min(usable_cores(), len(models)), get_context("spawn"), torch.set_num_threads, (1,))
    with progress("demo", total=2 * len(models)) as advance, workers:
        made = [(variant, folder, records) for variant, folder in zip((None, *VARIANTS), models, strict=True)]
        for done in as_completed([workers.submit(make_and_examine, *arguments) for arguments in made]):
            done.result()
            advance(1)
        options = BenchmarkOptions(prompt_tokens=128, new_tokens=64, runs=5, long_prompt_tokens=0)
        timed = benchmark_side_by_side(models, options, Placement(), command="halve demo")
        for model, record in zip(models, timed, strict=True):
            assert "side_by_side" in record, "several models were timed"
            record["side_by_side"]["models"] = [m.name for m in models]
            write_record(records / f"{model.name}-speed.json", record | {"model": model.name})
            advance(1)
    measured = find_records([records]).records
    table = compare(sorted(measured, key=lambda r: [m.name for m in models].index(r["model"]))).only(COLUMNS)
    plot(measured, out / "accuracy-size.png")
    write_page(out, title="The bundled reader, compressed")
    return table


def make_and_examine(variant: DemoVariant | None, model: Path, records: Path) -> None:
    """Make one variant in the folder `model` (None: it is there), and write its records into the folder `records`."""
    if variant is not None:
        compress(READER, model, variant.steps, calibration=READER / "calibration.txt", samples=64)
    for record, exam in zip(examine(model), EXAMS, strict=True):
        write_record(records / f"{model.name}-{exam.name}.json", record)


def examine(model: Path) -> list[EvaluationRecord]:
    """The records of every exam for one model folder, reloaded from disk.

    Computed in float32: the stored weights are what is examined, and few CPUs are quick in bfloat16.
    """
    loaded = LoadedModel.load(model, dtype=torch.float32, name=model.name)  # not where it lies on this machine
    return [evaluate_loaded(loaded, prepare(exam.options), command="halve demo") for exam in EXAMS]


def plot(records: list[Record], path: Path) -> None:
    """Weight bytes and accuracy with its interval, a line per model, the largest on top. Raises OutputError."""
    nbytes = {r["model"]: r["weight_bytes"] for r in records if r["kind"] == "benchmark"}
    models = sorted(nbytes, key=lambda name: nbytes[name])
    scale, unit = byte_unit(max(nbytes.values()))
    sizes = [nbytes[name] / scale for name in models]
    with new_figure((9, 1.8 + 0.4 * len(models))) as figure:
        left, right = figure.subplots(1, 2, sharey=True, width_ratios=(2, 3))
        bars = left.barh(range(len(models)), sizes, color=GREY, height=0.6)
        left.bar_label(bars, fmt="%.2f", padding=3, fontsize=8)
        left.set(xlabel=f"weights ({unit})", xlim=(0, 1.2 * max(sizes)))
        left.set_yticks(range(len(models)), models)
        left.grid(visible=False)
        for number, (exam, marker) in enumerate((("exam_cloze.jsonl", "s"), ("exam_questions.jsonl", "o"))):
            rows = {r["model"]: r for r in records if r.get("data") == exam}
            places = [y + 0.12 * (1 - 2 * number) for y, name in enumerate(models) if name in rows]
            accuracy, interval = with_interval([rows[name] for name in models if name in rows])
            label = exam.removeprefix("exam_").removesuffix(".jsonl")
            right.errorbar(accuracy, places, xerr=interval, fmt=marker, capsize=3, label=label)
        right.axvline(25, color=GREY, linestyle=":", label="chance")
        right.set(xlabel="accuracy (%), 95 % interval", xlim=(0, 102))
        figure.legend(*right.get_legend_handles_labels(), loc="outside upper right", ncols=3)
        figure.suptitle("The bundled reader: accuracy against size", x=0.01, ha="left")
        write_png(figure, path)


def speed_table() -> Comparison | None:
    """The records of the Llama-3.2-1B shape on CPU, where this checkout has them."""
    paths = sorted(SPEED_RECORDS.glob("cpu/*.json")) if SPEED_RECORDS.is_dir() else []
    return compare(find_records(paths).records) if paths else None
