"""Written whole or not at all: single files here, output folders in `work.py` and `study.py`, claimed and published there."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import uuid4

from halve._version import __version__
from halve.errors import OutputError
from halve.files.typed import finite, parse_json


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary file beside `path`, to be written in the context, that takes its name when the context ends well.

    A link stays, and what it points to is replaced. Raises OutputError; nothing is left then.
    """
    target = Path(os.path.realpath(path))
    temporary = target.with_name(f".{uuid4().hex}.tmp")
    try:
        yield temporary
        os.replace(temporary, target)
    except OSError as error:
        reason = error.strerror or str(error)
        raise OutputError(f"{path} cannot be written ({reason}): free space or choose another place") from error
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all (see `replacing`)."""
    with replacing(path) as temporary, temporary.open("x", encoding="utf-8") as file:
        file.write(text)


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file whole or not at all; a number that is not finite becomes null, any character can be read back."""
    write_text(path, json.dumps(finite(value), indent=2, allow_nan=False) + "\n")


def read_object(path: Path) -> dict[str, Any] | None:
    """The JSON object in a file; None where there is none."""
    try:
        value = parse_json(path)
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def check_output_path(path: str | os.PathLike[str], what: str, ours: Callable[[Path], bool]) -> Path:
    """Find out before any work whether a file can be written at `path`, `~` expanded; raises OutputError.

    What is there already is replaced only when it is empty, or `ours` says that it is `what` ("a record") halve writes.
    """
    path = Path(os.path.expanduser(path))
    if path.is_dir():
        raise OutputError(f"{path} is a folder: name a file inside it")
    if not path.parent.is_dir():
        raise OutputError(f"{path} cannot be written, there is no folder {path.parent}: create it first")
    if not os.access(path.parent, os.W_OK):
        raise OutputError(f"{path} cannot be written, {path.parent} is not writable: choose another folder")
    if path.is_file() and path.stat().st_size and not ours(path):
        raise OutputError(f"{path} exists and is not {what} that halve wrote, so it is not replaced: name another file")
    return path


def check_disk(place: Path, needs_bytes: int) -> None:
    """Raise OutputError unless a folder can be written to and its disk has room for so many bytes."""
    if not place.is_dir() or not os.access(place, os.W_OK):
        raise OutputError(f"{place}: cannot be written to: choose another place for OUT")
    free, needed = shutil.disk_usage(place).free, int(needs_bytes * 1.01)
    if free < needed:
        raise OutputError(
            f"{place}: the disk has {free:,} bytes free and this needs {needed:,}: "
            "free some space or choose another disk for OUT"
        )


def resolve_out(out: str | os.PathLike[str]) -> Path:
    """Where a folder named `out` really lies: `~` expanded, links followed, so that a link stays and its target is filled.

    A dangling link is served by making its target, in a folder that is there. Raises OutputError for a file, `/`, links in
    a circle, a link into a folder that is missing (a disk that is not mounted), and a name the system does not take.
    """
    try:
        asked = Path(out).expanduser()
        path = asked.resolve()
        reason = None
        if path.is_symlink():
            reason = "is a link that leads in a circle"
        elif (asked.is_symlink() and not path.parent.is_dir()) or any(
            p.is_symlink() and not p.exists() for p in asked.parents
        ):
            reason = f"is or lies in a link to a place that is not there ({path}): make or mount that first"
        elif path.exists() and not path.is_dir():
            reason = "is a file"
        elif path == Path(path.anchor):
            reason = "is the root of the file system"
    except (OSError, RuntimeError, ValueError) as error:
        reason = f"cannot be the name of a folder here ({getattr(error, 'strerror', None) or error})"
    if reason is not None:
        raise OutputError(f"{out}: {reason}: choose another folder")
    return path


class Lease:
    """The lock `name`.lock, held while something in `folder` is in use, and the mark `name`.json that says by whom."""

    def __init__(self, folder: Path, name: str) -> None:
        self.mark = folder / f"{name}.json"
        self._path = folder / f"{name}.lock"
        self._file: int | None = None

    def take(self) -> bool:
        """Whether the lock is ours now. Raises FileNotFoundError when the folder is gone, or is just going.

        Not by `filelock`, which makes a folder that is missing: that of somebody who has just finished.
        """
        file = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(file).st_nlink == 0:
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(self._path))
        except BlockingIOError:
            os.close(file)
            return False
        except OSError as error:
            os.close(file)
            if error.errno in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                raise OutputError(f"{self.mark.parent}: its file system has no locks: choose another folder") from error
            raise
        self._file = file
        return True

    def sign(self, **content: Any) -> None:
        since = datetime.now(UTC).isoformat(timespec="seconds")
        who = {"program": f"halve {__version__}", "pid": os.getpid(), "host": socket.gethostname(), "since": since}
        write_json(self.mark, who | content)

    def holder(self) -> str:
        mark = read_object(self.mark) or {}
        return "process {} on {} since {}".format(*(mark.get(key, "?") for key in ("pid", "host", "since")))

    def release(self) -> None:
        """Give the lock back; nothing happens where it was not ours."""
        if self._file is not None:
            fcntl.flock(self._file, fcntl.LOCK_UN)  # closing alone leaves it to processes forked meanwhile
            os.close(self._file)
            self._file = None

    def remove(self) -> None:
        """The mark first: without it the lock's file means nothing."""
        self.mark.unlink(missing_ok=True)
        self._path.unlink(missing_ok=True)
