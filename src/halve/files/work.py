"""A folder made beside OUT, which gets its name when it is complete."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

from halve.errors import OutputError
from halve.files import Lease, check_disk, read_object, resolve_out
from halve.files.contents import (
    OTHERWISE,
    OWNER,
    PASSED_OVER,
    all_ours,
    delete,
    holds_one_of,
    is_scratch,
    real_places,
    why_not_a_model,
)
from halve.files.identity import differences

_REPLACED = "replaced"
_LEASE = {f"{OWNER}.json", f"{OWNER}.lock"}


def is_scratch_name(name: str) -> bool:
    """Whether a folder of this name holds unfinished work."""
    return re.search(r"\.partial(-\d+)?$", name) is not None


class WorkFolder:
    """OUT made whole in a scratch folder beside it, OUT.partial, and published by a rename.

    keep: what the command reads, by its name in words; it is never deleted, whatever OUT is. OUT that is there and empty
    but cannot be renamed over (a mount point, the working directory, a parent that is read-only) is worked in and
    published into by moving the files. Raises OutputError when OUT cannot be used; nothing is written before `claim`.
    """

    def __init__(
        self,
        out: str | os.PathLike[str],
        *,
        keep: Mapping[str, str | os.PathLike[str] | None],
        overwrite: bool = False,
        needs_bytes: int = 0,
    ) -> None:
        self.out = resolve_out(out)
        self._overwrite = overwrite
        self._keep = real_places(keep)
        for parent in self.out.parents:
            if is_scratch(parent):
                raise OutputError(f"{out}: lies in {parent}, an unfinished run of another command: {OTHERWISE}")
        existing = next(p for p in self.out.parents if p.exists())
        self._inside = self.out.is_dir() and (
            os.path.ismount(self.out)
            or self.out == Path(os.getcwd()).resolve()
            or not os.access(existing, os.W_OK)
            or any(is_scratch(path) for path in self.out.glob(".halve.partial*"))
        )
        self._base, self._stem = (self.out, ".halve") if self._inside else (self.out.parent, self.out.name)
        try:
            self._check_content()
        except OSError as error:
            reason = "changed while it was looked at" if isinstance(error, FileNotFoundError) else str(error.strerror)
            raise OutputError(f"{self.out}: cannot be looked into ({reason}): try again, or {OTHERWISE}") from error
        check_disk(self.out if self._inside else existing, needs_bytes)

    def _check_content(self) -> None:
        """Raise OutputError unless OUT is new or empty, or is to be replaced and may be."""
        content = self._content()
        if not content:
            return
        reason = holds_one_of(self._keep, self.out)
        if reason is None and self._inside:
            reason = (
                "exists and is not empty, and a mount point, a working directory or what lies in a read-only folder "
                "cannot be replaced"
            )
        reason = reason or why_not_a_model(self.out)
        if reason is not None:
            raise OutputError(f"{self.out}: {reason}: {OTHERWISE}")
        if not self._overwrite:
            raise OutputError(f"{self.out}: exists and is not empty: {OTHERWISE}, or replace it with --overwrite")

    def _content(self) -> list[Path]:
        """What OUT holds, an interrupted publication of ours aside."""
        entries = list(self.out.iterdir()) if self.out.is_dir() else []
        if not self._inside:
            return entries
        entries = [e for e in entries if not PASSED_OVER.fullmatch(e.name)]
        scratch = [e for e in entries if e.name.startswith(".halve.partial") and is_scratch(e)]
        moved = [(read_object(e / f"{OWNER}.json") or {}).get("moved", {}) for e in scratch]
        return [e for e in entries if e not in scratch and not any(m.get(e.name) == e.lstat().st_ino for m in moved)]

    @contextmanager
    def claim(self, identity: Any, *, resume: bool = True) -> Iterator[Path]:
        """The scratch folder, ours while the context lasts: new, or left by an interrupted run of the same `identity`.

        It stays when the context ends unpublished. Without `resume` it is always begun anew. Raises OutputError when
        another process is at work in it, or it is another request's and nothing says to overwrite.
        """
        self._identity = json.loads(json.dumps(identity))
        try:
            self._base.mkdir(parents=True, exist_ok=True)
            while not self._take(resume):
                pass
        except OSError as error:
            raise OutputError(f"{self.out}: cannot be made ({error.strerror or error}): {OTHERWISE}") from error
        try:
            self._check_content()  # again, now that no other run works for this OUT
            self._seen = _snapshot(self.out)
            yield self.scratch
        finally:
            # once given up, its name may be another process's
            if self._ours and {e.name for e in self.scratch.iterdir()} <= _LEASE:
                self._discard()
            self._lease.release()

    def _take(self, resume: bool) -> bool:
        """Make or adopt the first scratch folder whose name is free or ours; False when it was lost to another process."""
        for number in range(1, 1000):
            scratch = self._base / f"{self._stem}.partial{'' if number == 1 else f'-{number}'}"
            if not os.path.lexists(scratch):
                return self._make(scratch)
            if is_scratch(scratch) and holds_one_of(self._keep, scratch) is None:
                adopted = self._adopt(scratch, resume)
                if adopted is not None:
                    return adopted
            elif not os.path.lexists(scratch):
                return False  # finished and gone at this moment: its name, not the next, is the one to take
        raise OutputError(f"{self._base}: has 999 folders named {self._stem}.partial-*: move them elsewhere")

    def _make(self, scratch: Path) -> bool:
        """Lock and mark first, then the name: a folder of this name without a mark is never ours."""
        self._clean_up()
        fresh = scratch.with_name(f".halve-{uuid4().hex}")
        fresh.mkdir()
        lease = Lease(fresh, OWNER)
        try:
            if not lease.take():  # another process takes it for what a kill has left
                return False
            lease.sign(identity=self._identity)
            fresh.rename(scratch)
        except (OSError, OutputError):
            lost = scratch.is_dir() or not fresh.is_dir()  # to another process: it is tried again
            shutil.rmtree(fresh, ignore_errors=True)
            lease.release()
            if not lost:
                raise
            return False
        lease.mark = scratch / lease.mark.name
        self.scratch, self._lease, self._ours = scratch, lease, True
        return True

    def _clean_up(self) -> None:
        """Delete what a kill has left of scratch folders that did not have their name yet."""
        for left in self._base.glob(".halve-*"):
            with suppress(OSError):
                inner = {e.name for e in left.iterdir()} - _LEASE
                if not all(PASSED_OVER.fullmatch(name) for name in (left.name, *inner)):
                    continue
                lease = Lease(left, OWNER)
                if lease.take():
                    shutil.rmtree(left)
                    lease.release()

    def _adopt(self, scratch: Path, resume: bool) -> bool | None:
        """Take over a scratch folder; False when it is gone, None when somebody else has put something into it."""
        lease = Lease(scratch, OWNER)
        try:
            if not lease.take():
                raise OutputError(f"{scratch}: in use by {lease.holder()}: wait for it, or {OTHERWISE}")
        except FileNotFoundError:
            return False  # finished and gone at this moment
        mark = read_object(lease.mark)
        if mark is not None and not all_ours(scratch):
            lease.release()
            return None
        self.scratch, self._lease, self._ours = scratch, lease, mark is not None
        if mark is not None and self._was_published(mark):
            self._discard()
        elif mark is not None:
            self._begin(mark, resume)
            return True
        lease.release()  # without a mark: finished and gone at this moment
        return False

    def _begin(self, mark: dict[str, Any], resume: bool) -> None:
        """Take over what is in the scratch folder, or begin anew in it."""
        if mark.get("identity") != self._identity or not resume:
            if resume and not self._overwrite:
                self._lease.release()
                changed = differences(mark.get("identity"), self._identity)
                raise OutputError(
                    f"{self.scratch}: holds an unfinished run of another request ({changed}): begin anew with "
                    f"--overwrite, finish it by that request, or {OTHERWISE}"
                )
            self.empty()
        self._lease.sign(identity=self._identity)

    def _was_published(self, mark: dict[str, Any]) -> bool:
        """Undo a publication that was cut off, unless nothing but cleaning up was left."""
        if "publishing" not in mark:
            return False
        folder, replaced = self.scratch / mark["publishing"], self.scratch / _REPLACED
        if not folder.exists():
            return True
        for name, inode in mark.get("moved", {}).items():
            place = self.out / name
            if os.path.lexists(place) and place.lstat().st_ino == inode:
                place.rename(folder / name)
        if replaced.exists() and not self.out.exists():
            replaced.rename(self.out)
        return False

    def publish(self, folder: Path) -> None:
        """Give the finished `folder`, inside the scratch folder, the name OUT; what was there before goes only then.

        OUT is looked at again: what came into being or changed while the work ran is not touched. Raises OutputError that
        says where the result is.
        """
        try:
            if self._content() and _snapshot(self.out) != self._seen:
                raise OutputError(f"{self.out}: came into being or was changed while this ran, so it is not replaced")
            self._check_content()
            # what a reader looks for first comes last
            names = sorted((e.name for e in folder.iterdir()), key=lambda name: (name == "config.json", name))
            moved = {name: (folder / name).lstat().st_ino for name in names} if self._inside else {}
            self._lease.sign(identity=self._identity, publishing=folder.name, moved=moved)
            if self._inside:
                for name in names:
                    (folder / name).rename(self.out / name)
                folder.rmdir()
            else:
                self._swap(folder)
        except OSError as error:
            raise OutputError(f"{self.out}: could not be put in place ({error}): the result is in {folder}") from error
        except OutputError as error:
            raise OutputError(f"{error}; the result is in {folder}") from error
        self._discard()

    def _swap(self, folder: Path) -> None:
        replaced = self.scratch / _REPLACED
        try:
            if self._content():
                self.out.rename(replaced)
                if _snapshot(replaced) != self._seen:  # seen again where nobody else looks for it
                    raise OutputError(f"{self.out}: was changed at this moment, so it is not replaced")
            folder.rename(self.out)  # fails where anything but an empty folder has come into being
        except (OSError, OutputError):
            if replaced.exists():
                replaced.rename(self.out)
            raise

    def empty(self) -> None:
        """Delete the unfinished work."""
        for entry in self.scratch.iterdir():
            if entry.name not in _LEASE:
                delete(entry)

    def _discard(self) -> None:
        """Delete the scratch folder, or give it up where somebody else has put something into it."""
        self._ours = False
        with suppress(OSError):
            if not all_ours(self.scratch):
                self._lease.remove()
                return
            self.empty()
            # in one step, mark and all: what a kill leaves from here on is cleaned up by the next run
            gone = self.scratch.rename(self.scratch.with_name(f".halve-{uuid4().hex}"))
            shutil.rmtree(gone)


def _snapshot(folder: Path) -> Any:
    """What tells whether a folder is still the same one and holds the same; None where there is none."""
    if not folder.is_dir():
        return None
    stats = ((e.name, e.lstat()) for e in folder.iterdir())
    return folder.stat().st_ino, sorted((name, s.st_ino, s.st_size, s.st_mtime_ns) for name, s in stats)
