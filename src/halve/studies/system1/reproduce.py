"""START HERE. The first system's two tables, made again: its own way and the right way, beside what it published.

Models first (each quantized once, pruned from there), then every exam, then all speeds side by side, then ever larger
fractions until the accuracy falls below the floor. Every finished part is a folder or a record; a rerun skips it.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from halve.checkpoint.identity import model_identity, versions
from halve.checkpoint.random_model import write_random_model
from halve.checkpoint.reader import Checkpoint, check_device, open_checkpoint
from halve.checkpoint.tokenizer import load_tokenizer
from halve.compression.compress import Request, compress
from halve.compression.plan import state_of
from halve.compression.windows import CalibrationOptions, text_identity
from halve.errors import HalveError
from halve.files import resolve_out
from halve.files.study import StudyFolder
from halve.measure.quality.evaluate import LoadedModel, evaluate_loaded, prepare
from halve.measure.quality.options import EvaluationOptions
from halve.measure.quality.race import HUB_RACE, load_question_set
from halve.measure.records import AnyRecord, Record, new_record, read_record, write_record
from halve.measure.speed.benchmark import benchmark_side_by_side
from halve.measure.speed.timed_model import BenchmarkOptions, Placement
from halve.progress import progress
from halve.studies.system1 import published, variants
from halve.studies.system1.needs import Needs, estimate_needs, memory_there
from halve.studies.system1.protocol import QUESTIONS, System1Timing, protocol_named
from halve.studies.system1.variants import OWN, PROCEDURES, Procedure, Variant
from halve.texts import read_documents

RECORD = "reproduce.json"
FILES = ("models/", "records/")  # beside records
NOT_MEASURED = "the weights are random"


@dataclass(frozen=True)
class Study:
    """What is asked for; another request needs another folder. `data` None: RACE-H's test set from the hub."""

    model: str
    out: Path
    data: str | None = None
    protocol: str = "letter"
    template: str | None = None
    own_protocol: str = "system1"  # of its own way; another one for models that cannot answer in letters
    limit: int | None = None
    calibration: str = "c4"
    samples: int = published.SAMPLES
    floor: float = published.FLOOR
    fractions: bool = True
    runs: int = 5
    random_weights: bool = False
    device: str = "cpu"
    dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        if not 0 < self.floor < 1:
            raise HalveError(f"floor {self.floor:g}: must lie between 0 and 1, it is an accuracy")
        if self.samples < 1:
            raise HalveError(f"samples {self.samples}: must be at least 1")

    @property
    def name(self) -> str:
        """What the model is called, without where it lies on this machine."""
        path = Path(os.path.expanduser(self.model))
        if not path.exists():
            return self.model
        return (path.parent if path.is_file() else path).resolve().name

    def exam(self, procedure: Procedure) -> EvaluationOptions:
        """What a model is asked by one procedure."""
        task = "race-h" if self.data is None else "multiple-choice"
        if procedure is OWN:
            limit = min(self.limit or QUESTIONS, QUESTIONS)
            return EvaluationOptions(task, self.data, protocol_named(self.own_protocol), limit=limit)
        return EvaluationOptions(task, self.data, protocol_named(self.protocol), self.template, self.limit)

    def timing(self) -> BenchmarkOptions:
        """How every model is timed."""
        return BenchmarkOptions(runs=self.runs, long_prompt_tokens=0)

    def request(self) -> Request:
        """The calibration, and what it is for, as `compress` takes it."""
        calibration = CalibrationOptions(self.calibration, self.samples)
        return Request(self.model, self.out, [], calibration, device=self.device)

    def path(self, *parts: str) -> Path:
        return self.out.joinpath(*parts)


def reproduce_system1(
    model: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    on_needs: Callable[[Needs], None] | None = None,
    overwrite: bool = False,
    **options: Any,
) -> Record:
    """Fill the first system's two tables for `model` (folder, hub id, or a config with `random_weights`) in `out`.

    `options` are the fields of `Study`. `on_needs` hears the estimates before any work. Leaves models/, records/ and
    reproduce.json, whose record it returns. An interrupted call is continued by the same call. Raises HalveError
    before any weight is read when memory, disk, data or model cannot do.
    """
    options = {key: str(value) if isinstance(value, Path | torch.device) else value for key, value in options.items()}
    study = Study(os.fspath(model), resolve_out(out), **options)
    checkpoint, needs, texts = check(study)
    if on_needs is not None:
        on_needs(needs)
    needs.check(study.out, study.device)
    reads = {
        "the model's own folder": checkpoint.folder,
        "the calibration text": study.calibration,
        "the questions": study.data,
    }
    place = StudyFolder(study.out, FILES, keep=reads, overwrite=overwrite)
    with place.claim(_identity(study, checkpoint, texts)):
        record = _Run(study, checkpoint, needs).run()
        write_record(study.path(RECORD), record)
    return record


