"""The smallest (or fastest) model whose accuracy, or KL to the dense one, keeps a limit; or the best one within some bytes.

START HERE: `search` checks the request (options.py, vary.py, asked.py), measures the dense model, then lets a worker
(worker.py) claim points from a study that any number of workers share (study.py), by bisection (bisection.py) or Optuna's
sampler, measure each (trial.py), and confirms the winner on what no trial has seen (outcome.py). figures.py: what is judged.
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import cache
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
from halve.measure.records import Record
from halve.studies.search import outcome
from halve.studies.search.asked import check_overlaps, exam_of, quality_of
from halve.studies.search.figures import FIGURES
from halve.studies.search.options import TEXT_TASK, Floor, SearchOptions, objective_of
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
    floor: str | float | Floor | None = None,
    max_kl: float | None = None,
    min_same_top: str | float | None = None,
    max_bytes: str | int | None = None,
    floor_lower_bound: bool = False,
    evaluation: EvaluationOptions = EvaluationOptions("race-h"),  # noqa: B008 - frozen
    calibration: CalibrationOptions = CalibrationOptions(),  # noqa: B008
    options: SearchOptions = SearchOptions(),  # noqa: B008
    device: str = "cpu",
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
    on_trial: Callable[[dict[str, Any]], None] | None = None,
) -> Record:
    """Find the values of the `vary` options of a recipe that leave least of an objective and keep one limit.

    vary: "STEP.key=LOW..HIGH" or "STEP.key=A|B", STEP a step's name or its position. One: bisection, exact to the
    resolution, and points beyond the border in case the quality comes back; several: points chosen by Optuna's
    multi-objective TPE. The limit: floor, an accuracy (0.5) or a share of the dense model's ("95%"); max_kl, nats a token
    from the dense model; min_same_top, the share of positions with its top token; or max_bytes ("20MB", or a share of the
    dense model's), within which the best is found. floor_lower_bound: the worse end of the 95 % interval has to clear it.
    evaluation: what models are asked, questions or (task "perplexity") a text on which they are compared with the dense
    one; trials answer the search part of its data (all of it with `options.held_out_data`), of which its limit takes the
    first questions, windows or documents, and the winner is confirmed on the rest. Without data, race-h searches on the
    validation questions and confirms on the test.

    Writes to the folder `out`: search.json (the record returned; docs/search.md has its keys), trials/*.json, winner/ and
    its records, the study (unless `options.storage` names another SQL database) and pareto.png. The same call goes on with
    an interrupted search, or helps one that is running. Raises HalveError before any work when the request is wrong, after
    the trials when none clears the floor; search.json then holds what was found.
    """
    asked = Floor.asked(floor, max_kl, min_same_top, max_bytes, floor_lower_bound)
    recipe = as_steps(steps)
    varied = parse_vary(vary, recipe, options.resolution)
    objective = objective_of(options.minimise, asked, quality_of(evaluation, asked))
    if options.trials is not None and len(varied) == 1:
        why = "one option is searched by bisection, which decides; leave it out"
        raise HalveError(f"trials {options.trials}: {why}")
    device = check_device(device)
    checkpoint = open_checkpoint(str(model))
    tokenizer = load_tokenizer(str(model))
    calibrates = any(method.calibrates for method in recipe)
    read = cache(lambda: read_documents(calibration.source) if calibrates else None)  # may take a download: when needed
    exam = exam_of(evaluation, options, asked, read, checkpoint.config, tokenizer)
    reads = {
        "the model's own folder": checkpoint.folder,
        "the calibration text": calibration.source,
        "what models are asked": evaluation.data,
        "the held-out data": options.held_out_data,
    }
    place = StudyFolder(out, FILES, keep=reads, overwrite=overwrite, alone=False)
    name = find_model(str(model)).resolve().name if Path(os.path.expanduser(model)).exists() else str(model)
    timing = _timing(objective, checkpoint.config.max_positions)
    runner = TrialRunner(
        str(model), name, place.out, recipe, varied, exam, calibration, options, objective, device, dtype, timing
    )
    ladder = _ladder(runner, asked) if len(varied) == 1 else None
    corner = None if ladder else _first_corner(runner, asked)
    documents = read()
    check_overlaps(exam, calibration.source, documents)
    identity = _identity(runner, checkpoint, documents, asked)
    with place.claim(identity):
        dense = runner.dense()
        _check_dense(dense, asked, runner)
        study = _shared_study(runner, identity, asked)
        Worker(runner, study, asked, dense, ladder, corner).run(on_trial)
        result = outcome.SearchResult(runner, asked, dense, study.board().done, ladder)
        with runner.alone(runner.out / "finish"):
            return outcome.finish(result)


def _check_dense(dense: dict[str, Any], floor: Floor, runner: TrialRunner) -> None:
    """What the dense model itself does not reach no trial will; that it has more bytes is why one searches."""
    if floor.limited.of_quality and floor.shortfall(dense, dense) > 0:
        count, unit = next((count, unit) for unit, count in runner.exam.search.counts.items())
        raise HalveError(
            f"{floor.text}: the dense model itself reaches {floor.limited.show(floor.reached(dense))} on these {count} {unit}"
            f"{' (worse end of its interval)' if floor.lower_bound else ''}: ask for less"
        )


def _shared_study(runner: TrialRunner, identity: dict[str, Any], floor: Floor):
    """The study that all workers of this very search share."""
    from halve.studies.search.study import Trials, sqlite_url  # Optuna takes a second to import

    key = hash_text(json.dumps(identity, sort_keys=True))[:12]
    url = runner.options.storage or sqlite_url(runner.out / "study.db")
    more_is_better = [figure.more_is_better for figure in (FIGURES[runner.objective], floor.limited)]
    return Trials(url, f"halve-{runner.name}-{key}", runner.varied, runner.options.seed, more_is_better)


def _timing(objective: str, context: int) -> tuple[int, int]:
    """Prompt and new tokens of a benchmark that fit the context."""
    if objective == "ms" and context < 8:
        raise HalveError(f"minimise {objective}: a context of {context} tokens is too short to time anything")
    return min(128, context // 2), min(64, context // 4)


def _ladder(runner: TrialRunner, floor: Floor) -> list[Value]:
    """The values of the one varied option, from the gentlest to the one that leaves fewest bytes; where bytes are the limit
    the other way round, so that the first is the likeliest to clear it and the best that does is the last.

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
    return values if (last < first) is floor.limited.of_quality else values[::-1]


def _first_corner(runner: TrialRunner, floor: Floor) -> Point:
    """Of the corners of several ranges, the one that leaves most bytes, fewest where they are the limit: tried first, as the
    likeliest to clear it.

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
    return (max if floor.limited.of_quality else min)(planned)[1]


def _identity(
    runner: TrialRunner,
    checkpoint: Checkpoint,
    documents: list[str] | None,
    floor: Floor,
) -> dict[str, Any]:
    """What makes a search this one; nothing of the machine, so that workers elsewhere agree."""
    calibration, kind = runner.calibration, "text" if runner.exam.task == TEXT_TASK else "questions"
    return {
        "study": "search",
        "model": {"name": runner.name} | model_identity(checkpoint.folder),
        kind: runner.exam.search.files,
        f"held-out {kind}": runner.exam.final.files,
        "calibration": {} if documents is None else text_identity(calibration.source, documents),
        "steps": [step_json(method) for method in runner.steps],
        "varied": [one.json(runner.steps) for one in runner.varied],
        "floor": asdict(floor),
        "minimise": runner.objective,
        "evaluation": runner.exam.about,
        "division": [runner.options.search_share, runner.options.leave_out_shared],
        "samples": calibration.samples,
        "window": calibration.window,
        "seed": [calibration.seed, runner.options.seed],
        "device": runner.device,
        "dtype": str(runner.dtype),
        "versions": versions(),
    }
