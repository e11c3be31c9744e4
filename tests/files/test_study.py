"""Workers in a study's folder: shared or alone, and what those that died leave."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from halve.errors import OutputError
from halve.files.study import StudyFolder

FIRST, SECOND = {"study": "toy", "seed": 1}, {"study": "toy", "seed": 2}


def study(out: Path, alone: bool = True, overwrite: bool = False, **keep: Any) -> StudyFolder:
    return StudyFolder(out, ("trials/",), keep=keep, overwrite=overwrite, alone=alone)


@pytest.mark.parametrize("alone", [True, False])
def test_workers_at_once(tmp_path: Path, alone: bool) -> None:
    out, used = tmp_path / "out", rf"in use by process {os.getpid()} on \S+ since 20"
    with study(out, alone).claim(FIRST):
        if alone:
            with pytest.raises(OutputError, match=used), study(out, alone).claim(FIRST):
                pass
        else:
            with study(out, alone).claim(FIRST):
                pass
        with pytest.raises(OutputError, match=used), study(out, alone, overwrite=True).claim(SECOND):
            pass
        assert json.loads((out / "request.json").read_text()) == FIRST
    with study(out, alone, overwrite=True).claim(SECOND):
        assert json.loads((out / "request.json").read_text()) == SECOND


def test_a_worker_that_died_holds_nothing_up(tmp_path: Path) -> None:
    out = tmp_path / "out"
    child = os.fork()
    if child == 0:
        context = study(out).claim(FIRST)
        context.__enter__()
        os._exit(9)
    os.waitpid(child, 0)
    assert list(out.glob(".worker-*.json"))
    with study(out, overwrite=True).claim(SECOND):
        assert len(list(out.glob(".worker-*.json"))) == 1
    assert not list(out.glob(".worker-*"))


def test_another_request_is_told_by_what_differs(tmp_path: Path) -> None:
    with study(tmp_path / "out").claim(FIRST):
        pass
    with pytest.raises(
        OutputError, match=r"another request \(seed was 1 and is 2\): choose another folder, or .*--overwrite"
    ):
        study(tmp_path / "out").claim(SECOND).__enter__()
    with pytest.raises(OutputError, match="holds no model"):
        study(tmp_path / "out").claim({"study": "another", "seed": 1}).__enter__()


def test_a_request_of_another_program_is_not_ours(tmp_path: Path) -> None:
    (tmp_path / "request.json").write_text(json.dumps({"url": "x"}))
    with pytest.raises(OutputError, match=r"holds no model but request\.json"):
        study(tmp_path, overwrite=True).claim(FIRST).__enter__()
    assert [path.name for path in tmp_path.iterdir()] == ["request.json"]


def test_what_the_study_reads_is_never_replaced(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with study(out).claim(FIRST):
        (out / "trials").mkdir()
        (out / "trials" / "data.jsonl").write_text("{}")
    with pytest.raises(OutputError, match="holds the questions"):
        study(out, overwrite=True, **{"the questions": out / "trials" / "data.jsonl"}).claim(SECOND).__enter__()
    assert (out / "trials" / "data.jsonl").exists()
