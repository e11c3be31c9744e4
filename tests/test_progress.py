"""Progress bars: silent without a terminal, nested with one, gone after an error."""

from __future__ import annotations

import io
from contextlib import redirect_stderr

import pytest

from halve import progress as module
from halve.progress import progress, track


class Terminal(io.StringIO):
    """A stderr that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def test_nothing_is_written_without_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with progress("work", 2) as advance:
        advance(1)
    assert list(track(iter("abc"), description="letters")) == ["a", "b", "c"]
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "")


def test_nested_bars_show_both_and_leave_nothing_behind(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    seen, terminal = [], Terminal()
    with redirect_stderr(terminal):
        for outer in track([1, 2], description="layers"):
            seen += [(outer, inner) for inner in track(range(3), description="samples")]
    assert seen == [(1, 0), (1, 1), (1, 2), (2, 0), (2, 1), (2, 2)]
    shown = terminal.getvalue()
    assert "layers" in shown and "samples" in shown and "0/2" in shown
    assert module._open == []
    assert capsys.readouterr().out == ""


def test_an_error_or_an_early_end_closes_the_bar() -> None:
    with redirect_stderr(Terminal()):
        with pytest.raises(RuntimeError, match="inside"), progress("work", 3):
            raise RuntimeError("inside")
        assert module._open == []
        items = track([1, 2, 3], description="again")
        assert next(items) == 1
        assert len(module._open) == 1
        items.close()  # type: ignore[attr-defined]
        assert module._open == []
