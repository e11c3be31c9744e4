"""What a page is made of; the template knows nothing else."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from halve.measure.table import Comparison

_MOST_CARDS = 12


@dataclass(frozen=True)
class TableBlock:
    """A table. On a narrow screen the rows become cards, or it scrolls beside its first column, whichever is shorter."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    title: str = ""
    notes: Sequence[str] = ()
    text_columns: int = 1  # the first ones hold words, the others figures
    kind: str = "table"

    @property
    def stacked(self) -> bool:
        """Whether rows become cards on a narrow screen."""
        return self.text_columns == len(self.head) or (len(self.head) > 5 and len(self.rows) <= _MOST_CARDS)

    @staticmethod
    def parts(cell: str) -> tuple[str, str]:
        """A figure, and its interval or p-value, which stands below it."""
        match = re.fullmatch(r"([^\[(]+?) ([\[(].*[\])])", cell)
        return (match[1], match[2]) if match else (cell, "")

    @classmethod
    def of(cls, table: Comparison, title: str = "", text_columns: int = 1) -> TableBlock:
        rows = [[column.text(row) for column in table.columns] for row in table.rows]
        return cls([column.title for column in table.columns], rows, title, table.notes, text_columns)


@dataclass(frozen=True)
class Plot:
    """An SVG with what stands below it."""

    svg: str
    caption: str


@dataclass(frozen=True)
class PlotsBlock:
    """Plots side by side, below each other on a narrow screen."""

    plots: Sequence[Plot]
    title: str = ""
    kind: str = "plots"


@dataclass(frozen=True)
class FactsBlock:
    """Names with their values."""

    facts: Sequence[tuple[str, str]]
    title: str = ""
    kind: str = "facts"


Block = TableBlock | PlotsBlock | FactsBlock


@dataclass(frozen=True)
class Section:
    """A part of the page with a heading of its own, left out when it has no blocks."""

    key: str
    title: str
    blocks: list[Block] = field(default_factory=list)
    intro: str = ""
