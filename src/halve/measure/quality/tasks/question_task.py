"""A task whose data are questions with options; which questions is the difference between such tasks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from halve.errors import HalveError
from halve.measure.quality.multiple_choice import ChoiceOptions, choice_evaluation
from halve.measure.quality.protocols import PROTOCOLS, ChoiceProtocol
from halve.measure.quality.protocols.continuation import TEMPLATES
from halve.measure.quality.race import load_question_set
from halve.measure.quality.scoring import BATCH_TOKENS
from halve.measure.quality.task import Evaluation, Task

if TYPE_CHECKING:
    from halve.measure.quality.options import EvaluationOptions

HubSplit = tuple[str, str, str]  # name, config, split
DEFAULT_TEMPLATE = next(iter(TEMPLATES))


@dataclass(frozen=True)
class QuestionTask(Task):
    """Accuracy over questions. `questions`: those of the hub that are asked when the request names no data;
    `search_questions`: others, for searches, which confirm their winner on the first."""

    name: str
    questions: HubSplit | None = None
    search_questions: HubSplit | None = None
    figure: ClassVar[str] = "accuracy"
    protocols: ClassVar[Mapping[str, ChoiceProtocol]] = PROTOCOLS
    protocol_type: ClassVar[type] = ChoiceProtocol

    def check(self, options: EvaluationOptions) -> None:
        if options.window is not None:
            raise HalveError(f"window {options.window}: task {self.name} has no window; leave it out")
        protocol = self.protocol(options)
        if options.template is not None and options.template not in TEMPLATES:
            raise HalveError(f"template '{options.template}': unknown; choose one of {', '.join(TEMPLATES)}")
        if protocol.prompt is not None and options.template not in (None, DEFAULT_TEMPLATE):
            free = ", ".join(name for name, p in PROTOCOLS.items() if p.prompt is None)
            raise HalveError(
                f"template '{options.template}': protocol {protocol.name} has its own prompt; use it with {free}"
            )

    def scores(self, options: EvaluationOptions) -> bool:
        return self.protocol(options).read is None

    def prepare(self, options: EvaluationOptions) -> Evaluation:
        return choice_evaluation(load_question_set(options.data, self.questions), self.choice_options(options))

    def protocol(self, options: EvaluationOptions) -> ChoiceProtocol:
        """The protocol asked for, the first of PROTOCOLS where none is named."""
        if isinstance(options.protocol, ChoiceProtocol):
            return options.protocol
        return PROTOCOLS[options.protocol or next(iter(PROTOCOLS))]

    def choice_options(self, options: EvaluationOptions) -> ChoiceOptions:
        """The options with their defaults filled in."""
        protocol = self.protocol(options)
        return ChoiceOptions(
            self.name,
            protocol,
            options.template or DEFAULT_TEMPLATE,
            options.limit or protocol.default_limit,
            options.batch_tokens or BATCH_TOKENS,
            options.seed,
        )
