"""What a command does to the folders around OUT: nothing of the user's goes, and OUT is whole or as it was."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import threading
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from halve.errors import OutputError
from halve.files.study import StudyFolder
from halve.files.work import WorkFolder

MODEL = {"config.json": '{"model_type": "llama"}', "model.safetensors": "weights"}
OURS = {**MODEL, "halve.json": '{"recipe": []}'}


def make(folder: Path, files: dict[str, str]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name).write_text(text)
    return folder


def content(root: Path, but: Path) -> dict[str, str]:
    """Every file and link below `root` outside of `but`, by what it holds."""
    found = {}
    for path in sorted(root.rglob("*")):
        if path == but or but in path.parents:
            continue
        if path.is_symlink():
            found[str(path)] = f"-> {os.readlink(path)}"
        elif path.is_file():
            found[str(path)] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def run(out: Path, model: Path, data: Path, overwrite: bool) -> None:
    """What a command does with OUT, the work itself left out."""
    work = WorkFolder(out, keep={"the model": model, "the text": data}, overwrite=overwrite)
    with work.claim({"recipe": 1}) as scratch:
        work.publish(make(scratch / "result", {**OURS, "made": "new"}))


PLACES = [
    "model",
    "model.old",
    "model.partial",
    "out",
    "out.old",
    "out.partial",
    "above",
    "above/model",
    "above/out",
    ".",
    "link",
]


@settings(max_examples=150, derandomize=True, deadline=None)
@given(
    model=st.sampled_from(["model", "model.old", "out.old", "out.partial", "above/model", "out/model"]),
    out=st.sampled_from(PLACES),
    users=st.sets(st.sampled_from(["out", "out.old", "out.partial", "above", "model.old"])),
    kinds=st.lists(st.sampled_from(["notes", "model", "ours", "both", "empty"]), min_size=5, max_size=5),
    link=st.sampled_from(["model", "out", "gone", "above"]),
    overwrite=st.booleans(),
    data_in=st.sampled_from(["", "out", "above"]),
)
def test_nothing_outside_of_out_changes(model, out, users, kinds, link, overwrite, data_in) -> None:
    root = Path(tempfile.mkdtemp()).resolve()
    try:
        files = {
            "notes": {"notes.txt": "mine"},
            "model": MODEL,
            "ours": OURS,
            "both": {**OURS, "notes.txt": "mine"},
            "empty": {},
        }
        for name, kind in zip(sorted(users), kinds, strict=False):
            make(root / name, files[kind])
        source = make(root / model, MODEL)
        data = make(root / data_in, {}) / "text.txt"
        data.write_text("a text")
        (root / "link").symlink_to(root / link)
        target = root / out
        place = target.resolve()
        before, everything = content(root, place), content(root, root / "nowhere")
        mine = {p for p in everything if "notes.txt" in p or p == str(data) or Path(p).parent == source}
        try:
            run(target, source, data, overwrite)
            done = True
        except OutputError:
            done = False
        assert content(root, place) == before
        after = content(root, root / "nowhere")
        assert {p: after.get(p) for p in mine} == {p: everything[p] for p in mine}
        if not done:
            assert after == everything
        else:
            assert (place / "made").read_text() == "new" and sorted(p.name for p in place.iterdir()) == sorted(
                [*OURS, "made"]
            )
    finally:
        shutil.rmtree(root)


@pytest.mark.parametrize("overwrite", [False, True])
def test_compressing_a_folder_named_old_keeps_it(tmp_path: Path, overwrite: bool) -> None:
    source, out = make(tmp_path / "m.old", MODEL), make(tmp_path / "m", OURS if overwrite else {})
    run(out, source, tmp_path / "none", overwrite)
    assert (out / "made").exists() and (source / "model.safetensors").read_text() == "weights"


def test_the_model_and_what_holds_it_are_never_replaced(tmp_path: Path) -> None:
    source = make(tmp_path / "above" / "model", MODEL)
    make(tmp_path / "above", OURS)
    for out in (source, tmp_path / "above", source.parent / "." / "model"):
        with pytest.raises(OutputError, match="the model"):
            run(out, source, tmp_path / "none", True)
    assert (source / "model.safetensors").exists()


@pytest.mark.parametrize("name", ["file", "/", "circle", "gone/below"])
def test_what_cannot_be_a_folder_is_refused_before_the_work(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    (tmp_path / "gone").symlink_to(tmp_path / "nowhere" / "disk")
    with pytest.raises(OutputError, match="choose another folder"):
        WorkFolder(tmp_path / name, keep={}, overwrite=True)
    assert (tmp_path / "file").read_text() == "mine"


def test_home_and_links_are_followed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    disk = make(tmp_path / "disk", {})
    (tmp_path / "out").symlink_to(disk / "models")
    run(Path("~/out"), make(tmp_path / "model", MODEL), tmp_path / "none", False)
    assert (tmp_path / "out").is_symlink() and (disk / "models" / "made").exists()


def test_out_that_comes_into_being_meanwhile_is_kept(tmp_path: Path) -> None:
    work = WorkFolder(tmp_path / "out", keep={}, overwrite=True)
    with pytest.raises(OutputError, match=r"came into being.*the result is in"), work.claim({}) as scratch:
        result = make(scratch / "result", OURS)
        make(tmp_path / "out", {"notes.txt": "mine"})
        work.publish(result)
    assert (tmp_path / "out" / "notes.txt").read_text() == "mine" and (result / "halve.json").exists()


def test_the_second_run_says_whose_the_folder_is(tmp_path: Path) -> None:
    first = WorkFolder(tmp_path / "out", keep={})
    with first.claim({"recipe": 1}):
        said: list[str] = []

        def second() -> None:
            try:
                with WorkFolder(tmp_path / "out", keep={}, overwrite=True).claim({"recipe": 2}):
                    said.append("both")
            except OutputError as error:
                said.append(str(error))

        thread = threading.Thread(target=second)
        thread.start()
        thread.join()
        assert len(said) == 1 and f"in use by process {os.getpid()} on " in said[0] and " since 20" in said[0]


def test_an_interrupted_run_is_gone_on_with_by_the_same_request_alone(tmp_path: Path) -> None:
    def interrupted(recipe: int, overwrite: bool = False) -> list[str]:
        with WorkFolder(tmp_path / "out", keep={}, overwrite=overwrite).claim({"recipe": recipe}) as scratch:
            there = [p.name for p in scratch.iterdir() if p.name.startswith("step")]
            (scratch / f"step-{recipe}.json").write_text("{}")
            return there

    assert interrupted(1) == [] and interrupted(1) == ["step-1.json"]
    with pytest.raises(OutputError, match="unfinished run of another request"):
        interrupted(2)
    assert interrupted(2, overwrite=True) == []


def test_a_folder_that_is_named_like_unfinished_work_is_left_alone(tmp_path: Path) -> None:
    for name in ("out.partial", "out.old"):
        make(tmp_path / name, {"notes.txt": "mine"})
    run(tmp_path / "out", make(tmp_path / "model", MODEL), tmp_path / "none", True)
    assert all((tmp_path / name / "notes.txt").read_text() == "mine" for name in ("out.partial", "out.old"))
    assert (tmp_path / "out" / "made").exists() and not (tmp_path / "out.partial-2").exists()


def test_a_study_replaces_only_its_like(tmp_path: Path) -> None:
    record = {"kind": "evaluation", "halve_version": "1"}

    def claim(identity: dict, overwrite: bool) -> None:
        with StudyFolder(tmp_path / "out", ("trials/",), keep={}, overwrite=overwrite).claim(
            {"study": "search"} | identity
        ) as folder:
            make(folder / "trials", {"a.json": json.dumps(record | identity)})

    claim({"floor": 1}, False)
    claim({"floor": 1}, False)
    with pytest.raises(OutputError, match=r"begun by another request.*--overwrite"):
        claim({"floor": 2}, False)
    claim({"floor": 2}, True)
    assert json.loads((tmp_path / "out" / "trials" / "a.json").read_text()) == record | {"floor": 2}
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match=r"notes\.txt, which halve did not write"):
        claim({"floor": 3}, True)
    assert (tmp_path / "out" / "notes.txt").exists()


@pytest.mark.parametrize(
    "name",
    [
        "mine.json",
        "holiday.png",
        "ledger.csv",
        "trials/notes.json",
        "trials/tokenizer_notes.md",
        "winner/my_lora.safetensors",
    ],
)
def test_files_of_the_user_in_a_study_keep_it_from_being_replaced(tmp_path: Path, name: str) -> None:
    def claim(floor: int, overwrite: bool = False) -> None:
        place = StudyFolder(tmp_path / "out", ("trials/", "winner/", "pareto.png"), keep={}, overwrite=overwrite)
        with place.claim({"study": "search", "floor": floor}) as folder:
            make(folder / "trials", {".dense.lock": ""})
            make(folder / "winner", OURS)

    claim(1)
    claim(2, overwrite=True)
    (tmp_path / "out" / name).write_text("mine")
    with pytest.raises(OutputError, match="which halve did not write"):
        claim(3, overwrite=True)
    assert (tmp_path / "out" / name).read_text() == "mine"


@pytest.mark.parametrize("name", ["vocabulary.txt", "merges_todo.md", "my_lora.safetensors", "tokenizer_corpus.txt"])
def test_files_of_the_user_beside_a_model_keep_it_from_being_replaced(tmp_path: Path, name: str) -> None:
    out = make(tmp_path / "out", {**OURS, name: "mine"})
    with pytest.raises(OutputError, match="which halve did not write"):
        run(out, make(tmp_path / "model", MODEL), tmp_path / "none", True)
    assert (out / name).read_text() == "mine"
