"""How good a model is: perplexity and multiple choice, as one record per run.

START HERE: `evaluate` -> a task of `TASKS` -> prompts (prompts.py) -> log-likelihoods (scoring.py) or generated answers
(answers.py) -> record with interval (statistics.py).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from halve.errors import DataError, HalveError
from halve.measure.quality import multiple_choice, perplexity
from halve.measure.quality.prompts import TEMPLATES, Tokenizer
from halve.measure.quality.race import HUB_RACE, load_question_set
from halve.measure.quality.statistics import PairedTest, paired_records, paired_test
from halve.model.decoder import Model

__all__ = [
    "PROTOCOLS",
    "TASKS",
    "TEMPLATES",
    "PairedTest",
    "Run",
    "evaluate",
    "paired_records",
    "paired_test",
    "prepare",
]

Run = Callable[[Model, Tokenizer], dict[str, Any]]


@dataclass(frozen=True)
class Request:
    """What was asked of a task; None means the task's default."""

    task: str
    data: Path | str | None
    protocol: str | None
    template: str | None
    limit: int | None
    window: int | None
    batch_tokens: int | None
    seed: int
    progress_file: Path | None


def _perplexity(request: Request) -> Run:
    if request.template is not None:
        raise HalveError(f"template '{request.template}': task perplexity has no template; leave it out")
    if request.data is None:
        raise DataError("task perplexity has no data of its own; give --data with a .txt, .raw or .jsonl file")
    text = perplexity.read_text(Path(request.data), request.protocol or perplexity.PROTOCOLS[0])
    how = perplexity.Settings(request.window, request.limit, request.batch_tokens)
    return lambda model, tokenizer: perplexity.run(model, tokenizer, text, how, request.progress_file)


def _multiple_choice(request: Request, hub: tuple[str, str, str] | None = None) -> Run:
    if request.window is not None:
        raise HalveError(f"window {request.window}: task {request.task} has no window; leave it out")
    how = multiple_choice.settings(
        request.task, request.protocol, request.template, request.limit, request.batch_tokens, request.seed
    )
    questions = load_question_set(request.data, hub)
    return lambda model, tokenizer: multiple_choice.run(model, tokenizer, questions, how, request.progress_file)


def _race_high(request: Request) -> Run:
    return _multiple_choice(request, HUB_RACE)


# A task reads and checks its data and returns the run, so that everything wrong is found before a model is loaded.
TASKS: dict[str, Callable[[Request], Run]] = {
    "perplexity": _perplexity,
    "race-h": _race_high,
    "multiple-choice": _multiple_choice,
}
PROTOCOLS: dict[str, tuple[str, ...]] = {
    "perplexity": perplexity.PROTOCOLS,
    "race-h": tuple(multiple_choice.PROTOCOLS),
    "multiple-choice": tuple(multiple_choice.PROTOCOLS),
}


def prepare(
    *,
    task: str,
    data: Path | str | None = None,
    protocol: str | None = None,
    template: str | None = None,
    limit: int | None = None,
    window: int | None = None,
    batch_tokens: int | None = None,
    seed: int = 0,
    progress_file: Path | None = None,
) -> Run:
    """Read and check the data of an evaluation; call the result with a model and its tokenizer to get the record.

    data: file, folder, or "hub:NAME[[:CONFIG]:SPLIT]"; None: the hub's RACE-H for task race-h. The first entry of
    PROTOCOLS[task] and template "race" are the defaults. limit: the first questions, windows or documents only. window:
    tokens (perplexity). batch_tokens: cache slots per batch. seed: of the protocol that samples. progress_file: finished
    parts are kept there and taken up again by a later run of the same model, data and settings; removed at the end.
    Raises HalveError (request) or DataError (data).
    """
    if task not in TASKS:
        raise HalveError(f"task '{task}': unknown; choose one of {', '.join(TASKS)}")
    if protocol is not None and protocol not in PROTOCOLS[task]:
        raise HalveError(f"protocol '{protocol}': unknown for task {task}; choose one of {', '.join(PROTOCOLS[task])}")
    for name, value in (("limit", limit), ("batch_tokens", batch_tokens)):
        if value is not None and value < 1:
            raise HalveError(f"{name} {value}: must be at least 1")
    return TASKS[task](Request(task, data, protocol, template, limit, window, batch_tokens, seed, progress_file))


def evaluate(
    model: Model,
    tokenizer: Tokenizer,
    *,
    task: str,
    data: Path | str | None = None,
    protocol: str | None = None,
    template: str | None = None,
    limit: int | None = None,
    window: int | None = None,
    batch_tokens: int | None = None,
    seed: int = 0,
    progress_file: Path | None = None,
) -> dict[str, Any]:
    """Evaluate a loaded model: `prepare` and its run in one call. Returns the record; keys in docs/evaluation.md."""
    run = prepare(
        task=task,
        data=data,
        protocol=protocol,
        template=template,
        limit=limit,
        window=window,
        batch_tokens=batch_tokens,
        seed=seed,
        progress_file=progress_file,
    )
    return run(model, tokenizer)
