"""One reader for all texts and questions: odd files mean the same to whoever reads them."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path

import pytest

from halve import CalibrationOptions, EvaluationOptions, SearchOptions, evaluate, search
from halve.compression.compress import compress
from halve.errors import DataError, HalveError
from halve.measure.quality.race import read_questions
from halve.measure.quality.tasks.perplexity import read_text
from halve.studies.layers import analyse_layers
from halve.texts import read_documents
from tests.common import write_word_tokenizer

# characters that str.splitlines takes for ends of lines, and JSON strings may hold as they are
ODD = "one\u2028two\u2029three\u0085four\x0bfive"
QUESTION = {"questions": ["Who?"], "options": [["a", "b"]], "answers": ["B"]}


def as_rows(*texts: str, ascii_only: bool = False) -> str:
    rows = [{"text": text, "article": text, **QUESTION} for text in texts]
    return "".join(json.dumps(row, ensure_ascii=ascii_only) + "\n" for row in rows)


def readings(path: Path) -> list[list[str]]:
    """The texts of a file as calibration, perplexity and questions take them."""
    questions = [question.article for question in read_questions(path).questions]
    return [read_documents(path), read_text(path, "documents").pieces, questions]


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"], ids=["plain", "byte-order mark"])
@pytest.mark.parametrize("end", ["\n", "\r\n"], ids=["LF", "CRLF"])
def test_rows_read_the_same_everywhere(tmp_path: Path, mark: bytes, end: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(mark + as_rows(ODD, "plain").replace("\n", end).encode())
    assert readings(path) == [[ODD, "plain"]] * 3


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"], ids=["plain", "byte-order mark"])
@pytest.mark.parametrize("end", [b"\n", b"\r\n"], ids=["LF", "CRLF"])
def test_text_reads_the_same_everywhere(tmp_path: Path, mark: bytes, end: bytes) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(mark + b"first" + end + b"line<|endoftext|>second")
    assert read_documents(path) == read_text(path, "documents").pieces == ["first\nline", "second"]


def test_half_surrogate_pairs_are_replaced_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(as_rows("smile \ud83d end", "whole \U0001f600", "\udc00\udc00", ascii_only=True))
    with caplog.at_level(logging.WARNING):
        assert readings(path) == [["smile \ufffd end", "whole \U0001f600", "\ufffd\ufffd"]] * 3
    # once a reading: three in `text`, three in `article`
    assert [record.args for record in caplog.records] == [(path, 6)] * 3
    for text in read_documents(path):
        text.encode()


@pytest.mark.parametrize("indent", [None, 2])
def test_a_race_folder_calibrates_as_it_is_evaluated(tmp_path: Path, indent: int | None) -> None:
    for name, article in (("b.txt", "second"), ("a.txt", "first")):
        (tmp_path / name).write_text(json.dumps({"article": article, **QUESTION}, indent=indent))
    assert read_documents(tmp_path) == ["first", "second"]
    assert [question.article for question in read_questions(tmp_path).questions] == ["first", "second"]


def test_wrong_lines_are_named_alike(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(as_rows("x") + "\n{nonsense\n")
    for read in (read_documents, lambda file: read_text(file, "documents"), read_questions):
        with pytest.raises(DataError, match=r"a\.jsonl, line 3: not JSON \(.*column 2\); "):
            read(path)


def test_deep_nesting_is_an_error_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("[" * 100_000 + "\n")
    for read in (read_documents, lambda file: read_text(file, "documents"), read_questions):
        with pytest.raises(DataError, match="line 1: not JSON"):
            read(path)


@pytest.fixture(scope="module")
def reader(make_hf: Callable[..., Path]) -> Path:
    folder = make_hf("llama", num_hidden_layers=2)
    write_word_tokenizer(folder, "one two three four five plain smile end who a b".split())
    return folder


ROWS = [(f"one two three {ODD} plain {n} " * 6) + "smile \ud83d end" for n in range(4)]


@pytest.mark.slow
@pytest.mark.parametrize("mark", ["", "\ufeff"], ids=["plain", "byte-order mark"])
@pytest.mark.parametrize("end", ["\n", "\r\n"], ids=["LF", "CRLF"])
@pytest.mark.parametrize("kind", ["rows", "escaped rows", "RACE folder"])
def test_every_command_takes_the_same_odd_files(reader: Path, tmp_path: Path, mark: str, end: str, kind: str) -> None:
    options = [[f"plain {letter}" for letter in "ab"]]
    rows = [{"id": f"{n}", "article": row, **QUESTION, "options": options} for n, row in enumerate(ROWS)]
    if kind == "RACE folder":
        source = tmp_path / "race"
        source.mkdir()
        for number, row in enumerate(rows):
            text = mark + json.dumps(row, indent=2).replace("\n", end)
            (source / f"{number}.txt").write_bytes(text.encode())
    else:
        source = tmp_path / "a.jsonl"
        lines = [json.dumps(row | {"text": row["article"]}, ensure_ascii=kind == "escaped rows") for row in rows]
        # only an escape can carry half a pair into a UTF-8 file
        text = mark + "".join(line.replace("\ud83d", "\\ud83d") + end for line in lines)
        source.write_bytes(text.encode())
    windows = CalibrationOptions(str(source), samples=4, window=16)
    compress(reader, tmp_path / "gptq", ["gptq:bits=4,group_size=16"], calibration=source, samples=4, window=16)
    asked = EvaluationOptions("multiple-choice", source, "continuation", "plain")
    record = evaluate(reader, task="multiple-choice", data=source, protocol="continuation", template="plain")
    assert record["answered"] == len(ROWS)
    if kind != "RACE folder":
        assert evaluate(reader, task="perplexity", data=source, protocol="documents")["documents"] == len(ROWS)
    assert analyse_layers(reader, source, tmp_path / "layers", samples=4, window=16).origin["windows"] == 4
    vary = ["l1-inputs.fraction=0..0.5"]
    options_of_search = SearchOptions(resolution=0.5)
    try:
        search(
            reader, tmp_path / "search", ["l1-inputs"], vary, floor=0.01,
            evaluation=asked, calibration=windows, options=options_of_search,
        )  # fmt: skip
    except HalveError as error:  # a random model may answer nothing right; the questions were read all the same
        assert "floor" in str(error)
    assert (tmp_path / "search" / "trials" / "dense.json").exists()
