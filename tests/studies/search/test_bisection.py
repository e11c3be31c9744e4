"""The order of measurements along one option."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from halve.studies.search.bisection import NEXT_BEYOND, SPREAD, next_index, reversals


def run(count: int, clears: Callable[[int], bool]) -> dict[int, bool]:
    """Measure until nothing is left to measure."""
    known: dict[int, bool] = {}
    while (index := next_index(count, known)) is not None:
        assert 0 <= index < count and index not in known
        known[index] = clears(index)
    return known


@given(st.integers(2, 400), st.data())
def test_the_border_is_found_exactly_in_few_measurements(count: int, data) -> None:
    border = data.draw(st.integers(0, count - 1))  # the last that clears the floor
    known = run(count, lambda index: index <= border)
    assert max(index for index, ok in known.items() if ok) == border
    assert border == count - 1 or known[border + 1] is False
    assert len(known) <= 2 + math.ceil(math.log2(count)) + NEXT_BEYOND + SPREAD - 1


@given(st.lists(st.booleans(), min_size=2, max_size=60))
def test_whatever_the_accuracy_does_the_answer_is_followed_by_a_failure(clears: list[bool]) -> None:
    known = run(len(clears), clears.__getitem__)
    best = max((index for index, ok in known.items() if ok), default=None)
    assert all(known[index] is clears[index] for index in known)
    if best is not None and best < len(clears) - 1:
        assert known[best + 1] is False
    if clears[-1]:
        assert best == len(clears) - 1


@pytest.mark.parametrize("comeback", [31, 55])
def test_an_accuracy_that_comes_back_is_noticed(comeback: int) -> None:
    """Right behind the border, and where a quarter of the stretch beyond is tried (30 + 100 // 4 = 55 of 131)."""
    known = run(131, lambda index: index < 30 or index == comeback)
    assert known[comeback] and known[comeback + 1] is False
    assert any(b == comeback for _, b in reversals(known))


def test_reversals_are_neighbours_among_what_was_measured() -> None:
    assert reversals({0: True, 4: False, 6: True, 9: False}) == [(4, 6)]
    assert reversals({0: True, 4: True, 9: False}) == []


def test_nothing_clears_the_floor() -> None:
    known = run(50, lambda index: False)
    assert {0, 49} <= set(known) and len(known) <= 2 + NEXT_BEYOND + SPREAD - 1


@given(st.integers(2, 200), st.integers(1, 6), st.data())
def test_several_workers_never_share_a_point_and_agree_with_one(count: int, workers: int, data) -> None:
    border = data.draw(st.integers(0, count - 1))
    known: dict[int, bool] = {}
    busy: list[int] = []
    while True:
        while len(busy) < workers and (index := next_index(count, known, set(busy))) is not None:
            assert index not in known and index not in busy
            busy.append(index)
        if not busy:
            break
        done = busy.pop(data.draw(st.integers(0, len(busy) - 1)))
        known[done] = done <= border
    assert max(index for index, ok in known.items() if ok) == border
