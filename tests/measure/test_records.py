"""Records: written whole, read back, and refused with the reason when they are not what they should be."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from halve.errors import DataError, OutputError
from halve.measure.records import (
    check_record_path,
    checkpoint_recipe,
    find_records,
    new_record,
    read_record,
    source_commit,
    write_record,
)


def make(model: str = "m", **figures: object) -> dict[str, object]:
    return new_record("plan", model, command="halve compress m", recipe=[], **figures)


def test_a_record_says_where_and_how_it_was_made() -> None:
    record = new_record(
        "evaluation", "folder/model", command=["halve", "evaluate", "a b"], recipe=[{"name": "rtn"}], x=1
    )
    assert record["command"] == "halve evaluate 'a b'"
    assert record["recipe"] == [{"name": "rtn"}]
    assert record["x"] == 1
    assert record["machine"]["cores"] >= 1
    assert record["machine"]["ram_bytes"] > 1e8
    assert record["versions"]["python"].startswith("3.")


def test_the_commit_is_that_of_the_checkout() -> None:
    here = Path(__file__).parent
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=False)
    found = source_commit()
    if head.returncode != 0:
        assert found is None  # an unpacked archive is no checkout
    else:
        assert found is not None and found.removesuffix("-dirty") == head.stdout.strip()


def test_written_and_read_back(tmp_path: Path) -> None:
    record = make(figures={"decode_ms": 1.5, "steps": [1, 2]}, text="é")
    path = write_record(tmp_path / "a.json", record)
    assert read_record(path) == record
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_what_is_not_finite_is_null_and_named(tmp_path: Path) -> None:
    path = write_record(tmp_path / "a.json", make(perplexity=float("inf"), nested={"list": [1.0, float("nan")]}))
    record = json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert record["perplexity"] is None
    assert record["nested"] == {"list": [1.0, None]}
    assert record["not_finite"] == {"perplexity": "inf", "nested.list.1": "nan"}


def test_a_failed_write_keeps_the_earlier_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_record(tmp_path / "a.json", make(x=1))

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(OutputError, match=r"a\.json cannot be written \(No space left on device\)"):
        write_record(path, make(x=2))
    assert read_record(path)["x"] == 1
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_bad_output_paths_are_found_before_the_work(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="there is no folder"):
        check_record_path(tmp_path / "none" / "a.json")
    with pytest.raises(OutputError, match="is a folder"):
        check_record_path(tmp_path)


@pytest.mark.parametrize("held", ["a text", '{"model_type": "llama"}', '{"halve_version": "1", "recipe": []}'])
def test_a_record_replaces_a_record_alone(tmp_path: Path, held: str) -> None:
    path = tmp_path / "a.json"
    path.touch()  # an empty file holds nothing
    write_record(path, make(x=1))
    write_record(path, make(x=2))
    path.write_text(held)
    with pytest.raises(OutputError, match=r"is not a record that halve wrote.*name another file"):
        write_record(path, make(x=3))
    assert path.read_text() == held


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "not valid JSON"),
        ("[1]", "it is a list, expected an object"),
        ('{"kind": "benchmark"}', 'lacks "model"'),
        (json.dumps(make() | {"recipe": "rtn"}), '"recipe" is text, expected a list'),
    ],
)
def test_malformed_files_are_refused(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "bad.json"
    path.write_text(text)
    with pytest.raises(DataError, match=says) as caught:
        find_records([path])
    assert str(path) in str(caught.value)


def test_files_and_folders_in_the_order_given(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text('{"model_type": "llama"}')
    (model / "vocab.json").write_text("[1, 2]")
    write_record(model / "b.json", make("b"))
    write_record(model / "a.json", make("a"))
    write_record(tmp_path / "z.json", make("z"))
    assert [r["model"] for r in find_records([tmp_path / "z.json", model]).records] == ["z", "a", "b"]


def test_nothing_found_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no record found in"):
        find_records([tmp_path])
    with pytest.raises(DataError, match="does not exist"):
        find_records([tmp_path / "missing.json"])


def test_the_recipe_comes_from_the_model_folder(tmp_path: Path) -> None:
    assert checkpoint_recipe(tmp_path) == []
    (tmp_path / "halve.json").write_text('{"recipe": [{"name": "rtn", "bits": 4}]}')
    assert new_record("benchmark", tmp_path)["recipe"] == [{"name": "rtn", "bits": 4}]
    (tmp_path / "halve.json").write_text('{"recipe": "rtn"}')
    with pytest.raises(DataError, match=r"halve\.json is malformed, \"recipe\" is text, expected a list"):
        checkpoint_recipe(tmp_path)
