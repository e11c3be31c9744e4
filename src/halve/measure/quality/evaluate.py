"""How good a model is: perplexity and multiple choice, as one record per run.

START HERE: `evaluate` -> a task of `TASKS` (tasks/), which reads its data -> a protocol (protocols/) that asks and takes
the answer -> prompts (prompts.py) -> log-likelihoods (scoring.py) or generated text -> record with interval (statistics.py).
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch

from halve.checkpoint.identity import model_identity, versions
from halve.checkpoint.reader import check_device, find_model, load_model
from halve.checkpoint.tokenizer import load_tokenizer
from halve.decode.text_stream import TokenizerLike
from halve.measure.kinds import EvaluationRecord
from halve.measure.machine import dtype_name
from halve.measure.quality.options import EvaluationOptions
from halve.measure.quality.protocols import ChoiceProtocol
from halve.measure.quality.resume import ProgressFile
from halve.measure.quality.task import Evaluation
from halve.measure.quality.tasks import TASKS
from halve.measure.records import checkpoint_recipe, new_record
from halve.model.decoder import Model


def evaluate(
    model: str | os.PathLike[str],
    *,
    task: str,
    data: Path | str | None = None,
    protocol: str | ChoiceProtocol | None = None,
    template: str | None = None,
    limit: int | None = None,
    window: int | None = None,
    batch_tokens: int | None = None,
    seed: int = 0,
    device: str = "cpu",
    dtype: torch.dtype | None = None,
    command: str | None = None,
    progress_file: Path | None = None,
) -> EvaluationRecord:
    """Evaluate one model, reloaded from `model` (a folder or hub id), and return the record; docs/evaluation.md has its keys.

    What is asked are the fields of EvaluationOptions. `dtype` None is the checkpoint's own. progress_file: finished parts
    are kept there and taken up again by a later run of the same model, data and options; removed at the end. Raises
    HalveError (request) or DataError (data) before any weight is read.
    """
    device = check_device(device)
    options = EvaluationOptions(task, data, protocol, template, limit, window, batch_tokens, seed)
    evaluation = prepare(options)
    loaded = LoadedModel.load(model, device=device, dtype=dtype)
    return evaluate_loaded(loaded, evaluation, command=command, progress_file=progress_file)


def prepare(options: EvaluationOptions) -> Evaluation:
    """Read and check the data of an evaluation, which any number of models may then be put through. Raises DataError."""
    return TASKS[options.task].prepare(options)


@dataclass(frozen=True)
class LoadedModel:
    """A model under evaluation, as it lies on disk, with what its records say of it."""

    name: str
    folder: Path
    recipe: list[Any]
    device: str
    model: Model
    tokenizer: TokenizerLike

    @classmethod
    def load(
        cls,
        model: str | os.PathLike[str],
        *,
        device: str = "cpu",
        dtype: torch.dtype | None = None,
        name: str | None = None,
        tokenizer: TokenizerLike | None = None,
    ) -> LoadedModel:
        """Load a folder or hub id. `name`: for records, where it is not `model`; `tokenizer`: where it is there already."""
        model = os.fspath(model)
        tokenizer = tokenizer or load_tokenizer(model)
        folder = find_model(model)
        loaded = load_model(model, dtype=dtype, device=device)
        return cls(name or model, folder, checkpoint_recipe(folder), device, loaded, tokenizer)


def evaluate_loaded(
    loaded: LoadedModel, evaluation: Evaluation, *, command: str | None = None, progress_file: Path | None = None
) -> EvaluationRecord:
    """The record of one evaluation, for several of one model, or one of several models that are in memory already.

    progress_file: as for `evaluate`; the model's folder must hold what was loaded from it.
    """
    kept = None
    if progress_file is not None:
        made_from = {"model": model_identity(loaded.folder), "device": loaded.device, "versions": versions()}
        kept = ProgressFile(progress_file, made_from)
    figures = evaluation(loaded.model, loaded.tokenizer, kept)
    record = new_record(
        "evaluation",
        loaded.name,
        command=command,
        recipe=loaded.recipe,
        device=loaded.device,
        dtype=dtype_name(loaded.model.dtype),
        bos_ids=list(loaded.tokenizer.bos_ids),
        **figures,
    )
    return cast(EvaluationRecord, record)
