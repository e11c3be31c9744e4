"""What a run is made from, told by content: the SHA-256 of files, and in words what differs between two runs.

An identity is a JSON object: of files their names and hashes, of options their values. A run goes on with what another
one left only where all of it is equal.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any, BinaryIO

from halve.errors import HalveError, OutputError
from halve.files import read_object, write_json
from halve.progress import Advance, progress

_LARGE = (
    16 << 20
)  # bytes; the hash of a file as large as this is kept, smaller ones are read whenever they are asked for
_SHOWN = 1 << 30  # bytes that take long enough for a bar
_BLOCK = 1 << 20
_SETTLED_NS = 2_000_000_000  # a file changed as shortly ago as this may change again under the same time stamp
_SHA256 = re.compile("[0-9a-f]{64}")
_MOST = 4  # differences that are named
_LONGEST = 60  # characters of a value that are shown


def hash_files(files: Mapping[str, Path]) -> dict[str, str]:
    """The SHA-256 of each file, in hexadecimal, under the name given to it.

    Of a large file it is kept in the user's cache folder and taken from there while path, inode, size and the times of the
    last change of content and of inode (in ns) are what they were. Raises HalveError for a file that cannot be read.
    """
    hashes = {}
    try:
        total = sum(path.stat().st_size for path in files.values())
        shown = progress("check files (MB)", total / 1e6) if total >= _SHOWN else nullcontext(lambda _: None)
        with shown as advance:
            for name, path in sorted(files.items()):
                hashes[name] = _hash(path, advance)
    except OSError as error:
        raise HalveError(f"{error.filename}: cannot be read ({error.strerror}): check its permissions") from error
    return hashes


def hash_text(*parts: str) -> str:
    """The SHA-256 of texts, in hexadecimal; where one ends and the next begins counts."""
    digest = hashlib.sha256()
    for part in parts:
        content = part.encode("utf-8", "surrogatepass")
        digest.update(b"%d\n" % len(content) + content)
    return digest.hexdigest()


def _hash(path: Path, advance: Advance) -> str:
    with path.open("rb") as file:
        stamp = _stamp(file)
        if stamp["size"] < _LARGE:
            return _digest(file, advance)
        place = _cache() / f"{hash_text(os.path.realpath(path))}.json"
        kept = read_object(place) or {}
        if kept.get("file") == stamp and _SHA256.fullmatch(str(kept.get("sha256"))):
            advance(stamp["size"] / 1e6)
            return kept["sha256"]
        settled = max(stamp["mtime_ns"], stamp["ctime_ns"]) < time.time_ns() - _SETTLED_NS
        digest = _digest(file, advance)
        if settled and _stamp(file) == stamp:
            with suppress(OSError, OutputError):  # without a place to keep it, it is computed again
                place.parent.mkdir(parents=True, exist_ok=True)
                _forget_files_that_are_gone(place.parent)
                write_json(place, {"path": os.path.realpath(path), "file": stamp, "sha256": digest})
    return digest


def _forget_files_that_are_gone(cache: Path) -> None:
    for mark in cache.glob("*.json"):
        if not os.path.exists((read_object(mark) or {}).get("path", "")):
            mark.unlink(missing_ok=True)


def _stamp(file: BinaryIO) -> dict[str, int]:
    # the time of the inode's last change is the one that no program can set back
    stat = os.fstat(file.fileno())
    return {"inode": stat.st_ino, "size": stat.st_size, "mtime_ns": stat.st_mtime_ns, "ctime_ns": stat.st_ctime_ns}


def _digest(file: BinaryIO, advance: Advance) -> str:
    digest, block = hashlib.sha256(), bytearray(_BLOCK)
    while count := file.readinto(block):  # type: ignore[attr-defined]
        digest.update(memoryview(block)[:count])
        advance(count / 1e6)
    return digest.hexdigest()


def _cache() -> Path:
    """Where hashes are kept; for a user without a home a place that is not there and cannot be made."""
    asked = os.environ.get("XDG_CACHE_HOME", "")
    try:
        folder = Path(asked) if os.path.isabs(asked) else Path("~/.cache").expanduser()
    except RuntimeError:
        folder = Path(os.devnull)
    return folder / "halve" / "sha256"


def differences(earlier: Any, now: Any) -> str:
    """What makes `now` another identity than `earlier`, in words: the options, then the files, by name. Empty where nothing
    does."""
    found = sorted(_differences("", earlier, now), key=lambda words: " was " not in words)
    return "; ".join(found[:_MOST]) + (f"; and {len(found) - _MOST} more" if len(found) > _MOST else "")


def _differences(name: str, earlier: Any, now: Any) -> Iterator[str]:
    if earlier == now:
        return
    if isinstance(earlier, dict) and isinstance(now, dict):
        for key in dict.fromkeys([*now, *earlier]):
            inner = f"{name}/{key}" if name else str(key)
            if key not in earlier or key not in now:
                yield f"{inner} is {'new' if key in now else 'gone'}"
            else:
                yield from _differences(inner, earlier[key], now[key])
    elif isinstance(earlier, list) and isinstance(now, list) and len(earlier) == len(now):
        for number, pair in enumerate(zip(earlier, now, strict=True), 1):
            yield from _differences(f"{name}/{number}", *pair)
    elif all(isinstance(value, str) and _SHA256.fullmatch(value) for value in (earlier, now)):
        yield f"{name} has another content"
    else:
        yield f"{name} was {_shown(earlier)} and is {_shown(now)}"


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= _LONGEST else text[: _LONGEST - 3] + "..."
