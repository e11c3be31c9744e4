"""Where ranks leave word for each other: values, and why one of them ends. It outlives what they compute with."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist
from torch.distributed.distributed_c10d import Store

from halve.errors import HalveError, first_line

LAST_WORDS_S = 2.0  # so long ranks wait for what others say of their end
_LOOKS_PER_S = 100


class RankLostError(HalveError):
    """Another rank is gone, or does not answer: the message says which and why."""


class RankBoard:
    """The key-value store of a job, seen by one rank. Nobody waits longer than `timeout_s`."""

    def __init__(self, store: Store, rank: int, size: int, timeout_s: float) -> None:
        self.rank, self.size, self.timeout_s = rank, size, timeout_s
        self._store = store
        self._gathered = 0

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, which JSON can hold, in the order of ranks. Raises RankLostError."""
        self._gathered += 1
        names = [f"value/{self._gathered}/{rank}" for rank in range(self.size)]
        with self.explained():
            self._store.set(names[self.rank], json.dumps(value))
            if not self._wait(lambda: self._store.check(names) or bool(self._ends()), self.timeout_s):
                raise TimeoutError("no answer")
            if not self._store.check(names):
                raise ConnectionError("a rank has ended")
            return [json.loads(self._store.get(name)) for name in names]

    def agree(self, facts: Mapping[str, str]) -> None:
        """HalveError, on all ranks, where one has other facts than the first; names the first that differ."""
        first, *others = self.gather(dict(facts))
        for rank, told in enumerate(others, 1):
            for name in first | told:
                if first.get(name) != told.get(name):
                    raise HalveError(
                        f"rank {rank} has another {name} than rank 0: start all ranks with the same files and options"
                    )

    def leave(self, reason: str, lost: bool) -> bool:
        """Say why this rank ends; lost: because of others. Whether nobody has to be told: rank 0 says the same."""
        try:
            self._store.set(f"end/{self.rank}", json.dumps({"reason": reason, "lost": lost}))
            self._wait(lambda: 0 in self._ends(), LAST_WORDS_S if self.rank else 0)
            return self.rank > 0 and self._ends().get(0, {}).get("reason") == reason
        except (RuntimeError, OSError):  # the store is gone as well
            return False

    @contextmanager
    def explained(self) -> Iterator[None]:
        """What fails in the block because others are gone becomes RankLostError, with what they said."""
        start = time.monotonic()
        try:
            yield
        except (RuntimeError, OSError) as error:
            late = time.monotonic() - start > 0.9 * self.timeout_s
            raise RankLostError(self._why(error, late)) from error

    def _why(self, error: Exception, late: bool) -> str:
        try:
            self._store.set(f"lost/{self.rank}", "")
            if dist.is_initialized():
                dist.destroy_process_group()  # so that who waits for this rank is told as well
            others = [rank for rank in range(self.size) if rank != self.rank]
            self._wait(lambda: self._culprit() is not None or not self._silent(others), LAST_WORDS_S)
            culprit, silent = self._culprit(), self._silent(others)
        except (RuntimeError, OSError):
            return "rank 0, where the ranks meet, ended without a word: killed, perhaps for memory"
        if culprit is not None:
            return f"rank {culprit[0]} ended: {culprit[1]}"
        if not silent:
            return f"the ranks have lost each other ({first_line(error)})"
        who = f"rank{'s' if len(silent) > 1 else ''} {', '.join(map(str, silent))}"
        if late:
            return f"{who} did not answer for {self.timeout_s:g} s: look what holds it up, or set HALVE_RANK_TIMEOUT_S higher"
        return f"{who} ended without a word: killed, perhaps for memory"

    def _culprit(self) -> tuple[int, str] | None:
        """The first rank that ended for a reason of its own, and the reason."""
        return next(((rank, end["reason"]) for rank, end in self._ends().items() if not end["lost"]), None)

    def _silent(self, ranks: list[int]) -> list[int]:
        """Those that have not said that they are lost."""
        return [rank for rank in ranks if not self._store.check([f"lost/{rank}"])]

    def _ends(self) -> dict[int, dict[str, Any]]:
        """What ranks said of their end."""
        said = [rank for rank in range(self.size) if self._store.check([f"end/{rank}"])]
        return {rank: json.loads(self._store.get(f"end/{rank}")) for rank in said}

    def _wait(self, there: Callable[[], bool], seconds: float) -> bool:
        """Whether something came to be there in time."""
        end = time.monotonic() + seconds
        while not (found := there()) and time.monotonic() < end:
            time.sleep(1 / _LOOKS_PER_S)
        return found
