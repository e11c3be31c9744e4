"""What the ranks of a job tell each other, and the one rank that has nobody to tell."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor

from halve.ranks.shared import SharedMemory


class Ranks(Protocol):
    """The processes that share a model, seen by one of them. Every rank makes the same calls in the same order."""

    rank: int
    size: int

    def add(self, x: Tensor) -> Tensor:
        """The sum of every rank's `x`, the same bits on all; may be written over `x`."""
        ...

    def join(self, x: Tensor, widths: Sequence[int]) -> Tensor:
        """Every rank's x [..., widths[rank]] behind one another: [..., sum of widths]."""
        ...

    def shared(self, room: int) -> SharedMemory | None:
        """Memory that all ranks have, for sums of at most so many floats; None where they are on several machines."""
        ...

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, which JSON can hold, in the order of ranks."""
        ...

    def agree(self, facts: Mapping[str, str]) -> None:
        """HalveError, on all ranks, where one has other facts than the first."""
        ...


class OneRank:
    """A model in one process."""

    rank, size = 0, 1

    def add(self, x: Tensor) -> Tensor:
        return x

    def join(self, x: Tensor, widths: Sequence[int]) -> Tensor:
        return x

    def shared(self, room: int) -> SharedMemory | None:
        return None

    def gather(self, value: Any) -> list[Any]:
        return [value]

    def agree(self, facts: Mapping[str, str]) -> None:
        pass


ALONE = OneRank()
