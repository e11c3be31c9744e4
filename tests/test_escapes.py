"""Texts out of files in every format of output: each character of Unicode's odd ends, alone and among others."""

from __future__ import annotations

import csv
import html
import io
import random
import re

import pytest
from markdown_it import MarkdownIt

from halve.escapes import MOST, csv_cell, lines, markdown, plain
from halve.measure.table import Column, Comparison, compare
from tests.measure.test_table import perplexity

ODD = [
    *map(chr, range(0x20)), *map(chr, range(0x7F, 0xA1)), *"\u061c\u200b\u200e\u200f\u202a\u202e\u2066\u2069\ufeff\u2028\u2029",
    "\ud800", "\udcff", "\U000e0001", "\x1b[31m", "\x1b]0;title\x07", "\x9b2J", "\r\n", "[bold]", "[/]", "[int4]", ":smile:",
    "[a](http://x)", "![x](y)", "`", "``", "|", "\\|", "\\", "*", "**", "_", "__", "~~", "$x$", "<b>", "</td>", "&amp;",
    "&#60;", "<!--", "-->", "=1+1", "+1", "-1", "@a", "\t=1", " =1", "\uff1d1", "#", "1.", '"', "'", ",", ";", "é", "中", "🙂",
    "a", " ",
]  # fmt: skip


def odd_texts() -> list[str]:
    draw = random.Random(20)
    mixed = ["".join(draw.choices(ODD, k=draw.randint(2, 12))) for _ in range(400)]
    return [*ODD, *(f"name{one}x" for one in ODD), *mixed]


@pytest.mark.parametrize("start", range(0, 600, 100))
def test_a_line_is_one_line_of_what_can_be_seen(start: int) -> None:
    for text in odd_texts()[start : start + 100]:
        shown = plain(text)
        assert shown.isprintable() and shown.encode() and (shown == text) is text.isprintable(), ascii(text)
        assert all(c.isprintable() or c in "\n\t" for c in lines(text)) and lines(text).count("\n") == text.count("\n")


def test_what_stands_for_what_cannot_be_seen() -> None:
    assert plain("a\x1b[31m\n\u202e\ud800\x9bé") == r"a\x1b[31m\n\u202e\ud800\x9bé"
    assert lines("a\n\tb\x1b") == "a\n\tb\\x1b"


@pytest.mark.parametrize("character", ["a", "\x00", "\U000e0001"])
def test_long_texts_are_cut(character: str) -> None:
    assert plain(character * 100) == plain(character) * 100
    for show in (plain, markdown, csv_cell):
        shown = str(show(character * 6000))
        assert MOST - 1 <= len(shown.replace("\\\\", "\\")) <= MOST and shown.endswith("…")


def cells(text: str) -> list[list[str]]:
    """What a reader of Markdown sees in the rows of the one table in `text`."""
    page = MarkdownIt("commonmark").enable(["table", "strikethrough"]).render(text)
    assert page.count("<table>") == 1 and not re.search(r"<(?!/?(table|thead|tbody|tr|th|td|p|sub)\b)", page), page
    rows = re.findall(r"<tr>(.*?)</tr>", page, re.DOTALL)
    return [[html.unescape(cell) for cell in re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row, re.DOTALL)] for row in rows]


def test_markdown_shows_names_and_nothing_else() -> None:
    texts = odd_texts()
    table = Comparison([Column("model", ("model",), str)], [{"model": text} for text in texts], [])
    shown = [row[0] for row in cells(table.markdown())[1:]]
    assert shown == [plain(text).strip(" ") for text in texts]


def test_a_spreadsheet_computes_no_name() -> None:
    texts = odd_texts()
    table = Comparison([Column("=1", ("=key",), str)], [{"=key": text} for text in texts] + [{"=key": -1.5}], [])
    head, *rows, number = csv.reader(io.StringIO(table.csv()))
    assert head == ["'=key"] and number == ["-1.5"] and len(rows) == len(texts)
    for (cell,), text in zip(rows, texts, strict=True):
        assert not re.match(r"\s*[=+@\uff1d\uff0b\uff0d\uff20-]", cell) and cell.removeprefix("'").isprintable()
        assert cell in (plain(text), f"'{plain(text)}")


def test_a_terminal_shows_names_and_nothing_else(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    texts = odd_texts()
    Comparison([Column("[red]model", ("model",), str)], [{"model": text} for text in texts], ["[bold]note\x1b"]).print()
    out = capsys.readouterr().out
    assert all(c.isprintable() or c == "\n" for c in out) and "[red]model" in out and r"[bold]note\x1b" in out
    shown = [line.strip() for line in out.splitlines()]
    assert {plain(text).strip() for text in texts} <= set(shown)


def test_names_that_differ_in_brackets_alone_stay_apart(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    compare([perplexity("llama[int4]", 2.0), perplexity("llama[int8]", 3.0)]).print()
    out = capsys.readouterr().out
    assert "llama[int4]" in out and "llama[int8]" in out
