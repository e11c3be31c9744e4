"""A process that dies in the middle, and several on one OUT at once: OUT is whole or as it was, and never a mixture."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from halve.errors import OutputError
from halve.files.work import WorkFolder

FILES = ("config.json", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


def model(folder: Path, tag: str) -> Path:
    """What counts as a model folder, every file marked with `tag`; files that are there stay."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in FILES:
        if not (folder / name).exists():
            (folder / name).write_text(json.dumps({"model_type": "llama", "tag": tag}))
    return folder


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def tags(folder: Path) -> set[str]:
    """The tags of all files of a folder that holds a whole model and nothing else."""
    assert names(folder) == sorted(FILES)
    return {json.loads((folder / name).read_text())["tag"] for name in FILES}


def run(out: Path | str, tag: str, overwrite: bool = False) -> None:
    """What a command does with OUT, the work itself left out."""
    work = WorkFolder(out, keep={}, overwrite=overwrite)
    with work.claim({"tag": tag}) as scratch:
        work.publish(model(scratch / "model", tag))


def dies_at(call: int, command: Callable[[], Any]) -> bool:
    """Run `command` in a process that dies before its n-th change of the file system; whether it came so far."""
    child = os.fork()
    if child == 0:
        count = 0

        def dying(original: Callable[..., Any]) -> Callable[..., Any]:
            def counted(*arguments: Any, **options: Any) -> Any:
                nonlocal count
                count += 1
                if count == call:
                    os._exit(9)
                return original(*arguments, **options)

            return counted

        for name in ("rename", "replace", "unlink", "rmdir", "mkdir"):
            setattr(os, name, dying(getattr(os, name)))
        try:
            command()
        except BaseException:
            os._exit(1)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, 9)
    return code == 9


@pytest.mark.parametrize("kind", ["new", "overwrite", "mount point"])
def test_a_kill_at_any_moment_leaves_old_or_new(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if kind == "mount point":
        monkeypatch.setattr(os.path, "ismount", lambda path: Path(path).name == "out")
    for call in range(1, 100):
        out = tmp_path / str(call) / "out"
        out.parent.mkdir()
        if kind == "overwrite":
            model(out, "old")
        elif kind == "mount point":
            out.mkdir()
        killed = dies_at(call, lambda out=out: run(out, "new", overwrite=kind == "overwrite"))
        replaced = out.parent / "out.partial" / "replaced"
        if kind == "overwrite":
            assert tags(out if out.exists() else replaced) in ({"old"}, {"new"})
        elif kind == "new":
            assert not out.exists() or tags(out) == {"new"}
        if not killed:
            assert call > 8 and tags(out) == {"new"} and names(out.parent) == ["out"]
            return
        # the same command makes it whole, and nothing is left beside it
        try:
            run(out, "new", overwrite=kind == "overwrite")
        except OutputError:  # it was published already, and what is there is not replaced unasked
            assert kind != "overwrite" and set(FILES) <= set(names(out))
            continue
        assert tags(out) == {"new"} and names(out.parent) == ["out"]
    raise AssertionError("never came to its end")


def test_threads_on_one_out_never_mix(tmp_path: Path) -> None:
    out = model(tmp_path / "out", "old")
    for number in range(15):
        failed: list[BaseException] = []
        start = threading.Barrier(3)

        def work(tag: str, start: threading.Barrier = start, failed: list[BaseException] = failed) -> None:
            start.wait()
            try:
                run(out, tag, overwrite=True)
            except BaseException as error:
                failed.append(error)

        threads = [threading.Thread(target=work, args=(f"{number}.{n}",)) for n in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert all(isinstance(one, OutputError) for one in failed), failed
        assert len(failed) < 3 and len(tags(out)) == 1 and names(tmp_path) == ["out"]


def test_processes_on_one_out_never_mix(tmp_path: Path) -> None:
    out = model(tmp_path / "out", "old")
    for number in range(10):
        children = []
        for n in range(3):
            child = os.fork()
            if child == 0:
                try:
                    run(out, f"{number}.{n}", overwrite=True)
                except OutputError:
                    os._exit(2)
                except BaseException:
                    os._exit(1)
                os._exit(0)
            children.append(child)
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        assert set(codes) <= {0, 2} and 0 in codes
        assert len(tags(out)) == 1 and names(tmp_path) == ["out"]


@pytest.mark.parametrize("kind", ["working directory", "mount point"])
def test_an_empty_folder_that_no_rename_replaces_is_filled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    out = tmp_path / "out"
    (out / "lost+found").mkdir(parents=True)
    node = out.stat().st_ino
    if kind == "mount point":
        monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == out)
        run(out, "new")
    else:
        monkeypatch.chdir(out)
        run(".", "new")
    assert names(out) == sorted([*FILES, "lost+found"]) and out.stat().st_ino == node
    with pytest.raises(OutputError, match="mount point" if kind == "mount point" else "is the working directory"):
        run(out, "newer", overwrite=True)
