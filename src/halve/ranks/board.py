"""Where ranks leave word for each other: values, and why one of them ends. It outlives what they compute with."""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.distributed.distributed_c10d import Store

from halve.errors import HalveError, first_line

LAST_WORDS_S = 10.0  # so long at most ranks wait for what others say of their end
_SPEAKING_S = 1.0
_LOOKS_PER_S = 100


class RankLostError(HalveError):
    """Another rank is gone, or does not answer: the message says which and why."""


class RankBoard:
    """The key-value store of a job, seen by one rank. Nobody waits longer than `timeout_s`."""

    def __init__(self, store: Store, rank: int, size: int, timeout_s: float) -> None:
        self.rank, self.size, self.timeout_s = rank, size, timeout_s
        self._store = store
        self._gathered = 0
        store.set(f"process/{rank}", f"{platform.node()} {os.getpid()}")

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
            _leave_group()
            if self.rank == 0:
                return False
            self._wait(lambda: 0 in self._ends() or self._gone(0), LAST_WORDS_S)
            told = self._ends().get(0, {}).get("reason") == reason
            if told:
                time.sleep(_SPEAKING_S)  # the launcher ends all ranks when the first one ends: rank 0 is to be heard
            return told
        except (RuntimeError, OSError):  # the store is gone as well
            return False

    @contextmanager
    def explained(self) -> Iterator[None]:
        """What fails in the block because others are gone becomes RankLostError, with what they said."""
        start = time.monotonic()
        try:
            yield
        except (RuntimeError, OSError) as error:
            raise self.lost(error, time.monotonic() - start) from error

    def lost(self, error: Exception, waited_s: float) -> RankLostError:
        """What there is to say of an error that others' end brought, or of having waited too long."""
        return RankLostError(self._why(error, waited_s > 0.9 * self.timeout_s))

    def has_ended(self) -> bool:
        """Whether any other rank is known to have."""
        others = [rank for rank in range(self.size) if rank != self.rank]
        return bool(self._ends()) or any(map(self._gone, others))

    def _why(self, error: Exception, late: bool) -> str:
        try:
            self._store.set(f"lost/{self.rank}", "")
            _leave_group()
            self._wait(lambda: self._culprit() is not None or all(map(self._gone, self._silent())), LAST_WORDS_S)
            culprit, silent = self._culprit(), self._silent()
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

    def _silent(self) -> list[int]:
        """The ranks that have not said that they are lost."""
        return [rank for rank in range(self.size) if not self._store.check([f"lost/{rank}"])]

    def _gone(self, rank: int) -> bool:
        """Whether the process of a rank on this machine is known to have ended; of another machine nothing is known."""
        if not self._store.check([f"process/{rank}"]):
            return False
        machine, process = self._store.get(f"process/{rank}").decode().rsplit(" ", 1)
        if machine != platform.node() or not Path("/proc/self/stat").exists():
            return False
        try:
            status = Path(f"/proc/{process}/stat").read_text(encoding="utf-8", errors="replace")
        except OSError:
            return True
        return status.rpartition(")")[2].split()[0] in ("Z", "X")  # behind the name: a state; these are ended processes

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


def _leave_group() -> None:
    """Close what this rank computes with others by, so that who waits for it is told."""
    if dist.is_initialized():
        dist.destroy_process_group()