def check(study: Study) -> tuple[Checkpoint, Needs, dict[str, Any]]:
    """Open the model and the data, and estimate what the study takes; reads no weight. Last, the identity of the data."""
    check_device(study.device)
    checkpoint = open_checkpoint(study.model, study.random_weights)
    timing = study.timing()
    context = checkpoint.config.max_positions
    needed = timing.prompt_tokens + max(timing.new_tokens, System1Timing.new_tokens)
    if context < needed:
        raise HalveError(f"{study.name}: a context of {context} is too short, the timings take {needed} tokens")
    questions, texts = [], {}
    if not study.random_weights:
        for procedure in PROCEDURES:
            prepare(study.exam(procedure))
        data = load_question_set(study.data, HUB_RACE)
        questions = data.questions[: study.limit]
        load_tokenizer(study.model)
        documents = read_documents(study.calibration)
        texts = {"questions": data.files, "calibration": text_identity(study.calibration, documents)}
    needs = estimate_needs(study.request(), checkpoint, questions, study.fractions, study.random_weights)
    return checkpoint, needs, texts


def _identity(study: Study, checkpoint: Checkpoint, texts: dict[str, Any]) -> dict[str, Any]:
    """What makes a study this one."""
    model = {"name": study.name} | model_identity(checkpoint.folder, weights=not study.random_weights)
    # a folder may move, the next two decide only how far the work goes, and what is read counts wherever it lies
    left_out = ("out", "floor", "fractions", "model", "data", "calibration")
    options = {key: value for key, value in asdict(study).items() if key not in left_out}
    read = {"study": "system1", "model": model, "questions": {}, "calibration": {}} | texts
    return read | options | {"dtype": str(study.dtype), "versions": versions()}


