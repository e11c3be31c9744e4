"""A folder that a study fills in place, alone or with other workers."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

from filelock import FileLock

from halve.errors import OutputError
from halve.files import Lease, read_object, resolve_out, write_json
from halve.files.contents import (
    MODEL_FILES,
    OTHERWISE,
    PASSED_OVER,
    delete,
    first_foreign,
    holding,
    holds_one_of,
    real_places,
    why_not_a_model,
)
from halve.files.identity import differences

_REQUEST, _GUARD = "request.json", ".request.lock"
_STUDY = "request.json report.html .*.lock .worker-*.json owner.lock .????????????????????????????????.tmp".split()


class StudyFolder:
    """OUT filled in place: its request.json says by what request, and the same request again goes on.

    A request is an identity (`identity.py`) that names the "study" it is for. own: names of all that the study writes there,
    beside records ("trials/" for a folder). alone: one process at a time. keep, overwrite: as for a `WorkFolder`; what is
    replaced is a model, or an earlier study of the same kind. Raises OutputError when OUT cannot be used.
    """

    def __init__(
        self,
        out: str | os.PathLike[str],
        own: Sequence[str],
        *,
        keep: Mapping[str, str | os.PathLike[str] | None],
        overwrite: bool = False,
        alone: bool = True,
    ) -> None:
        self.out = resolve_out(out)
        self._own = own
        self._overwrite = overwrite
        self._alone = alone
        self._keep = real_places(keep)

    @contextmanager
    def claim(self, identity: Any, *, resume: bool = True) -> Iterator[Path]:
        """OUT, ours while the context lasts; without `resume` what is there is never gone on with."""
        wanted = json.loads(json.dumps(identity))
        try:
            self._check(wanted, resume)  # before even a lock is written into a folder that is not ours
            self.out.mkdir(parents=True, exist_ok=True)
            with FileLock(self.out / _GUARD, timeout=60):
                again = self._check(wanted, resume)
                workers = self._workers()
                if workers and (self._alone or not again):
                    raise OutputError(f"{self.out}: in use by {workers[0]}: wait for it, or {OTHERWISE}")
                if not again:
                    self._clear()
                    write_json(self.out / _REQUEST, wanted)
                lease = Lease(self.out, f".worker-{uuid4().hex}")
                lease.take()
                lease.sign()
        except OSError as error:
            raise OutputError(f"{self.out}: cannot be written ({error.strerror or error}): {OTHERWISE}") from error
        try:
            yield self.out
        finally:
            with suppress(OSError):
                lease.remove()
            lease.release()

    def _check(self, identity: dict[str, Any], resume: bool) -> bool:
        """Whether OUT is this very request's; raises OutputError where something is there that has to stay."""
        earlier = read_object(self.out / _REQUEST)
        if earlier == identity and resume:
            return True
        content = [e.name for e in self.out.iterdir() if not PASSED_OVER.fullmatch(e.name)] if self.out.is_dir() else []
        if not content:
            return False
        reason = holds_one_of(self._keep, self.out)
        what = "exists and is not empty"
        if reason is None and earlier is not None and earlier.get("study") == identity["study"]:
            what = what if earlier == identity else f"was begun by another request ({differences(earlier, identity)})"
            foreign = first_foreign(self.out, [*self._own, *_STUDY], [*_STUDY, *MODEL_FILES])
            reason = None if foreign is None else f"{what}, and {holding(self.out, foreign)}"
        elif reason is None:
            reason = why_not_a_model(self.out)
        if reason is not None:
            raise OutputError(f"{self.out}: {reason}: {OTHERWISE}")
        if not self._overwrite:
            raise OutputError(f"{self.out}: {what}: {OTHERWISE}, or replace it with --overwrite")
        return False

    def _workers(self) -> list[str]:
        """Who is at work here, in words; the marks of those that died are taken away."""
        holders = []
        for mark in self.out.glob(".worker-*.json"):
            lease = Lease(self.out, mark.stem)
            with suppress(FileNotFoundError):  # it ends at this moment
                if not lease.take():
                    holders.append(lease.holder())
                    continue
                lease.remove()
                lease.release()
        return holders

    def _clear(self) -> None:
        """Empty the folder; what says that it may be emptied goes last."""
        entries = [e for e in self.out.iterdir() if e.name not in (_GUARD, "lost+found")]
        for entry in sorted(entries, key=lambda e: e.name in (_REQUEST, "config.json", "halve.json")):
            delete(entry)
