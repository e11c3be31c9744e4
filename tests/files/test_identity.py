"""Hashes of files: never those of another content, kept for large ones only, whatever has become of the place they are kept."""

from __future__ import annotations

import hashlib
import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from halve.errors import HalveError
from halve.files import identity
from halve.files.identity import differences, hash_files, hash_text


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where hashes are kept; files of 10 bytes are large, and settled at once."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(identity, "_LARGE", 10)
    monkeypatch.setattr(identity, "_SETTLED_NS", -1)
    return tmp_path / "cache" / "halve" / "sha256"


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def rewrite(path: Path, content: str) -> None:
    """Another content of the same size in the same inode, the time of the last change set back."""
    before = path.stat()
    time.sleep(0.02)  # file systems count in ticks
    path.write_text(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)


@pytest.mark.parametrize("size", [0, 9, 10, (1 << 20) + 3])
def test_a_hash_is_that_of_the_content(kept: Path, tmp_path: Path, size: int) -> None:
    file = tmp_path / "file"
    file.write_bytes(os.urandom(size))
    for _ in range(2):
        assert hash_files({"a": file, "b/c": file}) == {"a": sha256(file), "b/c": sha256(file)}
    assert len(list(kept.glob("*"))) == (size >= 10)


def test_a_large_file_is_read_once(kept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "weights"
    file.write_text("0123456789")
    (tmp_path / "link").symlink_to(file)
    first = hash_files({"": file})
    monkeypatch.setattr(identity, "_digest", lambda *_: pytest.fail("read again"))
    assert hash_files({"": tmp_path / "link"}) == first


def test_files_that_are_gone_are_forgotten(kept: Path, tmp_path: Path) -> None:
    files = {name: tmp_path / name for name in "abc"}
    for file in files.values():
        file.write_text("0123456789")
    hash_files({"a": files["a"], "b": files["b"]})
    files["a"].unlink()
    hash_files({"c": files["c"]})
    assert sorted(json.loads(mark.read_text())["path"][-1] for mark in kept.iterdir()) == ["b", "c"]


@pytest.mark.parametrize("large", [True, False])
def test_size_and_time_set_back_hide_no_other_content(kept: Path, tmp_path: Path, large: bool) -> None:
    file = tmp_path / "weights"
    file.write_text("01234567890"[: 11 if large else 9])
    before = hash_files({"": file})
    rewrite(file, "abcdefghijk"[: 11 if large else 9])
    assert hash_files({"": file}) == {"": sha256(file)} != before


def test_the_hash_of_a_file_that_may_still_change_is_not_kept(
    kept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(identity, "_SETTLED_NS", 60_000_000_000)
    file = tmp_path / "weights"
    file.write_text("0123456789")
    assert hash_files({"": file}) == {"": sha256(file)} and not kept.exists()


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "null", '{"file": 1, "sha256": 2}', '{"sha256": "' + "0" * 64 + '"}', b"\xff"]
)
def test_what_is_kept_may_be_spoilt(kept: Path, tmp_path: Path, content: str | bytes) -> None:
    file = tmp_path / "weights"
    file.write_text("0123456789")
    hash_files({"": file})
    (mark,) = kept.iterdir()
    mark.write_bytes(content.encode() if isinstance(content, str) else content)
    assert hash_files({"": file}) == {"": sha256(file)}
    assert json.loads(mark.read_text())["sha256"] == sha256(file)


@pytest.mark.parametrize("spoilt", ["a file", "read-only", "no home"])
def test_without_a_place_to_keep_them_hashes_are_made_anew(
    kept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spoilt: str
) -> None:
    file = tmp_path / "weights"
    file.write_text("0123456789")
    if spoilt == "a file":
        (tmp_path / "cache").write_text("")
    elif spoilt == "read-only":
        (tmp_path / "cache").mkdir(mode=0o500)
    else:
        monkeypatch.setenv("XDG_CACHE_HOME", "relative")
        monkeypatch.setattr(Path, "expanduser", lambda self: (_ for _ in ()).throw(RuntimeError("no home")))
        monkeypatch.chdir(tmp_path)
    assert hash_files({"": file}) == {"": sha256(file)}


def test_many_writers_at_once(kept: Path, tmp_path: Path) -> None:
    files = {str(n): tmp_path / str(n) for n in range(4)}
    for name, file in files.items():
        file.write_text(name * 5000)
    right = {name: sha256(file) for name, file in files.items()}
    with ThreadPoolExecutor(8) as pool:
        assert all(found == right for found in pool.map(lambda _: hash_files(files), range(40)))
    assert sorted(json.loads(mark.read_text())["sha256"] for mark in kept.iterdir()) == sorted(right.values())


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(HalveError, match=r"none\.safetensors: cannot be read \(No such file"):
        hash_files({"": tmp_path / "none.safetensors"})


def test_texts_are_told_apart_by_where_they_end() -> None:
    assert len({hash_text("ab", "c"), hash_text("a", "bc"), hash_text("abc"), hash_text("abc", ""), hash_text()}) == 5
    assert hash_text("\ud83d") != hash_text("\ud83e")


A, B = "a" * 64, "b" * 64


@pytest.mark.parametrize(
    ("earlier", "now", "words"),
    [
        ({"x": 1, "y": [1, {"z": None}]}, {"y": [1, {"z": None}], "x": 1}, ""),
        ({"model": {"config.json": A}}, {"model": {"config.json": B}}, "model/config.json has another content"),
        ({"model": {"a": A}}, {"model": {"b": A}}, "model/b is new; model/a is gone"),
        ({"samples": 4}, {"samples": 8}, "samples was 4 and is 8"),
        ({"s": [{"bits": 4}, 1]}, {"s": [{"bits": 8}, 1]}, "s/1/bits was 4 and is 8"),
        ({"f": {"a": A}, "o": 1}, {"f": {"a": B}, "o": 2}, "o was 1 and is 2; f/a has another content"),
        ({"s": ["rtn"]}, {"s": ["rtn", "l1"]}, 's was ["rtn"] and is ["rtn", "l1"]'),
        ({"x": A}, {"x": "word"}, f'x was "{A[:56]}... and is "word"'),
        ({n: 1 for n in "abcdef"}, {}, "a is gone; b is gone; c is gone; d is gone; and 2 more"),
    ],
)  # fmt: skip
def test_differences_in_words(earlier: dict, now: dict, words: str) -> None:
    assert differences(earlier, now) == words
