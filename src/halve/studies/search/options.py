"""What is asked of a search besides model and recipe: the limit it keeps, and how it goes about it."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from halve.errors import HalveError
from halve.studies.search.figures import FIGURES, Figure

# what may be minimised above a floor of quality
OBJECTIVES = ("bytes", "memory", "ms")
_RENAMED = {"weight_bytes": "bytes", "peak_memory": "memory", "decode_ms": "ms"}
TRIALS_OF_SEVERAL = 40
TEXT_TASK = "kl"  # a text, on which models are compared with the dense one
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}
# how each limit is asked for
_OPTIONS = {"accuracy": "floor", "kl": "max_kl", "same-top": "min_same_top", "bytes": "max_bytes"}
_ONE = "give one limit: an accuracy (floor), max_kl, min_same_top or max_bytes"


@dataclass(frozen=True)
class Floor:
    """What a trial has to keep: a figure of FIGURES, at least or at most `value`, or that share of the dense model's."""

    value: float
    relative: bool = False
    lower_bound: bool = False  # the worse end of the 95 % interval has to clear it
    figure: str = "accuracy"

    @classmethod
    def parse(cls, text: str | float, lower_bound: bool = False) -> Floor:
        """An accuracy: 0.5, or 95% of the dense model's."""
        number, percent = _share(text)
        if not 0 < number <= 1:
            raise HalveError(
                f"floor {text!r}: give an accuracy above 0 and up to 1 (0.5), or a share of the dense model's (95%)"
            )
        return cls(number, percent, lower_bound)

    @classmethod
    def asked(
        cls,
        floor: str | float | Floor | None = None,
        max_kl: float | None = None,
        min_same_top: str | float | None = None,
        max_bytes: str | int | None = None,
        lower_bound: bool = False,
    ) -> Floor:
        """The one limit that is given. Raises HalveError for none, several, and a value that none can have."""
        given = {"floor": floor, "max_kl": max_kl, "min_same_top": min_same_top, "max_bytes": max_bytes}
        named = [f"{name} {value}" for name, value in given.items() if value is not None]
        if len(named) != 1:
            raise HalveError(f"{' and '.join(named)}: {_ONE}" if named else f"nothing to keep: {_ONE}")
        if max_bytes is not None:
            if lower_bound:
                raise HalveError(f"floor_lower_bound: max_bytes {max_bytes} has no interval; leave it out")
            return _bytes(max_bytes)
        if max_kl is not None:
            if not 0 < max_kl < math.inf:
                raise HalveError(f"max_kl {max_kl}: give nats a token above 0 (0.02)")
            return cls(float(max_kl), False, lower_bound, "kl")
        if min_same_top is not None:
            number, _ = _share(min_same_top)
            if not 0 < number <= 1:
                raise HalveError(f"min_same_top {min_same_top!r}: give a share above 0 and up to 1 (0.97, or 97%)")
            return cls(number, False, lower_bound, "same-top")
        assert floor is not None
        return floor if isinstance(floor, Floor) else cls.parse(floor, lower_bound)

    @property
    def text(self) -> str:
        """As in a request: `floor 95%`, `max_kl 0.02`."""
        value = f"{100 * self.value:g}%" if self.relative else f"{self.value:.12g}"
        return f"{_OPTIONS[self.figure]} {value}"

    @property
    def limited(self) -> Figure:
        return FIGURES[self.figure]

    def level(self, dense: Mapping[str, Any]) -> float:
        """The value to keep, from the dense model's figures."""
        return self.value * dense[self.limited.key] if self.relative else self.value

    def reached(self, figures: Mapping[str, Any]) -> float:
        """What is held against the level."""
        return self.limited.bad_end(figures) if self.lower_bound else figures[self.limited.key]

    def shortfall(self, figures: Mapping[str, Any], dense: Mapping[str, Any]) -> float:
        """How far figures stay below the floor, or above what is the most; 0 or less when they clear it."""
        return self.limited.cost(self.reached(figures)) - self.limited.cost(self.level(dense))


def _share(text: str | float) -> tuple[float, bool]:
    """A share, and whether it was in per cent; -1 for what is none."""
    if isinstance(text, int | float):
        return float(text), False
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(%?)", text.strip())
    return (float(match[1]) / (100 if match[2] else 1), bool(match[2])) if match else (-1.0, False)


def _bytes(text: str | int) -> Floor:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(%|[kMG]B|)", str(text).strip(), re.IGNORECASE)
    number, unit = (float(match[1]), match[2].upper()) if match else (0.0, "")
    value = number / 100 if unit == "%" else number * _UNITS[unit]
    if not value > 0 or (unit == "%" and value > 1):
        raise HalveError(f"max_bytes {text!r}: give bytes above 0 (20MB, 1.5GB), or a share of the dense model's (25%)")
    return Floor(value, unit == "%", False, "bytes")


def objective_of(minimise: str | None, floor: Floor, of_quality: Sequence[str]) -> str:
    """The figure to look for the best of: bytes above a floor of quality; within bytes the first that tells quality.

    of_quality: what is measured of the models. Raises HalveError for one that does not go with the limit.
    """
    allowed = OBJECTIVES if floor.limited.of_quality else of_quality[:1]
    if minimise is None:
        return allowed[0]
    if minimise not in allowed:
        renamed = _RENAMED.get(minimise)
        what = f"is now called {renamed}" if renamed else "unknown"
        what = f"does not go with {floor.text}" if minimise in FIGURES else what
        raise HalveError(f"minimise {minimise!r}: {what}, use {', '.join(allowed)}")
    return minimise


@dataclass(frozen=True)
class SearchOptions:
    """How a search goes about it. Raises HalveError.

    minimise: one of OBJECTIVES: bytes of all tensors in the files; memory of the weights while decoding, as the kernels of
    this machine hold them; ms of a decode step; within a number of bytes kl, or accuracy. None: the first that goes with
    the limit. Of equal ones the smaller in files wins, then the better. held_out_data: the questions or text that the
    winner is confirmed on; without it `search_share` of the data, divided by article or document, is searched on and the
    rest confirms. leave_out_shared: what is searched on and in the final test as well is left out, not an error; RACE-H's
    own two sets need it. resolution: distance of the values tried (0.01; whole numbers are exact). trials: points to
    measure where several options vary (40). storage: SQL URL of the study, to share it between machines (OUT/study.db).
    keep_checkpoints: every trial's model stays, not the winner's alone. seed: of the sampler and of timed prompts.
    command: for records, where it is not this process's own.
    """

    minimise: str | None = None
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
        if self.trials is not None and self.trials < 1:
            raise HalveError(f"trials {self.trials}: must be at least 1")
        share = self.search_share
        if not 0 < share < 1 or (self.held_out_data is not None and share != 0.5):
            raise HalveError(f"search_share {share}: must be between 0 and 1, and has no use with held-out data")
