"""Reading questions: every source gives the same questions, and everything malformed is named with its place."""

from __future__ import annotations

import json
import logging
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from halve.errors import DataError
from halve.measure.quality.race import load_question_set, read_hub_questions, read_questions
from tests.common import write_lines

RECORD = {
    "id": "high1.txt",
    "article": "Tom has a cat.\nIt is black.",
    "questions": ["What has Tom?", "Its colour is  _  ."],
    "options": [["a dog", "a cat", "a cow"], ["black", "white"]],
    "answers": ["B", "A"],
    "kind": ["who", "colour"],
    "people": 1,
    "source": {"year": 2017},
}


def test_jsonl_and_folder_and_single_file_agree(tmp_path: Path) -> None:
    second = RECORD | {"id": "high2.txt", "article": "Ann\u2028has a dog."}
    folder = tmp_path / "high"
    folder.mkdir()
    for name, record in (("1.txt", RECORD), ("2.txt", second)):
        (folder / name).write_text(json.dumps(record, ensure_ascii=False), encoding="utf-8")
    (folder / "notes.md").write_text("not a question file")
    lines = tmp_path / "all.jsonl"
    lines.write_text("\n".join(json.dumps(r, ensure_ascii=False) for r in (RECORD, second)) + "\n\n", encoding="utf-8")
    from_lines, from_folder = read_questions(lines), read_questions(folder)
    assert from_lines.questions == from_folder.questions
    assert len(from_lines.questions) == 4
    assert from_lines.questions[:2] == read_questions(folder / "1.txt").questions
    assert (from_lines.name, from_folder.name) == ("all.jsonl", "high")
    assert len(from_folder.sha256) == 64 and from_folder.sha256 != from_lines.sha256


def test_every_field_is_kept_as_it_is(tmp_path: Path) -> None:
    first, second = read_questions(write_lines(tmp_path / "q.jsonl", RECORD)).questions
    assert (first.article_id, first.article, first.text) == ("high1.txt", RECORD["article"], "What has Tom?")
    assert first.options == ("a dog", "a cat", "a cow") and first.answer == 1
    assert second.options == ("black", "white") and second.answer == 0
    assert first.kinds == (("kind", "who"), ("people", "1"))
    assert second.kinds == (("kind", "colour"), ("people", "1"))


def test_articles_without_id_are_named_by_their_line(tmp_path: Path) -> None:
    bare = {key: RECORD[key] for key in ("article", "questions", "options", "answers")}
    lines = write_lines(tmp_path / "q.jsonl", bare, bare | {"article": "Ann has a dog."})
    assert [q.article_id for q in read_questions(lines).questions] == [
        "q.jsonl:1",
        "q.jsonl:1",
        "q.jsonl:2",
        "q.jsonl:2",
    ]


