"""The trials of a search in a database that any number of processes may work on: an Optuna study.

A worker claims a point by writing a running trial; of two that claim the same point, the trial with the lower number
stays. A claim is signed every few seconds: one that is not signed any more belongs to a dead worker and is given up for
others. Only public parts of Optuna are used, so its tools (dashboard, export) work on the same database.
"""

from __future__ import annotations

import logging
import os
import random
import socket
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import FrozenTrial, TrialState

from halve.errors import OutputError
from halve.studies.search.vary import Point, Varied

SIGN_S = 5.0  # a worker signs its claim this often
DEAD_S = 30.0  # and is taken for dead after so long without
POLL_S = 0.2
DUPLICATES = 10  # in a row from the sampler; then a point is drawn that nobody has measured
STARTUP = 10  # points drawn at random before the sampler models anything


@dataclass(frozen=True)
class Board:
    """What is known of every point that was ever claimed."""

    done: dict[Point, dict[str, Any]]  # outcome of each measured point, in the order they were claimed
    busy: frozenset[Point]
    abandoned: tuple[Point, ...]  # claimed by workers that died, not measured since
    refused: frozenset[Point]
    undecided: bool  # a claim is being written this very moment


@dataclass(frozen=True)
class Claim:
    """A point that is this worker's to measure."""

    trial: optuna.trial.Trial
    point: Point


class Trials:
    """The study behind `url`; `name` tells searches in one database apart. more_is_better: of each value of a trial."""

    def __init__(
        self, url: str, name: str, varied: Sequence[Varied], seed: int, more_is_better: Sequence[bool]
    ) -> None:
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        logging.getLogger("alembic").setLevel(logging.WARNING)
        self.varied, self.seed, self._study = varied, seed, _open(url, name, more_is_better)
        self._distributions = {one.name: _distribution(one) for one in varied}

    def board(self) -> Board:
        """The state of all points; claims of dead workers are given up first."""
        done: dict[Point, dict[str, Any]] = {}
        busy, refused, abandoned, undecided = set(), set(), [], False
        for trial in self._study.get_trials(deepcopy=False):
            point = self._point(trial)
            if trial.state == TrialState.RUNNING and _silent_s(trial) > DEAD_S:
                self._give_up(trial.number)
                abandoned += [] if point is None else [point]
            elif trial.state == TrialState.RUNNING:
                undecided |= point is None
                busy |= set() if point is None else {point}
            elif point is None:
                continue
            elif trial.state == TrialState.COMPLETE:
                done.setdefault(point, trial.user_attrs["outcome"])
            elif "refused" in trial.user_attrs:
                refused.add(point)
            elif "withdrawn" not in trial.user_attrs:
                abandoned.append(point)
        left = tuple(dict.fromkeys(p for p in abandoned if p not in done and p not in busy and p not in refused))
        return Board(done, frozenset(busy), left, frozenset(refused), undecided)

    def claim(self, point: Point | None, most: int | None = None) -> Claim | None:
        """Claim `point`, or one the sampler proposes; None when another worker was first, or has it measured already.

        `most`: the number of points that may be claimed in all.
        """
        self._study.sampler = self._sampler(point)
        trial = self._study.ask(fixed_distributions=self._distributions)
        trial.set_user_attr("worker", f"{socket.gethostname()}:{os.getpid()}")
        mine = self._point(trial)
        assert mine is not None
        while True:
            others = [t for t in self._study.get_trials(deepcopy=False) if t.number < trial.number and _counts(t)]
            taken = [self._point(t) for t in others]
            if None not in taken:
                break
            time.sleep(POLL_S / 4)  # somebody is in the middle of claiming
        if mine in taken or (most is not None and len(set(taken)) >= most):
            trial.set_user_attr("withdrawn", "another worker was first")
            self._give_up(trial.number)
            return None
        return Claim(trial, mine)

    @contextmanager
    def signing(self, claim: Claim) -> Iterator[None]:
        """Sign the claim every few seconds while the block runs; a failure inside gives the point up."""
        stop = threading.Event()

        def sign() -> None:
            with suppress(optuna.exceptions.UpdateFinishedTrialError):  # others took this worker for dead
                claim.trial.set_user_attr("signed", time.time())
                while not stop.wait(SIGN_S):
                    claim.trial.set_user_attr("signed", time.time())

        thread = threading.Thread(target=sign, daemon=True)
        thread.start()
        try:
            yield
        except Exception:
            self._give_up(claim.trial.number)
            raise
        finally:
            stop.set()
            thread.join()

    def finish(self, claim: Claim, outcome: dict[str, Any], values: list[float], shortfall: float) -> None:
        """Enter what was measured; `shortfall` is how far a trial stays from clearing the floor (negative: it does)."""
        # a worker that was taken for dead has lost the point to another; the records on disk are the same
        with suppress(optuna.exceptions.UpdateFinishedTrialError):
            claim.trial.set_user_attr("outcome", outcome)
            claim.trial.set_constraint("floor", shortfall)
            self._study.tell(claim.trial, values, skip_if_finished=True)

    def refuse(self, claim: Claim, reason: str) -> None:
        """The recipe cannot be applied at this point."""
        claim.trial.set_user_attr("refused", reason)
        self._give_up(claim.trial.number)

    def _give_up(self, number: int) -> None:
        with suppress(optuna.exceptions.UpdateFinishedTrialError):  # somebody else did at the same moment
            self._study.tell(number, state=TrialState.FAIL, skip_if_finished=True)

    def unmeasured(self, board: Board) -> Point | None:
        """A point drawn from those that nobody has measured or is measuring; None when there is none."""
        known = set(board.done) | board.busy | board.refused
        sizes = [len(one.values) for one in self.varied]
        total = 1
        for size in sizes:
            total *= size
        if len(known) >= total:
            return None
        draw = random.Random(f"{self.seed}/{len(known)}")
        while True:
            point = tuple(draw.choice(one.values) for one in self.varied)
            if point not in known:
                return point

    def _sampler(self, point: Point | None) -> optuna.samplers.BaseSampler:
        # seeded by what is there already: workers draw different points, and no random state is lost with one of them
        seed = random.Random(f"{self.seed}/{len(self._study.get_trials(deepcopy=False))}").randrange(1 << 31)
        if point is not None:
            fixed = {one.name: value for one, value in zip(self.varied, point, strict=True)}
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
                return optuna.samplers.PartialFixedSampler(fixed, optuna.samplers.RandomSampler(seed=seed))
        return optuna.samplers.TPESampler(seed=seed, n_startup_trials=STARTUP)

    def _point(self, trial: FrozenTrial | optuna.trial.Trial) -> Point | None:
        """The trial's point on the grid, None while it is being written."""
        if any(one.name not in trial.params for one in self.varied):
            return None
        return tuple(min(one.values, key=lambda v, one=one: abs(v - trial.params[one.name])) for one in self.varied)


