"""What wins and what no trial beats, for every pair of a limit and an objective, against plain comparisons."""

from __future__ import annotations

import random
from typing import Any

import pytest

from halve.studies.search.figures import FIGURES, Judged
from halve.studies.search.options import Floor
from halve.studies.search.outcome import pareto_front, rank

PAIRS = [(limited, cost) for limited in ("accuracy", "kl", "same-top") for cost in ("bytes", "memory", "ms")]
PAIRS += [("bytes", quality) for quality in ("accuracy", "kl", "same-top")]


@pytest.mark.parametrize(("limited", "objective"), PAIRS)
def test_the_winner_and_the_front(limited: str, objective: str) -> None:
    judged = Judged(FIGURES[limited], FIGURES[objective])
    draw = random.Random(f"{limited} {objective}")
    for _ in range(40):
        rows: list[dict[str, Any]] = []
        for number in range(draw.randint(1, 12)):
            row = {key: draw.randint(1, 5) / 5 for key in ("accuracy", "kl_nats_per_token", "same_top_share")}
            row |= {key: draw.randint(1, 4) for key in ("bytes", "memory", "ms")}
            rows.append(row | {"objective": row[FIGURES[objective].key], "values": [number]})
        floor = Floor(2 if limited == "bytes" else 0.6, figure=limited)
        kept = [row for row in rows if floor.shortfall(row, {}) <= 0]
        for row in rows:
            value, level = row[FIGURES[limited].key], floor.value
            assert (row in kept) is (value <= level if limited in ("kl", "bytes") else value >= level)
        if kept:
            best = min(kept, key=lambda row: rank(row, judged))
            for other in kept:
                if objective in ("accuracy", "same-top"):
                    assert best["objective"] >= other["objective"]
                else:
                    assert best["objective"] <= other["objective"]
        quality, cost = judged.quality.key, judged.cost.key
        assert {quality, cost} == {FIGURES[limited].key, FIGURES[objective].key}
        sign = -1 if quality == "kl_nats_per_token" else 1
        undominated = {
            (row[cost], row[quality])
            for row in rows
            if not any(
                other[cost] <= row[cost]
                and sign * other[quality] >= sign * row[quality]
                and (other[cost], other[quality]) != (row[cost], row[quality])
                for other in rows
            )
        }
        front = [(row[cost], row[quality]) for row in pareto_front(rows, judged)]
        assert front == sorted(undominated)
