"""The tables of the pages: made from records, found stale, and refused when their request is malformed."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from halve.errors import DataError
from halve.measure.records import new_record, write_record
from tests.common import BENCHMARK
from tools.docs import __main__, pages, tables

PROJECT = Path(__file__).resolve().parents[3]
COMPARE = '<!-- table compare records="results/*.json" columns="model,decode_ms_median" -->'
FIGURES = (
    '<!-- table figures records="results/b.json results/a.json" '
    'columns="model: model; long_prompt.ttft_ms: TTFT; weight_bytes: bytes; floor_share" -->'
)
END = "<!-- end table -->"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A project with two records and a page."""
    (tmp_path / "results").mkdir()
    (tmp_path / "docs").mkdir()
    for name, decode in (("a", 10.0), ("b", 4.5)):
        record = new_record(
            "benchmark",
            f"models/{name}",
            command="halve",
            **BENCHMARK | {"decode_ms_median": decode, "weight_bytes": 2_000_000, "floor_share": 0.5},
            long_prompt={"prompt_tokens": 9, "ttft_ms": 1234.5678, "decode_ms_median": 1.0} if name == "a" else None,
        )
        write_record(tmp_path / "results" / f"{name}.json", record)
    return tmp_path


def test_tables_come_from_the_records_and_the_text_stays(root: Path) -> None:
    page = root / "docs" / "speed.md"
    page.write_text(f"before\n{COMPARE}\nold\n{END}\nbetween\n{FIGURES}\n{END}\nafter\n")
    assert pages.update(root, check=False) == [page]
    text = page.read_text()
    assert text.startswith(f"before\n{COMPARE}\n| model | decode (ms) |\n| --- | ---: |\n| a | 10.00 |\n| b | 4.50 |\n")
    assert "| model | TTFT | bytes | floor_share |\n" in text
    assert "| b | - | 2 MB | 50 % |\n| a | 1235 | 2 MB | 50 % |\n" in text
    assert "\nbetween\n" in text and text.endswith(f"{END}\nafter\n") and "old" not in text
    assert "Speed measured on: Chip" in text
    assert pages.update(root, check=False) == []


def test_a_row_for_each_entry_of_a_list(root: Path) -> None:
    entries = [{"kernel": "first", "registers": 64}, {"kernel": "second", "registers": 96}]
    write_record(root / "results" / "c.json", new_record("gpu-compile", "kernels", command="halve", kernels=entries))
    request = 'figures records="results/c.json" each="kernels" columns="kernel: kernel; registers: registers"'
    table = tables.make_table(request, root)
    assert table.startswith("| kernel | registers |\n| --- | ---: |\n| first | 64 |\n| second | 96 |\n")
    with pytest.raises(DataError, match="no record has a list nothing"):
        tables.make_table(request.replace('"kernels"', '"nothing"'), root)


def test_check_finds_a_changed_record_and_changes_nothing(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = root / "README.md"
    page.write_text(f"{COMPARE}\n{END}\n")
    pages.update(root, check=False)
    assert pages.update(root, check=True) == []
    text = page.read_text()
    record = root / "results" / "a.json"
    record.write_text(record.read_text().replace("10.0", "11.0"))
    assert pages.update(root, check=True) == [page]
    assert page.read_text() == text
    assert "+| a | 11.00 |" in capsys.readouterr().err


def test_the_exit_code_says_stale(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (root / "README.md").write_text(f"{COMPARE}\n{END}\n")
    for arguments, code in ((["--check"], 1), ([], 0), (["--check"], 0)):
        monkeypatch.setattr(sys, "argv", ["docs", "--root", str(root), *arguments])
        assert __main__.main() == code
    (root / "README.md").write_text(f"{COMPARE}\n")
    assert __main__.main() == 2


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (f"\n{COMPARE}\nno end\n", "README.md, line 2: the table has no <!-- end table -->"),
        (f"{COMPARE}\n{COMPARE}\n{END}\n", "line 1: the table has no"),
        (f'<!-- table plot records="results/*.json" -->\n{END}\n', "is no table: write compare or figures"),
        (f"<!-- table compare -->\n{END}\n", "is no table"),
        (f'<!-- table compare records="results/*.json" sort="x" -->\n{END}\n', "is no table"),
        (f'<!-- table compare records="results/c*.json" -->\n{END}\n', r"no file matches results/c\*.json"),
        (f'<!-- table compare records="results/*.json" columns="speed" -->\n{END}\n', "no column speed"),
        (f'<!-- table figures records="results/*.json" columns="speed" -->\n{END}\n', "no record has a figure speed"),
        (f'<!-- table figures records="results/*.json" -->\n{END}\n', "figures needs columns"),
    ],
)
def test_malformed_requests_are_refused(root: Path, text: str, says: str) -> None:
    (root / "README.md").write_text(text)
    with pytest.raises(DataError, match=says):
        pages.update(root, check=True)


def test_the_pages_of_this_project_are_fresh() -> None:
    assert [str(page) for page in pages.update(PROJECT, check=True)] == []