def _open(url: str, name: str, more_is_better: Sequence[bool]) -> optuna.Study:
    directions: list[Any] = ["maximize" if more else "minimize" for more in more_is_better]

    def create() -> optuna.Study:
        options = {"connect_args": {"timeout": 60}} if url.startswith("sqlite") else {"pool_pre_ping": True}
        storage = optuna.storages.RDBStorage(url, engine_kwargs=options)
        return optuna.create_study(storage=storage, study_name=name, directions=directions, load_if_exists=True)

    return _patiently(create, url)


def _patiently(create: Callable[[], optuna.Study], url: str) -> optuna.Study:
    for attempt in range(5):
        try:
            return create()
        except Exception as error:  # every database driver raises its own
            if attempt == 4:
                reason = str(error).strip().splitlines()[0]
                raise OutputError(
                    f"storage {_without_password(url)}: cannot be used ({reason}): check the URL"
                ) from error
            time.sleep(0.2 * (attempt + 1))  # two workers creating the same tables: one of them fails
    raise AssertionError


def _without_password(url: str) -> str:
    head, at, tail = url.rpartition("@")
    return url if not at else f"{head.split('://')[0]}://...@{tail}"


def _distribution(one: Varied) -> BaseDistribution:
    if one.resolution is None:
        return CategoricalDistribution(one.values)
    low, high = min(one.values), max(one.values)
    if isinstance(low, int) and isinstance(high, int):
        return IntDistribution(low, high)
    steps = round((high - low) / one.resolution, 6)
    # a range that is no multiple of the resolution has no step: its points are rounded to the grid
    return FloatDistribution(low, high, step=one.resolution if steps.is_integer() else None)


def _counts(trial: FrozenTrial) -> bool:
    """Whether a trial holds its point: measured, or being measured by somebody alive."""
    alive = trial.state == TrialState.RUNNING and _silent_s(trial) <= DEAD_S
    return alive or trial.state == TrialState.COMPLETE


def _silent_s(trial: FrozenTrial) -> float:
    """Seconds since a running trial was last signed."""
    begun = 0.0 if trial.datetime_start is None else trial.datetime_start.timestamp()
    return time.time() - max(begun, trial.user_attrs.get("signed", 0.0))


def sqlite_url(path: Path) -> str:
    """The URL of a database file."""
    return f"sqlite:///{path.resolve()}"
