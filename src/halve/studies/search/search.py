"""The smallest (or fastest) model whose accuracy stays above a floor.

START HERE: `search` checks the request (options.py, vary.py, questions.py), measures the dense model, then lets a worker
(worker.py) claim points from a study that any number of workers share (study.py), by bisection (bisection.py) or Optuna's
sampler, measure each (trial.py), and confirms the winner on questions that no trial has seen (outcome.py).
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from halve.checkpoint.identity import model_identity, versions
from halve.checkpoint.reader import Checkpoint, check_device, find_model, open_checkpoint
from halve.checkpoint.tokenizer import load_tokenizer
from halve.compression.methods import Method
from halve.compression.recipe import as_steps, step_json
from halve.compression.windows import CalibrationOptions, text_identity
from halve.errors import HalveError, RecipeError
from halve.files.identity import hash_text
from halve.files.study import StudyFolder
from halve.measure.quality.options import EvaluationOptions
from halve.measure.quality.race import QuestionSet
from halve.measure.quality.tasks import QUESTION_TASKS
from halve.measure.records import Record
from halve.studies.search import outcome
from halve.studies.search.options import Floor, SearchOptions
from halve.studies.search.questions import check_overlaps, search_and_final
from halve.studies.search.trial import TrialRunner
from halve.studies.search.vary import Point, Value, parse_vary
from halve.studies.search.worker import Worker
from halve.texts import read_documents

FILES = "trials/ prefix/ winner/ *.partial*/ study.db* winner-built.txt pareto.png".split()  # beside records


def search(
    model: str | Path,
    out: str | Path,
    steps: Sequence[str | Method],
    vary: Sequence[str],
    *,
    floor: str | float | Floor,
    evaluation: EvaluationOptions = EvaluationOptions("race-h"),  # noqa: B008 - frozen
    calibration: CalibrationOptions = CalibrationOptions(),  # noqa: B008
    options: SearchOptions = SearchOptions(),  # noqa: B008
    device: str = "cpu",
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
    on_trial: Callable[[dict[str, Any]], None] | None = None,
) -> Record:
    """Find the values of the `vary` options of a recipe that leave least of an objective with the accuracy above `floor`.

    vary: "STEP.key=LOW..HIGH" or "STEP.key=A|B", STEP a step's name or its position. One: bisection, exact to the
    resolution, and points beyond the border in case the accuracy comes back; several: points chosen by Optuna's
    multi-objective TPE. floor: an accuracy (0.5), or a share of the dense model's ("95%"). evaluation: what models are
    asked; trials answer the search part of its data (all of it with `options.held_out_data`), of which its limit takes
    the first questions, and the winner is confirmed on the rest. Without data, race-h searches on the validation questions
    and confirms on the test.

    Writes to the folder `out`: search.json (the record returned; docs/search.md has its keys), trials/*.json, winner/ and
    its records, the study (unless `options.storage` names another SQL database) and pareto.png. The same call goes on with
    an interrupted search, or helps one that is running. Raises HalveError before any work when the request is wrong, after
    the trials when none clears the floor; search.json then holds what was found.
    """
    asked = floor if isinstance(floor, Floor) else Floor.parse(floor)
    recipe = as_steps(steps)
    varied = parse_vary(vary, recipe, options.resolution)
    if evaluation.task not in QUESTION_TASKS:
        raise HalveError(f"task {evaluation.task!r}: the floor is an accuracy, use {' or '.join(QUESTION_TASKS)}")
    if options.trials is not None and len(varied) == 1:
        why = "one option is searched by bisection, which decides; leave it out"
        raise HalveError(f"trials {options.trials}: {why}")
    device = check_device(device)
    task = QUESTION_TASKS[evaluation.task]
    questions, final = search_and_final(task, evaluation, options)
    checkpoint = open_checkpoint(str(model))
    load_tokenizer(str(model))
    reads = {
        "the model's own folder": checkpoint.folder,
        "the calibration text": calibration.source,
        "the questions": evaluation.data,
        "the held-out questions": options.held_out_data,
    }
    place = StudyFolder(out, FILES, keep=reads, overwrite=overwrite, alone=False)
    name = find_model(str(model)).resolve().name if Path(os.path.expanduser(model)).exists() else str(model)
    timing = _timing(options.minimise, checkpoint.config.max_positions)
    exam = task.choice_options(evaluation)
    runner = TrialRunner(str(model), name, place.out, recipe, varied, exam, calibration, options, device, dtype, timing)
    ladder = _ladder(runner) if len(varied) == 1 else None
    corner = None if ladder else _gentlest(runner)
    documents = read_documents(calibration.source) if any(method.calibrates for method in recipe) else None
    check_overlaps(questions, final, calibration.source, documents)
    identity = _identity(runner, checkpoint, documents, asked, questions, final)
    with place.claim(identity):
        dense = runner.dense(questions)
        _check_dense(dense, asked, len(questions.questions))
        study = _shared_study(runner, identity)
        Worker(runner, study, questions, asked, dense, ladder, corner).run(on_trial)
        result = outcome.SearchResult(runner, asked, questions, final, dense, study.board().done, ladder)
        with runner.alone(runner.out / "finish"):
            return outcome.finish(result)


def _check_dense(dense: dict[str, Any], floor: Floor, questions: int) -> None:
    if floor.shortfall(dense, dense["accuracy"]) > 0:
        level = dense["accuracy_ci95"][0] if floor.lower_bound else dense["accuracy"]
        raise HalveError(
            f"floor {floor.text}: the dense model itself reaches {level:.1%} on these {questions} questions"
            f"{' (lower end of its interval)' if floor.lower_bound else ''}: lower the floor"
        )


def _shared_study(runner: TrialRunner, identity: dict[str, Any]):
    """The study that all workers of this very search share."""
    from halve.studies.search.study import Trials, sqlite_url  # Optuna takes a second to import

    key = hash_text(json.dumps(identity, sort_keys=True))[:12]
    url = runner.options.storage or sqlite_url(runner.out / "study.db")
    return Trials(url, f"halve-{runner.name}-{key}", runner.varied, runner.options.seed)


def _timing(minimise: str, context: int) -> tuple[int, int]:
    """Prompt and new tokens of a benchmark that fit the context."""
    if minimise == "ms" and context < 8:
        raise HalveError(f"minimise {minimise}: a context of {context} tokens is too short to time anything")
    return min(128, context // 2), min(64, context // 4)


def _ladder(runner: TrialRunner) -> list[Value]:
    """The values of the one varied option, from the gentlest to the one that leaves fewest bytes.

    Values the recipe cannot be applied with (a width that no group size divides, say) are left out. Raises RecipeError
    when that is all of them, or when the option does not change the bytes.
    """
    (varied,) = runner.varied
    planned: list[tuple[Value, int]] = []
    refused: RecipeError | None = None
    for value in varied.values:
        try:
            planned.append((value, runner.planned_bytes((value,))))
        except RecipeError as error:
            refused = refused or error
    if not planned:
        raise RecipeError(f"{varied.name}: none of its {len(varied.values)} values can be applied: {refused}")
    planned.sort(key=lambda pair: pair[0])
    first, last = planned[0][1], planned[-1][1]
    if first == last:
        low, high = planned[0][0], planned[-1][0]
        raise RecipeError(
            f"{varied.name}: the model has {first:,} bytes at {low:g} and at {high:g}: vary what changes its size"
        )
    values = [value for value, _ in planned]
    return values if last < first else values[::-1]


def _gentlest(runner: TrialRunner) -> Point:
    """Of the corners of several ranges, the one that leaves most bytes: the first point tried.

    Raises RecipeError when the recipe can be applied at no corner.
    """
    planned: list[tuple[int, Point]] = []
    refused: RecipeError | None = None
    for point in itertools.product(*((min(one.values), max(one.values)) for one in runner.varied)):
        try:
            planned.append((runner.planned_bytes(point), point))
        except RecipeError as error:
            refused = refused or error
    if not planned:
        raise RecipeError(f"the recipe can be applied at no corner of the ranges: {refused}")
    return max(planned)[1]


def _identity(
    runner: TrialRunner,
    checkpoint: Checkpoint,
    documents: list[str] | None,
    floor: Floor,
    questions: QuestionSet,
    final: QuestionSet,
) -> dict[str, Any]:
    """What makes a search this one; nothing of the machine, so that workers elsewhere agree."""
    calibration = runner.calibration
    return {
        "study": "search",
        "model": {"name": runner.name} | model_identity(checkpoint.folder),
        "questions": questions.files,
        "held-out questions": final.files,
        "calibration": {} if documents is None else text_identity(calibration.source, documents),
        "steps": [step_json(method) for method in runner.steps],
        "varied": [one.json(runner.steps) for one in runner.varied],
        "floor": asdict(floor),
        "minimise": runner.options.minimise,
        "evaluation": runner.exam.json(),
        "division": [runner.options.search_share, runner.options.leave_out_shared],
        "samples": calibration.samples,
        "window": calibration.window,
        "seed": [calibration.seed, runner.options.seed],
        "device": runner.device,
        "dtype": str(runner.dtype),
        "versions": versions(),
    }
