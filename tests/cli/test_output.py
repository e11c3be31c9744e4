"""What commands print about names and paths that are anything: one line of what can be seen, nothing done to the terminal."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
from contextlib import redirect_stderr
from pathlib import Path

import pytest
from rich.table import Table

from halve.cli.app import main
from halve.cli.output import complain, console, say, stream
from halve.escapes import plain
from halve.measure.records import new_record, write_record
from halve.progress import progress
from tests.test_escapes import odd_texts
from tests.test_progress import Terminal

NAMES = [
    "[bold]m[/bold]", "[/]", "m[int4]", "a\x1b[31mb", "a\x1b]0;t\x07", "a\u202eb", "a\x9b2J", "a\udcffb", "a\u2028b", ":smile:",
    "=1+1", "a\rb", "a\nb", "`x`", "<b>",
]  # fmt: skip
COMMANDS = [
    "evaluate MODEL --task perplexity --data {}.txt",
    "benchmark {}",
    "generate {} --prompt a",
    "compare {}",
    "report {}",
    "compress {} OUT --step rtn",
    "compress MODEL {} --step nothing",
    "convert {} OUT",
    "export {} OUT --to gguf",
    "export MODEL OUT --to {}",
    "export MODEL OUT --to gguf --requantize {}",
    "layers {} --data text.txt --out OUT",
    "evaluate MODEL --task {}",
    "{}",
    "compare --{}",
]


@pytest.mark.parametrize("command", COMMANDS)
def test_an_error_names_what_is_wrong_and_does_nothing_else(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in NAMES:
        monkeypatch.setattr(sys, "argv", ["halve", *(word.replace("{}", name) for word in command.split(" "))])
        with pytest.raises(SystemExit) as stop:
            main()
        printed = capsys.readouterr()
        assert stop.value.code == 2 and printed.out == "" and printed.err.count("\n") == 1, ascii(printed)
        assert printed.err.strip("\n").isprintable(), ascii(printed.err)
        if "nothing" not in command and "--{" not in command:  # white space in a message is one space
            shown = printed.err.replace("'", "").replace("\\\\", "\\")
            assert plain(" ".join(name.split())) in shown or repr(name).strip("'") in shown, ascii(printed.err)


def test_a_path_that_was_written_is_told_whole(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    for name in NAMES[::3]:
        folder = tmp_path / name
        folder.mkdir(parents=True)
        record = {"task": "perplexity", "protocol": "documents", "data": name, "data_sha256": "0", "limit": None}
        record |= {"perplexity": 2.0, "nll_nats_per_token": 0.7, "tokens": 3, "not_measured": {}, "dtype": "float32"}
        record |= dict.fromkeys(("accuracy", "accuracy_ci95", "questions", "answered"))
        write_record(folder / "r.json", new_record("evaluation", name, recipe=[], command="", **record))
        (folder / "odd.json").write_text("{")
        for command in ("report", "compare", "compare --csv", "compare --markdown"):
            monkeypatch.setattr(sys, "argv", ["halve", *command.split(), str(folder)])
            monkeypatch.setenv("COLUMNS", "300")
            with pytest.raises(SystemExit) as stop:
                main()
            printed = capsys.readouterr()
            assert not stop.value.code, ascii(printed.err)
            assert all(c.isprintable() or c == "\n" for c in printed.out + printed.err), ascii(printed)
            assert printed.err.startswith("halve: left out: ") and printed.err.count("\n") == 1
            if command in ("report", "compare"):
                assert plain(name) in printed.out, ascii(printed.out)


def test_every_odd_character_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    for text in odd_texts()[::3]:
        say(text)
        complain(text)
        printed = capsys.readouterr()
        assert printed.out == plain(text) + "\n"
        assert printed.err.count("\n") == 1 and printed.err.strip("\n").isprintable()


def test_tables_and_bars_take_markup_as_text(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    table = Table(title="[red]t")
    table.add_column("[bold]c")
    table.add_row("model.[/]weight:smile:")
    console().print(table)
    out = capsys.readouterr().out
    assert "[red]t" in out and "[bold]c" in out and "model.[/]weight:smile:" in out
    monkeypatch.setenv("TERM", "xterm")
    terminal = Terminal()
    with redirect_stderr(terminal), progress("[/]a\x1b[5mb", 1) as advance:
        advance(1)
    assert r"[/]a\x1b[5mb" in re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", terminal.getvalue())


def test_text_of_a_model_does_nothing_to_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    for kind, shown in ((Terminal, "a\n\\x1b[2Jb"), (io.StringIO, "a\n\x1b[2Jb")):
        monkeypatch.setattr(sys, "stdout", out := kind())
        stream("a\n\x1b[2Jb")
        assert out.getvalue() == shown


@pytest.mark.slow
def test_a_terminal_that_lacks_characters_gets_their_codes(tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    code = "from halve.cli.output import say, to_any_terminal; to_any_terminal(); say('é\u2026')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, env=environment, check=True)
    assert done.stdout == b"\\xe9\\u2026\n"
