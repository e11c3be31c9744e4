"""What one process does in a search: claim a point, measure it, and so on until none is left."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from halve.errors import RecipeError
from halve.progress import progress
from halve.studies.search import outcome
from halve.studies.search.bisection import next_index
from halve.studies.search.options import TRIALS_OF_SEVERAL, Floor
from halve.studies.search.trial import TrialRunner
from halve.studies.search.vary import Point, Value

if TYPE_CHECKING:
    from halve.studies.search.study import Board, Claim, Trials


@dataclass(frozen=True)
class Worker:
    """A search as one of its processes sees it; `study` is what it shares with the others."""

    runner: TrialRunner
    study: Trials
    floor: Floor
    dense: dict[str, Any]
    ladder: list[Value] | None  # of the one varied option, the likeliest to clear the floor first
    corner: Point | None  # of several

    @property
    def most(self) -> int | None:
        """Points to measure where several options vary."""
        return None if self.ladder else self.runner.options.trials or TRIALS_OF_SEVERAL

    def run(self, on_trial: Callable[[dict[str, Any]], None] | None) -> None:
        """Claim and measure points until none is left to claim and nobody is measuring any more."""
        from halve.studies.search.study import DUPLICATES, POLL_S

        beaten = 0  # times in a row that another worker was first
        shown = 0
        with progress("search", self.most) as advance:
            while True:
                board = self.study.board()
                advance(len(board.done) - shown)
                shown = len(board.done)
                more, point = (False, None) if board.undecided else self._next_point(board, beaten >= DUPLICATES)
                if not more:
                    if not (board.busy or board.undecided):
                        return
                    time.sleep(POLL_S)
                    continue
                claim = self.study.claim(point, self.most)
                beaten = 0 if claim else beaten + 1
                if claim is not None:
                    figures = self._measure(claim)
                    if figures is not None and on_trial is not None:
                        on_trial(figures)

    def _next_point(self, board: Board, draw: bool) -> tuple[bool, Point | None]:
        """Whether there is a point to claim, and which one (None: the sampler's choice)."""
        if self.most is not None and len(board.done) + len(board.busy) >= self.most:
            return False, None
        if board.abandoned:
            return True, board.abandoned[0]
        if self.ladder is not None:
            place: dict[Point, int] = {(value,): index for index, value in enumerate(self.ladder)}
            feasible = {place[point]: self._shortfall(figures) <= 0 for point, figures in board.done.items()}
            index = next_index(len(self.ladder), feasible, {place[point] for point in board.busy})
            return (False, None) if index is None else (True, (self.ladder[index],))
        fresh = self.study.unmeasured(board)
        if fresh is None:
            return False, None
        if self.corner not in board.done and self.corner not in board.busy:
            return True, self.corner
        return True, (fresh if draw else None)

    def _measure(self, claim: Claim) -> dict[str, Any] | None:
        with self.study.signing(claim):
            try:
                self.runner.planned_bytes(claim.point)
            except RecipeError as error:  # this combination does not fit the model
                self.study.refuse(claim, str(error))
                return None
            figures = self.runner.measure(claim.point)
            values = [figures["objective"], figures[self.floor.limited.key]]
            self.study.finish(claim, figures, values, self._shortfall(figures))
        return outcome.trial_row(self.runner, claim.point, figures, self.floor, self.dense)

    def _shortfall(self, figures: dict[str, Any]) -> float:
        return self.floor.shortfall(figures, self.dense)
