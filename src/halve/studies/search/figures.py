"""The figures that a search may keep within a limit or look for the best of, each a row of FIGURES."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from halve.measure.kinds import QUALITIES
from halve.measure.units import byte_unit, show_accuracy, show_bytes, show_kl


@dataclass(frozen=True)
class Figure(ABC):
    """A figure of a trial. `interval`: the key of its 95 % interval in records; None for what is counted or timed, the
    others tell how good a model is."""

    key: str  # in records
    label: str
    more_is_better: bool
    interval: str | None = None
    by_factors: bool = False  # an axis of it is logarithmic

    @property
    def of_quality(self) -> bool:
        return self.interval is not None

    def cost(self, value: float) -> float:
        """What is less for the better of two values."""
        return -value if self.more_is_better else value

    def bad_end(self, row: Mapping[str, Any]) -> float:
        """The worse end of a row's interval, as bad as can be where it has none."""
        interval = row.get(self.interval) if self.interval else None
        if interval is None:
            return 0.0 if self.more_is_better else math.inf
        return interval[0 if self.more_is_better else 1]

    @abstractmethod
    def show(self, value: float) -> str:
        """A value with its unit."""

    def show_interval(self, low: float, high: float) -> str:
        """The ends of an interval, with the unit where it needs one."""
        return f"{self.show(low)} to {self.show(high)}"

    def bound(self, value: float) -> str:
        """A limit in words: `KL at most 0.02 nats/token`."""
        return f"{self.label} {'at least' if self.more_is_better else 'at most'} {self.show(value)}"

    def show_row(self, row: Mapping[str, Any], prefix: str = "") -> str:
        """A row's value with its interval, for a cell."""
        return self.show(row[prefix + self.key])

    def axis(self, values: Sequence[float]) -> tuple[float, str]:
        """What to divide these values by on an axis, and the axis' title."""
        return 1.0, self.label

    def ends(self, row: Mapping[str, Any], prefix: str = "") -> tuple[float | None, float | None]:
        """Of the row's interval."""
        low, high = row.get(f"{prefix}{self.interval}") or (None, None)
        return low, high


class _Share(Figure):
    def show(self, value: float) -> str:
        return f"{value:.1%}"

    def show_row(self, row: Mapping[str, Any], prefix: str = "") -> str:
        return show_accuracy(row[prefix + self.key], *self.ends(row, prefix))

    def axis(self, values: Sequence[float]) -> tuple[float, str]:
        return 0.01, f"{self.label} (%)"


class _Divergence(Figure):
    def show(self, value: float) -> str:
        return f"{show_kl(value)} nats/token"

    def show_interval(self, low: float, high: float) -> str:
        return f"{show_kl(low)} to {show_kl(high)}"

    def show_row(self, row: Mapping[str, Any], prefix: str = "") -> str:
        return show_kl(row[prefix + self.key], *self.ends(row, prefix))

    def axis(self, values: Sequence[float]) -> tuple[float, str]:
        return 1.0, f"{self.label} (nats/token)"


class _Bytes(Figure):
    def show(self, value: float) -> str:
        return show_bytes(value, decimals=2)

    def show_row(self, row: Mapping[str, Any], prefix: str = "") -> str:
        return show_bytes(row[prefix + self.key])

    def axis(self, values: Sequence[float]) -> tuple[float, str]:
        scale, unit = byte_unit(max(values))
        return scale, f"{self.label} ({unit})"


class _Milliseconds(Figure):
    def show(self, value: float) -> str:
        return f"{value:.2f} ms"


FIGURES: dict[str, Figure] = {
    "accuracy": _Share(QUALITIES["accuracy"], "accuracy", True, "accuracy_ci95"),
    "kl": _Divergence(QUALITIES["kl"], "KL", False, "kl_nats_per_token_interval", by_factors=True),
    "same-top": _Share(QUALITIES["same-top"], "same top token", True, "same_top_share_interval"),
    "bytes": _Bytes("bytes", "weights on disk", False),
    "memory": _Bytes("memory", "weights in memory", False),
    "ms": _Milliseconds("ms", "decode (ms a token)", False),
}
UNITS = ("questions", "documents", "windows")  # what the data of a search are counted in


def figure_named(name: str) -> Figure:
    """A figure by its name in a record, of another version maybe."""
    return FIGURES.get(name) or _Bytes(name, name, False)


def qualities(row: Mapping[str, Any]) -> list[Figure]:
    """The figures of quality that a row has."""
    return [figure for figure in FIGURES.values() if figure.of_quality and figure.key in row]


@dataclass(frozen=True)
class Judged:
    """What a search was about: the figure with the limit, and the one of which the best was looked for."""

    limited: Figure
    objective: Figure

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> Judged:
        return cls(figure_named(record["floor"].get("figure", "accuracy")), figure_named(record["objective"]))

    @property
    def quality(self) -> Figure:
        """The one that says how good a model is."""
        return self.limited if self.limited.of_quality else self.objective

    @property
    def cost(self) -> Figure:
        """The one that says what a model costs to keep or to run."""
        return self.objective if self.limited.of_quality else self.limited

    def cost_of(self, row: Mapping[str, Any]) -> float:
        return row["objective"] if self.limited.of_quality else row[self.limited.key]
