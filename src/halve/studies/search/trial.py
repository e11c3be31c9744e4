"""Measuring one point of a search: compress, reload, examine, time; everything is kept on disk as it is finished."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

from halve.checkpoint.tensors import SafetensorsFolder
from halve.checkpoint.tokenizer import Tokenizer, load_tokenizer
from halve.compression.compress import Request, compress, plan_recipe
from halve.compression.methods import Method
from halve.compression.windows import CalibrationOptions
from halve.measure.kinds import EvaluationRecord
from halve.measure.quality.base_file import BASE_TOKENS
from halve.measure.quality.evaluate import BaseRequest, LoadedModel, evaluate_loaded
from halve.measure.records import AnyRecord, read_record, write_record
from halve.measure.speed.benchmark import benchmark
from halve.studies.search.asked import AskedParts, Part, keys_of
from halve.studies.search.figures import FIGURES
from halve.studies.search.options import SearchOptions
from halve.studies.search.vary import Point, Varied, apply, label

TRIALS, PREFIX = "trials", "prefix"


@dataclass(frozen=True)
class TrialRunner:
    """Makes and measures the models of one search, below the folder `out`."""

    model: str
    name: str  # of the model, in records
    out: Path
    steps: list[Method]
    varied: list[Varied]
    exam: AskedParts
    calibration: CalibrationOptions
    options: SearchOptions
    objective: str  # of FIGURES
    device: str
    dtype: torch.dtype | None
    timing: tuple[int, int]  # prompt and new tokens of a benchmark

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """Every folder of the search holds a copy of the same."""
        return load_tokenizer(self.model)

    @property
    def shared_steps(self) -> int:
        """How many steps come before the first varied one: the same in every trial, run once."""
        return min(one.step for one in self.varied)

    def recipe(self, point: Point) -> list[Method]:
        return apply(self.steps, self.varied, point)

    def planned_bytes(self, point: Point) -> int:
        """Bytes of the result, from shapes alone. Raises RecipeError when the recipe does not fit the model."""
        request = Request(self.model, self.out / "plan", self.recipe(point), self.calibration, dtype=self.dtype)
        return plan_recipe(request).bytes_after

    def measure(self, point: Point) -> dict[str, Any]:
        """Figures of one point, from its records where they are there already."""
        name = label(self.varied, point)
        folder = self.out / TRIALS / name
        with self.alone(folder):
            made = self._made(folder, point)
            records = self._examine(made, folder, f"{self.name} {name}")
            if not self.options.keep_checkpoints:
                shutil.rmtree(folder, ignore_errors=True)
        return self.figures(records)

    def dense(self) -> dict[str, Any]:
        """Figures of the model as it is."""
        place = self.out / TRIALS / "dense"
        with self.alone(place):
            return self.figures(self._examine(lambda: Path(self.model), place, self.name))

    def confirm(self, model: Path | str, path: Path, name: str) -> AnyRecord:
        """The evaluation record at `path` of the final part, made if it is not there or of another model."""
        if path.exists():
            record = read_record(path)
            if record["model"] == name:
                return record
        return self._evaluate(model, path, name, self.exam.final)

    def dense_record(self, part: Part) -> Path:
        """Where the record of the dense model on a part is."""
        return self.out / (f"{TRIALS}/dense.json" if part is self.exam.search else "dense-held-out.json")

    def dense_base(self, part: Part) -> Path:
        """Where the dense model's predictions for a part are kept, so that no trial loads it beside its own."""
        return self.out / TRIALS / f"{self.dense_record(part).stem}.base"

    def _base(self, part: Part, dense: bool) -> BaseRequest:
        """What a model is compared with: the dense one with itself, while its predictions are kept, others with those."""
        if not part.against_dense:
            return BaseRequest(None, None, BASE_TOKENS)
        path = self.dense_base(part)
        if dense:
            return BaseRequest(self.model, path, BASE_TOKENS)
        with self.alone(path):
            if not path.exists():  # removed by the end of the search
                self._evaluate(self.model, self.dense_record(part), self.name, part)
        return BaseRequest(path, None, BASE_TOKENS)

    def _evaluate(self, model: Path | str, path: Path, name: str, part: Part) -> EvaluationRecord:
        request = self._base(part, dense=name == self.name)
        loaded = LoadedModel.load(model, device=self.device, dtype=self.dtype, name=name, tokenizer=self.tokenizer)
        with request.opened(loaded, self.device, self.dtype) as comparison:
            record = evaluate_loaded(
                loaded,
                part.evaluation,
                command=self.options.command,
                progress_file=None if request.save else path.with_suffix(".progress.jsonl"),
                comparison=comparison,
            )
        record["weight_bytes"] = loaded.model.weight_bytes()
        record["disk_bytes"] = SafetensorsFolder(loaded.folder).nbytes
        write_record(path, record)
        return record

    def figures(self, records: dict[str, AnyRecord]) -> dict[str, Any]:
        """What a trial is judged by, from its records (by file name below `out`)."""
        evaluation, *speed = records.values()
        measured = {"bytes": evaluation["disk_bytes"], "memory": evaluation["weight_bytes"]}
        if speed:
            measured["ms"] = speed[0]["decode_ms_median"]
        quality = {key: evaluation[key] for key in keys_of(self.exam.figures)}
        if "accuracy" in quality and quality["accuracy"] is None:  # no question was answered
            quality |= {"accuracy": 0.0, "accuracy_ci95": [0.0, 1.0]}
        objective = (quality | measured)[FIGURES[self.objective].key]
        return {**quality, "objective": objective, **measured, "records": list(records)}

    def alone(self, place: Path) -> AbstractContextManager[Any]:
        """Keeps two workers off one place; the lock goes with its process."""
        place.parent.mkdir(parents=True, exist_ok=True)
        return FileLock(place.with_name(f".{place.name}.lock"))

    def start(self) -> Path | str:
        """The model that trials start from: the steps all of them share are run once, into a folder."""
        if not self.shared_steps:
            return self.model
        folder = self.out / PREFIX
        with self.alone(folder):
            if not folder.exists():
                self._compress(self.model, folder, self.steps[: self.shared_steps])
        return folder

    def build(self, point: Point, folder: Path) -> Path:
        """The checkpoint of a point, as it stands if it is there: folders appear only when complete."""
        if not folder.exists():
            self._compress(self.start(), folder, self.recipe(point)[self.shared_steps :])
        return folder

    def _made(self, folder: Path, point: Point) -> Callable[[], Path]:
        return lambda: self.build(point, folder)

    def _examine(self, made: Callable[[], Path], place: Path, name: str) -> dict[str, AnyRecord]:
        """The records of one model, those on disk read back; the model is made only when one is missing."""
        evaluation, speed = place.with_name(f"{place.name}.json"), place.with_name(f"{place.name}-speed.json")
        timed = self.objective == "ms"
        complete = evaluation.exists() and (speed.exists() or not timed)
        model = place if complete else made()
        if not evaluation.exists():
            self._evaluate(model, evaluation, name, self.exam.search)
        records = {evaluation: read_record(evaluation)}
        if timed and not speed.exists():
            measured = benchmark(
                model,
                device=self.device,
                dtype=self.dtype,
                prompt_tokens=self.timing[0],
                new_tokens=self.timing[1],
                long_prompt_tokens=0,
                seed=self.options.seed,
                command=self.options.command,
            )
            write_record(speed, measured | {"model": name})
        if timed:
            records[speed] = read_record(speed)
        return {str(path.relative_to(self.out)): record for path, record in records.items()}

    def _compress(self, model: Path | str, folder: Path, steps: Sequence[Method]) -> None:
        asked = self.calibration
        compress(
            model,
            folder,
            steps,
            calibration=asked.source,
            samples=asked.samples,
            window=asked.window,
            seed=asked.seed,
            device=self.device,
            dtype=self.dtype,
            overwrite=True,  # of an unfinished run of another request; a finished folder is not made again
        )