@pytest.mark.parametrize(
    ("ids", "expected"),
    [
        ((None, None, None, None), ["q.jsonl:1", "q.jsonl:2", "q.jsonl:1", "q.jsonl:1"]),
        (("q1", "q2", "q3", "q4"), ["q1", "q2", "q1", "q1"]),
        (("a", "a", "a", "a"), ["a", "a (2)", "a", "a"]),
        (("a", None, None, "b"), ["a", "q.jsonl:2", "a", "a"]),
    ],
)
def test_an_article_is_its_text_whatever_its_lines_are_called(
    tmp_path: Path, ids: tuple[str | None, ...], expected: list[str]
) -> None:
    texts = [RECORD["article"], "Ann has a dog.", RECORD["article"], RECORD["article"].replace("\n", " ") + "\n"]
    rows = [
        {"article": text, "question": f"{number}?", "options": ["a", "b"], "answer": "A"}
        | ({"id": name} if name else {})
        for number, (text, name) in enumerate(zip(texts, ids, strict=True))
    ]
    questions = read_questions(write_lines(tmp_path / "q.jsonl", *rows)).questions
    assert [q.article_id for q in questions] == expected
    assert [q.article for q in questions] == texts, "what is asked stays as it is"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"article": ""}, "line 2: 'article' is \"\"; it must be non-empty text"),
        ({"article": None}, "line 2: 'article' is missing"),
        ({"questions": "What?"}, "line 2: 'questions' is \"What\\?\"; it must be a non-empty list"),
        ({"answers": ["A"]}, "line 2: 2 questions, 2 lists of options and 1 answers"),
        ({"answers": ["B", "C"]}, 'line 2, question 2: the answer is "C"; it must be one of A, B'),
        ({"answers": [1, "A"]}, "line 2, question 1: the answer is 1"),
        ({"options": [["a"], ["b", "c"]]}, "line 2, question 1: has 1 options; give a list of 2 to 26"),
        ({"options": [["a", " "], ["b", "c"]]}, 'line 2, question 1: option B is " "; it must be non-empty text'),
        ({"questions": [7, "x"]}, "line 2, question 1: the question is 7; it must be text"),
    ],
)
def test_malformed_records_are_named(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = write_lines(tmp_path / "q.jsonl", RECORD, RECORD | change)
    with pytest.raises(DataError, match=message) as caught:
        read_questions(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_broken_json_is_named_with_line_and_column(tmp_path: Path) -> None:
    path = tmp_path / "q.jsonl"
    path.write_text(json.dumps(RECORD) + "\n\n{'article': 1}\n")
    with pytest.raises(DataError, match=r"line 3: not JSON \(.*column 2\); want"):
        read_questions(path)
    with pytest.raises(DataError, match="line 1: is a list, not an object"):
        read_questions(write_lines(tmp_path / "list.jsonl", [RECORD]))
    broken = tmp_path / "q.txt"
    broken.write_text('{"article": "a",\n "questions": [}')
    with pytest.raises(DataError, match=r"q\.txt, line 2: not JSON"):
        read_questions(broken)


def test_what_is_no_question_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file or folder"):
        read_questions(tmp_path / "absent.jsonl")
    with pytest.raises(DataError, match=r"holds no .txt files; name the folder that does"):
        read_questions(tmp_path)
    empty = tmp_path / "empty.jsonl"
    empty.write_text("\n \n")
    with pytest.raises(DataError, match="is empty"):
        read_questions(empty)
    (tmp_path / "q.csv").write_text("a,b")
    with pytest.raises(DataError, match=r"unknown kind of file '.csv'"):
        read_questions(tmp_path / "q.csv")
    (tmp_path / "latin.jsonl").write_bytes(b'{"article":\n "caf\xe9"}')
    with pytest.raises(DataError, match="line 2: not UTF-8"):
        read_questions(tmp_path / "latin.jsonl")


def _hub_rows() -> list[dict[str, Any]]:
    return [
        {"example_id": "high9.txt", "article": "Tom has a cat.", "question": "What?", "options": ["a dog", "a cat"]}
        | {"answer": "B"},
        {"example_id": "high9.txt", "article": "Tom has a cat.", "question": "Who?", "options": ["Tom", "Ann"]}
        | {"answer": "A"},
    ]


def test_hub_rows_hold_one_question_each(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(*args: Any, **kwargs: Any) -> list[dict[str, Any]]:
        asked.append((args, kwargs))
        return _hub_rows()

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    data = load_question_set(None, ("ehovy/race", "high", "test"))
    assert asked == [(("ehovy/race", "high"), {"split": "test"})]
    assert [(q.article_id, q.text, q.answer) for q in data.questions] == [
        ("high9.txt", "What?", 1),
        ("high9.txt", "Who?", 0),
    ]
    assert data.name == "ehovy/race:high:test"
    load_question_set("hub:owner/set:validation", None)
    load_question_set("hub:owner/set", None)
    assert asked[1:] == [(("owner/set", None), {"split": "validation"}), (("owner/set", None), {"split": "test"})]


def test_hub_rows_of_another_layout_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [*_hub_rows(), {"text": "no question"}]
    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=lambda *a, **k: rows))
    with pytest.raises(DataError, match="owner/set, row 3: 'article' is missing"):
        read_hub_questions("owner/set", None, "test")


def test_missing_package_and_missing_network_are_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r"needs the package 'datasets'; pip install .*--data"):
        read_hub_questions("ehovy/race", "high", "test")

    logger = logging.getLogger("huggingface_hub.utils._http")
    level = logging.getLogger("huggingface_hub").level

    def unreachable(*args: Any, **kwargs: Any) -> None:
        assert not logger.isEnabledFor(logging.WARNING), "a retry is no line of its own"
        raise ConnectionError("no route\nto host")

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=unreachable))
    with pytest.raises(DataError, match=r"cannot be fetched: no route to host; check the network, or give --data"):
        read_hub_questions("ehovy/race", "high", "test")
    assert logging.getLogger("huggingface_hub").level == level


def test_the_real_datasets_package_reads_the_same_questions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("datasets", reason="the optional package 'datasets' is not installed")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    folder = tmp_path / "set"
    folder.mkdir()
    write_lines(folder / "test.jsonl", *_hub_rows())
    questions = read_hub_questions(str(folder), None, "test").questions
    assert [(q.text, q.options, q.answer) for q in questions] == [
        ("What?", ("a dog", "a cat"), 1),
        ("Who?", ("Tom", "Ann"), 0),
    ]
    with pytest.raises(DataError, match="cannot be fetched"):
        read_hub_questions(str(folder), None, "no_such_split")


def test_data_that_no_task_has_by_itself() -> None:
    with pytest.raises(DataError, match="give --data"):
        load_question_set(None, None)
    with pytest.raises(DataError, match="malformed; want hub:NAME"):
        load_question_set("hub:a:b:c:d", None)


def test_the_40_original_files_are_the_same_questions_as_thewrite_lines(assets: Path) -> None:
    folder = read_questions(assets / "data/race/test_high_txt_sample").questions
    lines = read_questions(assets / "data/race/race_high_test.jsonl").questions
    by_article: dict[str, list[Any]] = {}
    for question in lines:
        by_article.setdefault(question.article_id, []).append(question)
    assert len(lines) == 3498 and len(by_article) == 1045
    assert len({q.article_id for q in folder}) == 40
    assert folder == [q for a in dict.fromkeys(q.article_id for q in folder) for q in by_article[a]]
