"""What is asked of a search besides model and recipe: the floor, and how it goes about it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from halve.errors import HalveError

# what may be minimised, and what that is
OBJECTIVES = {"bytes": "weights on disk", "memory": "weights in memory", "ms": "decode (ms a token)"}
_RENAMED = {"weight_bytes": "bytes", "peak_memory": "memory", "decode_ms": "ms"}
TRIALS_OF_SEVERAL = 40


@dataclass(frozen=True)
class Floor:
    """The accuracy asked for: a share of all questions, or of what the dense model answers."""

    value: float
    relative: bool = False
    lower_bound: bool = False  # the lower end of the 95 % interval has to clear it

    @classmethod
    def parse(cls, text: str | float, lower_bound: bool = False) -> Floor:
        match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(%?)", str(text).strip())
        value = float(match[1]) / (100 if match[2] else 1) if match else -1.0
        if not 0 < value <= 1:
            raise HalveError(
                f"floor {text!r}: give an accuracy above 0 and up to 1 (0.5), or a share of the dense model's (95%)"
            )
        return cls(value, bool(match and match[2]), lower_bound)

    @property
    def text(self) -> str:
        """As in a request: 0.5, or 95%."""
        return f"{100 * self.value:g}%" if self.relative else f"{self.value:g}"

    def accuracy(self, dense: float) -> float:
        return self.value * dense if self.relative else self.value

    def shortfall(self, figures: Mapping[str, Any], dense: float) -> float:
        """How far figures stay below the floor; 0 or less when they clear it."""
        reached = figures["accuracy_ci95"][0] if self.lower_bound else figures["accuracy"]
        return self.accuracy(dense) - reached


@dataclass(frozen=True)
class SearchOptions:
    """How a search goes about it. Raises HalveError.

    minimise: a key of OBJECTIVES: bytes of all tensors in the files; bytes of the weights while decoding, as the kernels of
    this machine hold them; milliseconds of a decode step. Of equal ones the smaller in files wins, then the more accurate.
    held_out_data: the questions the winner is confirmed on; without them `search_share` of
    the data, divided by article, is searched on and the rest confirms. leave_out_shared: search questions whose article
    is in the final test are left out, not an error; RACE-H's own two sets need it. resolution: distance of the values tried
    (0.01; whole numbers are exact). trials: points to measure where several options vary (40). storage: SQL URL of the
    study, to share it between machines (OUT/study.db). keep_checkpoints: every trial's model stays, not the winner's
    alone. seed: of the sampler and of timed prompts. command: for records, where it is not this process's own.
    """

    minimise: str = "bytes"
    held_out_data: str | Path | None = None
    search_share: float = 0.5
    leave_out_shared: bool = False
    resolution: float | None = None
    trials: int | None = None
    storage: str | None = None
    keep_checkpoints: bool = False
    seed: int = 0
    command: str | None = None

    def __post_init__(self) -> None:
        if self.minimise not in OBJECTIVES:
            renamed = _RENAMED.get(self.minimise)
            what = f"is now called {renamed}" if renamed else "unknown"
            raise HalveError(f"minimise {self.minimise!r}: {what}, use {', '.join(OBJECTIVES)}")
        if self.trials is not None and self.trials < 1:
            raise HalveError(f"trials {self.trials}: must be at least 1")
        share = self.search_share
        if not 0 < share < 1 or (self.held_out_data is not None and share != 0.5):
            raise HalveError(f"search_share {share}: must be between 0 and 1, and has no use with held-out data")
