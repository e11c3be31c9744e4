"""Where the accuracy falls below the floor along one option, in as few measurements as possible; any number at once.

The values are numbered from the gentlest (0) to the one that leaves least (count - 1). Accuracy is measured on questions,
so it may fall below the floor and come back: after the bisection some points beyond are tried, and the search moves on
when one of them clears the floor.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Set

NEXT_BEYOND = 2  # points right behind the border that are tried, where noise is likeliest
SPREAD = 4  # the stretch beyond is cut into so many parts and tried at the cuts


def next_index(count: int, feasible: Mapping[int, bool], busy: Set[int] = frozenset()) -> int | None:
    """The next value to measure, None when there is none (left, or until those in `busy` are done).

    `feasible`: what was measured. The answer of the search is then `max` of the feasible ones: everything between it
    and the next measured point is decided, and the points of `_probes` beyond it have failed.
    """
    for end in (count - 1, 0):
        if end not in feasible and end not in busy:
            return end
    best = max((index for index, ok in feasible.items() if ok), default=None)
    if best == count - 1:
        return None
    if best is None and 0 in feasible:
        candidates = _probes(0, count)  # not even the gentlest clears the floor: a look around is all that is left
    else:
        best = best or 0  # while the gentlest is being measured it is taken to clear the floor
        above = min((index for index, ok in feasible.items() if not ok and index > best), default=count - 1)
        if above - best > 1:
            return _middle_of_widest_gap({best, above} | {i for i in busy if best < i < above})
        candidates = _probes(best + 1, count)
    return next((index for index in candidates if index not in feasible and index not in busy), None)


def _middle_of_widest_gap(points: set[int]) -> int | None:
    ordered = sorted(points)
    low, high = max(itertools.pairwise(ordered), key=lambda pair: pair[1] - pair[0])
    return (low + high) // 2 if high - low > 1 else None


def _probes(border: int, count: int) -> list[int]:
    """Points beyond `border`, the first known to fail."""
    near = range(border + 1, min(border + 1 + NEXT_BEYOND, count))
    spread = [border + (count - 1 - border) * part // SPREAD for part in range(1, SPREAD)]
    return list(dict.fromkeys([*near, *(index for index in spread if index > border)]))


def reversals(feasible: Mapping[int, bool]) -> list[tuple[int, int]]:
    """Pairs (fails, clears the floor although further on) next to each other among the measured points."""
    ordered = sorted(feasible)
    return [(a, b) for a, b in itertools.pairwise(ordered) if feasible[b] and not feasible[a]]
