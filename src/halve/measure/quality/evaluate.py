"""How good a model is: perplexity and multiple choice, as one record per run.

START HERE: `evaluate` -> a task of `TASKS` (tasks/), which reads its data -> a protocol (protocols/) that asks and takes
the answer -> prompts (prompts.py) -> log-likelihoods (scoring.py) or generated text -> record with interval (statistics.py).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch

from halve.checkpoint.identity import model_identity, model_sha256, versions
from halve.checkpoint.reader import check_device, find_model, load_model, open_checkpoint
from halve.checkpoint.tokenizer import load_tokenizer
from halve.decode.text_stream import TokenizerLike
from halve.errors import HalveError
from halve.files import check_output_path, replacing
from halve.measure.kinds import EvaluationRecord
from halve.measure.machine import dtype_name
from halve.measure.quality.base import Base, BaseComparison, FileBase, ModelBase
from halve.measure.quality.base_file import BASE_TOKENS, BaseWriter, is_base
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
    base: str | os.PathLike[str] | None = None,
    save_base: str | os.PathLike[str] | None = None,
    base_tokens: int = BASE_TOKENS,
) -> EvaluationRecord:
    """Evaluate one model, reloaded from `model` (a folder or hub id), and return the record; docs/evaluation.md has its keys.

    What is asked are the fields of EvaluationOptions. `dtype` None is the checkpoint's own. progress_file: finished parts
    are kept there and taken up again by a later run of the same model, data and options; removed at the end (not used
    with save_base). base: what the model is compared with, the folder or hub id of the model it was made from or a file
    of its predictions. save_base: such a file is written, of the base or without one of the model itself, with the
    `base_tokens` most probable tokens of every position. Raises HalveError (request) or DataError (data) before any
    weight is read.
    """
    device = check_device(device)
    options = EvaluationOptions(task, data, protocol, template, limit, window, batch_tokens, seed)
    request = BaseRequest(base, save_base, base_tokens)
    if request.wanted and not TASKS[task].scores(options):
        raise HalveError(
            f"protocol {options.protocol_name}: answers in its own words and predicts nothing to compare; "
            "use a protocol that scores the options"
        )
    evaluation = prepare(options)
    loaded = LoadedModel.load(model, device=device, dtype=dtype)
    with request.opened(loaded, device, dtype) as comparison:
        return evaluate_loaded(
            loaded,
            evaluation,
            command=command,
            progress_file=None if request.save else progress_file,
            comparison=comparison,
        )


def prepare(options: EvaluationOptions) -> Evaluation:
    """Read and check the data of an evaluation, which any number of models may then be put through. Raises DataError."""
    return TASKS[options.task].prepare(options)


@dataclass(frozen=True)
class LoadedModel:
    """A model under evaluation, as it lies on disk, with what its records say of it."""

    name: str
    folder: Path
    sha256: str  # of what decides what it computes
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
        sha256, recipe = model_sha256(folder), checkpoint_recipe(folder)
        return cls(name or model, folder, sha256, recipe, device, loaded, tokenizer)

    def as_base(self) -> ModelBase:
        """As what others are compared with."""
        return ModelBase(self.name, self.model, self.tokenizer, self.recipe)


class BaseRequest:
    """A base to compare with, a file to keep one in, or both; checked when it is made. Raises HalveError."""

    def __init__(
        self, base: str | os.PathLike[str] | None, save: str | os.PathLike[str] | None, base_tokens: int
    ) -> None:
        if base_tokens < 1:
            raise HalveError(f"base_tokens {base_tokens}: must be at least 1")
        path = None if base is None else Path(os.path.expanduser(base))
        self._file = FileBase(path) if path is not None and path.is_file() else None
        if self._file is not None and save is not None:
            raise HalveError(f"base {base}: is a file of predictions already; save a base from the model itself")
        if base is not None and self._file is None:
            open_checkpoint(os.fspath(base))  # what is wrong with it is told before the model is loaded
        self._base = base
        self._base_tokens = base_tokens
        self.save = None if save is None else check_output_path(save, "a base", is_base)

    @property
    def wanted(self) -> bool:
        return self._base is not None or self.save is not None

    @contextmanager
    def opened(self, loaded: LoadedModel, device: str, dtype: torch.dtype | None) -> Iterator[BaseComparison | None]:
        """The comparison of a loaded model; a file of predictions is complete when the context ends well."""
        if not self.wanted:
            yield None
            return
        base: Base | None = self._file
        if base is None and self._base is not None:
            same = find_model(os.fspath(self._base)) == loaded.folder  # compared with itself a model is loaded once
            base = (loaded if same else LoadedModel.load(self._base, device=device, dtype=dtype)).as_base()
        with ExitStack() as stack:
            if self.save is None:
                yield BaseComparison(base)
                return
            writer = BaseWriter(stack.enter_context(replacing(self.save)), self._base_tokens)
            stack.callback(writer.close)
            comparison = BaseComparison(base, writer)
            yield comparison
            writer.finish(asdict(comparison.asked), (base or loaded.as_base()).about)


def evaluate_loaded(
    loaded: LoadedModel,
    evaluation: Evaluation,
    *,
    command: str | None = None,
    progress_file: Path | None = None,
    comparison: BaseComparison | None = None,
) -> EvaluationRecord:
    """The record of one evaluation, for several of one model, or one of several models that are in memory already.

    progress_file: as for `evaluate`; the model's folder must hold what was loaded from it.
    """
    kept = None
    if progress_file is not None:
        made_from = {"model": model_identity(loaded.folder), "device": loaded.device, "versions": versions()}
        kept = ProgressFile(progress_file, made_from)
    figures = evaluation(loaded.model, loaded.tokenizer, kept, comparison)
    if comparison is not None:
        figures |= comparison.figures()
    record = new_record(
        "evaluation",
        loaded.name,
        command=command,
        recipe=loaded.recipe,
        model_sha256=loaded.sha256,
        device=loaded.device,
        dtype=dtype_name(loaded.model.dtype),
        bos_ids=list(loaded.tokenizer.bos_ids),
        **figures,
    )
    return cast(EvaluationRecord, record)