@dataclass
class _Run:
    """The parts of one study, each skipped when its folder or record is there."""

    study: Study
    checkpoint: Checkpoint
    needs: Needs
    notes: list[str] = field(default_factory=list)

    def run(self) -> Record:
        study = self.study
        for part in ("models", "records"):
            study.path(part).mkdir(exist_ok=True)
        models = variants.kept()
        examined = [] if study.random_weights else list(PROCEDURES)
        cells = len(published.FRACTIONS) * len(PROCEDURES) if examined and study.fractions else 0
        with progress("reproduce", len(models) + len(examined) * len(published.MODELS) + 1 + cells) as advance:
            for variant in models:
                self.build(variant)
                advance(1)
            for row in published.MODELS:
                for procedure in examined:
                    self.examine(variants.of_row(row, procedure), procedure)
                    advance(1)
            speeds = self.time(models)
            advance(1)
            rows = [self.row(row, speeds) for row in published.MODELS]
            fractions = []
            for cell in published.FRACTIONS if cells else ():
                largest = {procedure.key: self.largest(cell, procedure) for procedure in PROCEDURES}
                fractions.append(asdict(cell) | largest)
                advance(len(PROCEDURES))
        return self.record(rows, fractions, speeds)

    def build(self, variant: Variant) -> Path:
        """The folder of a model, made unless it is there."""
        study = self.study
        if variant == Variant(None):
            return (
                write_random_model(self.checkpoint, study.path("models", variant.name))
                if study.random_weights
                else (self.checkpoint.folder)
            )
        folder = study.path("models", variant.name)
        if (folder / "halve.json").exists():
            return folder
        if variant.fraction:
            compress(self.build(variant.base), folder, variant.pruner(), device=study.device)
        else:
            asked = {"calibration": study.calibration, "samples": study.samples, "device": study.device}
            compress(self.build(Variant(None)), folder, variant.quantizer(study.random_weights), **asked)
        return folder

    def examine(self, variant: Variant, procedure: Procedure) -> AnyRecord:
        """The record of one exam of one model, reloaded from its folder."""
        study, path = self.study, self.study.path("records", f"{variant.name}-{procedure.key}.json")
        if path.exists():
            return read_record(path)
        folder = self.build(variant)
        evaluation = prepare(study.exam(procedure))
        loaded = LoadedModel.load(folder, device=study.device, dtype=study.dtype, name=variant.name)
        record = evaluate_loaded(loaded, evaluation, progress_file=path.with_suffix(".progress.jsonl"))
        write_record(path, record)
        if variant not in variants.kept():
            shutil.rmtree(folder)
        return record

    def time(self, models: list[Variant]) -> dict[Variant, Record]:
        """Speed and memory of every model, side by side where all of them fit into memory."""
        study = self.study
        paths = {variant: study.path("records", f"{variant.name}-speed.json") for variant in models}
        together = self.needs.together_bytes <= memory_there(study.device)
        if not together:
            self.notes.append("speeds were measured one model after another: memory does not hold all of them at once")
        for group in [models] if together else [[variant] for variant in models]:
            if all(paths[variant].exists() for variant in group):
                continue
            folders = [self.build(variant) for variant in group]
            placement = Placement(study.device, study.dtype)
            timed = benchmark_side_by_side(folders, study.timing(), placement, extra=System1Timing(), command="")
            for variant, record in zip(group, timed, strict=True):
                if "side_by_side" in record:
                    record["side_by_side"]["models"] = [v.name for v in group]
                record["model"] = variant.name
                record["command"] = new_record("benchmark", "")["command"]
                if study.random_weights:
                    record["random_weights"] = True
                    record["not_measured"] |= {"accuracy": NOT_MEASURED, "perplexity": NOT_MEASURED}
                write_record(paths[variant], record)
        return {variant: read_record(path) for variant, path in paths.items()}

    def row(self, row: published.PublishedModel, speeds: dict[Variant, Record]) -> dict[str, Any]:
        """One row of the first table: published, its own way, the right way."""
        figures_of: dict[str, Any] = {"bits": row.bits, "pruned": row.pruned, "published": asdict(row)}
        for procedure in PROCEDURES:
            variant = variants.of_row(row, procedure)
            speed = speeds[variant]
            system1 = speed.get("system1") or {}
            own = procedure is OWN
            figures = {
                "model": variant.name,
                "latency_ms": system1.get("latency_ms") if own else speed["ttft_ms"],
                "tokens_per_s": system1.get("tokens_per_s") if own else speed["decode_tokens_per_s"],
                "peak_memory_bytes": speed["peak_memory_bytes"],
                "weight_bytes": speed["weight_bytes"],
                "floor_share": speed["floor_share"],
            }
            figures_of[procedure.key] = figures | (
                {} if self.study.random_weights else self.accuracy(variant, procedure)
            )
        return figures_of

    def accuracy(self, variant: Variant, procedure: Procedure) -> dict[str, Any]:
        record = self.examine(variant, procedure)
        keys = ("accuracy", "accuracy_ci95", "correct", "answered", "questions", "overflow", "cut")
        return {key: record.get(key) for key in keys}

    def largest(self, cell: published.PublishedFraction, procedure: Procedure) -> dict[str, Any]:
        """The largest fraction tried with the accuracy above the floor; each larger one until the first that fails."""
        start = variants.of_cell(cell, procedure)
        tried = [{"fraction": 0.0} | self.accuracy(start.base, procedure)]
        base = open_checkpoint(self.build(start.base))
        state = state_of(base, base.dtype)
        for fraction in variants.FRACTIONS:
            if not self.passes(tried[-1]):
                break
            variant = start.with_fraction(fraction)
            plan = variant.pruner()[0].plan(state)
            after = plan.after.linears
            kept = [(s.kept_in, s.kept_out) == (after[k].kept_in, after[k].kept_out) for k, s in state.linears.items()]
            if not all(kept):  # of few channels a small fraction is none
                tried.append({"fraction": fraction} | self.accuracy(variant, procedure))
        passed = [point["fraction"] for point in tried if self.passes(point)]
        return {"largest": max(passed, default=None), "tried": tried}

    def passes(self, point: dict[str, Any]) -> bool:
        return point["accuracy"] is not None and point["accuracy"] > self.study.floor

    def record(self, rows: list[dict[str, Any]], fractions: list[Any], speeds: dict[Variant, Record]) -> Record:
        study, speed = self.study, next(iter(speeds.values()))
        missing = {"accuracy": NOT_MEASURED} if study.random_weights else {}
        if not fractions:
            missing["fractions"] = NOT_MEASURED if study.random_weights else "not asked for"
        asked_of = [] if study.random_weights else PROCEDURES
        exams = {procedure.key: study.exam(procedure).json() for procedure in asked_of}
        asked = ("floor", "samples", "runs", "random_weights", "device")
        return new_record(
            "reproduction",
            study.name,
            recipe=[],
            study="system1",
            **{key: getattr(study, key) for key in asked},
            calibration=Path(study.calibration).name,
            exams=exams,
            needs=asdict(self.needs),
            device_name=speed["device_name"],
            dtype=speed["dtype"],
            published={"model": published.MODEL, "machine": published.MACHINE, "questions": published.QUESTIONS},
            **variants.settings_json(),
            models=rows,
            fractions=fractions,
            notes=self.notes,
            not_measured=missing,
        )
