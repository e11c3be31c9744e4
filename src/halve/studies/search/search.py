"""The smallest (or fastest) model whose accuracy stays above a floor.

START HERE: `search` checks the request (vary.py, evaluation/splits.py), measures the dense model, then claims points from
a study that any number of workers share (study.py), by bisection (bisection.py) or Optuna's sampler, measures each
(trial.py), and confirms the winner on questions that no trial has seen (outcome.py).
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from filelock import FileLock

from halve._version import __version__
from halve.checkpoint.reader import check_device, find_model, open_checkpoint
from halve.compression.methods import Method
from halve.compression.recipe import as_steps, step_json
from halve.errors import DataError, HalveError, OutputError, RecipeError
from halve.files import write_json
from halve.measure.quality import multiple_choice
from halve.measure.quality.evaluate import PROTOCOLS
from halve.measure.quality.race import HUB_RACE, QuestionSet, load_question_set
from halve.measure.quality.splits import divide, shared_articles, without_shared
from halve.measure.records import Record
from halve.progress import progress
from halve.studies.search import outcome
from halve.studies.search.bisection import next_index
from halve.studies.search.trial import OBJECTIVES, Bench, Calibrating
from halve.studies.search.vary import Point, Value, parse_vary
from halve.texts import read_documents

if TYPE_CHECKING:
    from halve.studies.search.study import Board, Claim, Trials

HUB_SEARCH = (HUB_RACE[0], HUB_RACE[1], "validation")
TRIALS_OF_SEVERAL = 40
TASKS = ("race-h", "multiple-choice")


@dataclass(frozen=True)
class Floor:
    """The accuracy asked for: a share of all questions, or of what the dense model answers."""

    value: float
    relative: bool
    lower_bound: bool  # the lower end of the 95 % interval has to clear it

    @classmethod
    def parse(cls, text: str | float, lower_bound: bool) -> Floor:
        match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(%?)", str(text).strip())
        value = float(match[1]) / (100 if match[2] else 1) if match else -1.0
        if not 0 < value <= 1:
            raise HalveError(
                f"floor {text!r}: give an accuracy above 0 and up to 1 (0.5), or a share of the dense model's (95%)"
            )
        return cls(value, bool(match and match[2]), lower_bound)

    def accuracy(self, dense: float) -> float:
        return self.value * dense if self.relative else self.value

    def shortfall(self, figures: dict[str, Any], dense: float) -> float:
        """How far figures stay below the floor; 0 or less when they clear it."""
        held = figures["accuracy_ci95"][0] if self.lower_bound else figures["accuracy"]
        return self.accuracy(dense) - held


def search(
    model: str | Path,
    out: str | Path,
    steps: Sequence[str | Method],
    vary: Sequence[str],
    *,
    floor: str | float,
    minimise: str = "bytes",
    task: str = "race-h",
    data: str | Path | None = None,
    held_out_data: str | Path | None = None,
    search_share: float = 0.5,
    leave_out_shared: bool = False,
    protocol: str | None = None,
    template: str | None = None,
    limit: int | None = None,
    floor_lower_bound: bool = False,
    resolution: float | None = None,
    trials: int | None = None,
    storage: str | None = None,
    keep_checkpoints: bool = False,
    calibration: str | Path = "c4",
    samples: int = 128,
    window: int = 2048,
    seed: int = 0,
    device: str = "cpu",
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
    command: str | None = None,
    on_trial: Callable[[dict[str, Any]], None] | None = None,
) -> Record:
    """Find the values of the `vary` options of a recipe that leave least of `minimise` with the accuracy above `floor`.

    vary: "STEP.key=LOW..HIGH" or "STEP.key=A|B", STEP a step's name or its position. One: bisection, exact to `resolution`
    (0.01; whole numbers are exact), and points beyond the border in case the accuracy comes back; several: `trials` points
    (40) chosen by Optuna's multi-objective TPE. floor: an accuracy (0.5), or a share of the dense model's ("95%").
    minimise: bytes, decode_ms or peak_memory. Trials answer the search part of `data` (`search_share` of it, divided by
    article, or all of it with `held_out_data`); the winner is confirmed on the rest. Without `data`, race-h searches on
    the validation questions and confirms on the test. Search questions whose article is in the final test are an error, or
    left out with `leave_out_shared`, which RACE-H's own two sets need. limit: the first questions of the search part.

    Writes to the folder `out`: search.json (the record returned; docs/search.md has its keys), trials/*.json, winner/ and
    its records, the study (unless `storage` names another SQL database) and pareto.png. The same call goes on with an
    interrupted search, or helps one that is running. Raises HalveError before any work when the request is wrong, after
    the trials when none clears the floor; search.json then holds what was found.
    """
    asked = Floor.parse(floor, floor_lower_bound)
    recipe = as_steps(steps)
    varied = parse_vary(vary, recipe, resolution)
    _check_options(minimise, task, protocol, trials, len(varied), search_share, held_out_data)
    check_device(device)
    how = multiple_choice.settings(task, protocol, template, limit, None, seed)
    questions, final = _questions(task, data, held_out_data, search_share, leave_out_shared)
    calibrating = Calibrating(str(calibration), samples, window, seed, device, dtype)
    checkpoint = open_checkpoint(str(model))
    local = Path(model).expanduser().exists()
    name = find_model(str(model)).resolve().name if local else str(model)
    timing = _timing(minimise, checkpoint.config.max_positions)
    bench = Bench(
        str(model), name, Path(out), recipe, varied, minimise, how, calibrating, keep_checkpoints,
        command, timing,
    )  # fmt: skip
    ladder = _ladder(bench) if len(varied) == 1 else None
    corner = None if ladder else _gentlest(bench)
    _check_overlaps(questions, final, calibrating, recipe)
    identity = _identity(bench, asked, questions, final, checkpoint.raw)
    _prepare(bench.out, identity, overwrite)

    dense = bench.dense(questions)
    if asked.shortfall(dense, dense["accuracy"]) > 0:
        level = dense["accuracy_ci95"][0] if asked.lower_bound else dense["accuracy"]
        raise HalveError(
            f"floor {floor}: the dense model itself reaches {level:.1%} on these {len(questions.questions)} questions"
            f"{' (lower end of its interval)' if asked.lower_bound else ''}: lower the floor"
        )
    from halve.studies.search.study import Trials, sqlite_url  # Optuna takes a second to import

    key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:12]
    study = Trials(storage or sqlite_url(bench.out / "study.db"), f"halve-{name}-{key}", varied, seed)
    job = Job(bench, study, questions, asked, dense, ladder, corner, trials or TRIALS_OF_SEVERAL)
    _work(job, on_trial)
    found = outcome.Found(bench, asked, questions, final, dense, study.board().done, ladder)
    with bench.alone(bench.out / "finish"):
        return outcome.finish(found)


def _check_options(
    minimise: str,
    task: str,
    protocol: str | None,
    trials: int | None,
    varied: int,
    search_share: float,
    held_out: str | Path | None,
) -> None:
    if minimise not in OBJECTIVES:
        raise HalveError(f"minimise {minimise!r}: unknown, use {', '.join(OBJECTIVES)}")
    if task not in TASKS:
        raise HalveError(f"task {task!r}: the floor is an accuracy, use {' or '.join(TASKS)}")
    if protocol is not None and protocol not in PROTOCOLS[task]:
        raise HalveError(f"protocol {protocol!r}: unknown for task {task}; choose one of {', '.join(PROTOCOLS[task])}")
    if trials is not None and (trials < 1 or varied == 1):
        why = "must be at least 1" if trials < 1 else "one option is searched by bisection, which decides; leave it out"
        raise HalveError(f"trials {trials}: {why}")
    if not 0 < search_share < 1 or (held_out is not None and search_share != 0.5):
        raise HalveError(f"search_share {search_share}: must be between 0 and 1, and has no use with held-out data")


def _questions(
    task: str, data: str | Path | None, held_out: str | Path | None, share: float, leave_out_shared: bool
) -> tuple[QuestionSet, QuestionSet]:
    """The questions of the trials and those of the final test."""
    race = task == "race-h"
    if data is None and not race:
        load_question_set(None, None)  # says what is missing
    questions = load_question_set(data, HUB_SEARCH if race else None)
    if held_out is None and data is not None:
        return divide(questions, share)
    final = load_question_set(held_out, HUB_RACE if race else None)
    return without_shared(questions, final) if leave_out_shared or data is None else questions, final


def _check_overlaps(questions: QuestionSet, final: QuestionSet, calibrating: Calibrating, steps: list[Method]) -> None:
    """Nothing of the final test may have been searched or calibrated on, nothing of the search calibrated on."""
    pairs = [(final, [q.article for q in {q.article: q for q in questions.questions}.values()], questions.name)]
    if any(method.calibrates for method in steps):
        documents = read_documents(calibrating.calibration)
        pairs += [(s, documents, f"calibration text {Path(calibrating.calibration).name}") for s in (final, questions)]
    for data, texts, source in pairs:
        shared = shared_articles(data, texts)
        if shared:
            articles = len({q.article for q in data.questions})
            raise DataError(
                f"{data.name}: {len(shared)} of its {articles} articles are in {source} as well (the first is "
                f"{shared[0].article_id}): the figures would be too good; take them out of one of the two"
                f"{' (--leave-out-shared does, of the search questions)' if source == questions.name else ''}"
            )


def _timing(minimise: str, context: int) -> tuple[int, int]:
    """Prompt and new tokens of a benchmark that fit the context."""
    if minimise != "bytes" and context < 8:
        raise HalveError(f"minimise {minimise}: a context of {context} tokens is too short to time anything")
    return min(128, context // 2), min(64, context // 4)


def _ladder(bench: Bench) -> list[Value]:
    """The values of the one varied option, from the gentlest to the one that leaves fewest bytes.

    Values the recipe cannot be applied with (a width that no group size divides, say) are left out. Raises RecipeError
    when that is all of them, or when the option does not change the bytes.
    """
    (varied,) = bench.varied
    planned: list[tuple[Value, int]] = []
    refused: RecipeError | None = None
    for value in varied.values:
        try:
            planned.append((value, bench.planned_bytes((value,))))
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


def _gentlest(bench: Bench) -> Point:
    """Of the corners of several ranges, the one that leaves most bytes: the first point tried.

    Raises RecipeError when the recipe can be applied at no corner.
    """
    planned: list[tuple[int, Point]] = []
    refused: RecipeError | None = None
    for point in itertools.product(*((min(one.values), max(one.values)) for one in bench.varied)):
        try:
            planned.append((bench.planned_bytes(point), point))
        except RecipeError as error:
            refused = refused or error
    if not planned:
        raise RecipeError(f"the recipe can be applied at no corner of the ranges: {refused}")
    return max(planned)[1]


def _identity(
    bench: Bench, floor: Floor, questions: QuestionSet, final: QuestionSet, config: dict[str, Any]
) -> dict[str, Any]:
    """What makes a search this one; nothing of the machine, so that workers elsewhere agree."""
    files = sorted(find_model(bench.model).glob("*.safetensors"))
    calibrating = asdict(bench.calibrating) | {"dtype": str(bench.calibrating.dtype)}
    source = Path(bench.calibrating.calibration).expanduser()
    if source.is_file():
        calibrating["calibration"] = hashlib.sha256(source.read_bytes()).hexdigest()
    identity = {
        "halve": __version__,
        "model": [bench.name, config, [[f.name, f.stat().st_size] for f in files]],
        "steps": [step_json(method) for method in bench.steps],
        "varied": [one.json(bench.steps) for one in bench.varied],
        "floor": asdict(floor),
        "objective": bench.objective,
        "evaluation": asdict(bench.how),
        "data": [questions.sha256, final.sha256],
        "calibrating": calibrating,
    }
    return json.loads(json.dumps(identity))


def _prepare(out: Path, identity: dict[str, Any], overwrite: bool) -> None:
    """Make `out` ours: new, or left by the same search. Another worker may be doing the same at this moment."""
    path = out / "request.json"
    try:
        if out.exists() and not path.is_file():
            time.sleep(0.5)
        if not path.is_file() and out.exists() and (not out.is_dir() or any(out.iterdir())):
            _clear(out, "something else", overwrite)
        elif path.is_file() and json.loads(path.read_text(encoding="utf-8")) != identity:
            _clear(out, "the search of another request", overwrite)
        out.mkdir(parents=True, exist_ok=True)
        with FileLock(out / ".request.lock"):
            if not path.is_file():
                write_json(path, identity)
    except OSError as error:
        raise OutputError(f"{out}: cannot be written ({error.strerror or error}): choose another place") from error


def _clear(out: Path, held: str, overwrite: bool) -> None:
    if not overwrite:
        raise OutputError(f"{out}: holds {held}: choose another folder, or replace it with --overwrite")
    shutil.rmtree(out)


@dataclass(frozen=True)
class Job:
    """What a worker needs to know."""

    bench: Bench
    study: Trials
    questions: QuestionSet
    floor: Floor
    dense: dict[str, Any]
    ladder: list[Value] | None  # of the one varied option
    corner: Point | None  # of several
    most: int  # points to measure where several vary

    def shortfall(self, figures: dict[str, Any]) -> float:
        return self.floor.shortfall(figures, self.dense["accuracy"])


def _work(job: Job, on_trial: Callable[[dict[str, Any]], None] | None) -> None:
    """Claim and measure points until none is left to claim and nobody is measuring any more."""
    from halve.studies.search.study import DUPLICATES, POLL_S

    most = None if job.ladder else job.most
    beaten, shown = 0, 0
    with progress("search", most) as advance:
        while True:
            board = job.study.board()
            advance(len(board.done) - shown)
            shown = len(board.done)
            more, point = (False, None) if board.undecided else _next_point(job, board, beaten >= DUPLICATES)
            if not more:
                if not (board.busy or board.undecided):
                    return
                time.sleep(POLL_S)
                continue
            claim = job.study.claim(point, most)
            beaten = 0 if claim else beaten + 1
            if claim is not None:
                figures = _measure(job, claim)
                if figures is not None and on_trial is not None:
                    on_trial(figures)


def _next_point(job: Job, board: Board, draw: bool) -> tuple[bool, Point | None]:
    """Whether there is a point to claim, and which one (None: the sampler's choice)."""
    if job.ladder is None and len(board.done) + len(board.busy) >= job.most:
        return False, None
    if board.abandoned:
        return True, board.abandoned[0]
    if job.ladder is not None:
        place: dict[Point, int] = {(value,): index for index, value in enumerate(job.ladder)}
        feasible = {place[point]: job.shortfall(figures) <= 0 for point, figures in board.done.items()}
        index = next_index(len(job.ladder), feasible, {place[point] for point in board.busy})
        return (False, None) if index is None else (True, (job.ladder[index],))
    fresh = job.study.unmeasured(board)
    if fresh is None:
        return False, None
    if job.corner not in board.done and job.corner not in board.busy:
        return True, job.corner
    return True, (fresh if draw else None)


def _measure(job: Job, claim: Claim) -> dict[str, Any] | None:
    with job.study.signing(claim):
        try:
            job.bench.planned_bytes(claim.point)
        except RecipeError as error:  # this combination does not fit the model
            job.study.refuse(claim, str(error))
            return None
        figures = job.bench.measure(claim.point, job.questions)
        job.study.finish(claim, figures, job.shortfall(figures))
    return outcome.trial_row(job.bench, claim.point, figures, job.floor, job.dense)
