"""What is asked of an evaluation, as one value that is checked when it is made."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from halve.decode.sampling import check_seed
from halve.errors import HalveError
from halve.measure.quality.protocols import ChoiceProtocol
from halve.measure.quality.tasks import TASKS


@dataclass(frozen=True)
class EvaluationOptions:
    """What is asked of a model; None means the task's default.

    task: a key of TASKS. data: file, folder, or "hub:NAME[[:CONFIG]:SPLIT]"; None: the hub's RACE-H for task race-h.
    protocol: one of the task's, by name, or one that a study brings along; the task's first by default. template: of
    protocols without a prompt of their own. limit: the first questions, windows or documents only. window: tokens
    (perplexity). batch_tokens: cache slots per batch. seed: of protocols that sample. Raises HalveError.
    """

    task: str
    data: Path | str | None = None
    protocol: str | ChoiceProtocol | None = None
    template: str | None = None
    limit: int | None = None
    window: int | None = None
    batch_tokens: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.task not in TASKS:
            raise HalveError(f"task '{self.task}': unknown; choose one of {', '.join(TASKS)}")
        task, protocol = TASKS[self.task], self.protocol
        by_name = protocol is None or (isinstance(protocol, str) and protocol in task.protocols)
        if not by_name and (isinstance(protocol, str) or not isinstance(protocol, task.protocol_type)):
            raise HalveError(
                f"protocol '{self.protocol_name}': unknown for task {self.task}; choose one of "
                f"{', '.join(task.protocols)}"
            )
        check_seed(self.seed)
        for name in ("limit", "batch_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise HalveError(f"{name} {value}: must be at least 1")
        task.check(self)

    @property
    def protocol_name(self) -> str | None:
        """For records: what was asked for, None for the task's default."""
        return self.protocol.name if isinstance(self.protocol, ChoiceProtocol) else self.protocol

    def json(self) -> dict[str, Any]:
        """What was asked, for records: data by its name, not where it lies on this machine."""
        data = None if self.data is None else Path(self.data).name
        asked = {"task": self.task, "data": data, "protocol": self.protocol_name}
        return asked | {"template": self.template, "limit": self.limit}
