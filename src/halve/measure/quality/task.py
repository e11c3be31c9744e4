"""What a task of evaluation is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

from halve.decode.text_stream import TokenizerLike
from halve.measure.quality.base import BaseComparison
from halve.measure.quality.resume import ProgressFile
from halve.model.decoder import Model

if TYPE_CHECKING:
    from halve.measure.quality.options import EvaluationOptions

Figures = dict[str, Any]


class Evaluation(Protocol):
    """What a task has prepared: a model and its tokenizer to the record's figures. progress_file: keeps finished parts;
    comparison: what the model is compared with on the way."""

    def __call__(
        self,
        model: Model,
        tokenizer: TokenizerLike,
        progress_file: ProgressFile | None = None,
        comparison: BaseComparison | None = None,
        /,
    ) -> Figures: ...


class Task(ABC):
    """One thing to ask of a model, with the data it is asked on.

    `figure`: the key of its records that models are compared by, and what a table shows for it. `protocols`: the ways to
    ask, by name, the default first; a request may also hold an instance of `protocol_type` itself.
    """

    name: str
    figure: str
    protocols: Mapping[str, object]
    protocol_type: type = str

    @abstractmethod
    def check(self, options: EvaluationOptions) -> None:
        """Raise HalveError for options this task has no use for; looks at no file."""

    def scores(self, options: EvaluationOptions) -> bool:
        """Whether predictions are scored, which can be compared with a base's, and not a text that is generated."""
        return True

    @abstractmethod
    def prepare(self, options: EvaluationOptions) -> Evaluation:
        """Read and check the data, so that everything wrong is found before a model is loaded. Raises DataError."""
