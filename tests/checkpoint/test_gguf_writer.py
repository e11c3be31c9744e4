"""What is written is what the gguf package and our own reader find."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from halve.checkpoint import gguf_writer
from halve.checkpoint.gguf_blocks import BY_NAME
from halve.checkpoint.gguf_header import read_header
from halve.checkpoint.gguf_writer import NewTensor, file_bytes, header_bytes, write_file
from halve.errors import OutputError

FIELDS: dict[str, Any] = {
    "general.architecture": "llama",
    "a.count": 2**32 - 1,
    "a.share": 0.5,
    "a.yes": True,
    "a.no": False,
    "a.words": ("", "ü中", "b\nc"),
    "a.none": (),
    "a.types": (1, 3, 6),
    "a.scores": (-1.5, 0.0),
    "a.flags": (True, False, True),
}


def tensors() -> list[NewTensor]:
    rows = np.arange(6, dtype="<f4").reshape(2, 3)
    codes = np.arange(2 * 2 * 34, dtype=np.uint8)
    return [
        NewTensor("w", (2, 3), BY_NAME["F32"], lambda: [rows[:1].copy(), rows[1:].copy()]),
        NewTensor("v", (5,), BY_NAME["F16"], lambda: [np.ones(5, "<f2")]),
        NewTensor("q", (2, 64), BY_NAME["Q8_0"], lambda: [codes]),
    ]


def test_two_readers_find_what_was_written(tmp_path: Path) -> None:
    file = tmp_path / "m.gguf"
    made = header_bytes(FIELDS, tensors())
    write_file(file, made, tensors())
    assert file.stat().st_size == file_bytes(made, tensors())
    ours = read_header(file)
    assert ours.fields == FIELDS
    assert {name: (one.shape, one.type.name) for name, one in ours.tensors.items()} == {
        one.name: (one.shape, one.type.name) for one in tensors()
    }
    theirs = gguf.GGUFReader(file)
    for key, value in FIELDS.items():
        found = theirs.fields[key].contents()
        assert found == (list(value) if isinstance(value, tuple) else value), key
    for mine, other in zip(tensors(), theirs.tensors, strict=True):
        assert (mine.name, mine.shape, mine.type.name) == (
            other.name,
            tuple(other.shape.tolist()[::-1]),
            other.tensor_type.name,
        )
        assert b"".join(part.tobytes() for part in mine.parts()) == other.data.tobytes()


def test_half_a_character_is_replaced(tmp_path: Path) -> None:
    """In the name of a folder, or a template: a file's texts are UTF-8."""
    file = tmp_path / "m.gguf"
    write_file(file, header_bytes({"general.name": "a\udcffb"}, []), [])
    assert read_header(file).fields == {"general.name": "a?b"}


def test_a_header_that_no_reader_takes_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf_writer, "MAX_HEADER_BYTES", 200)
    with pytest.raises(OutputError, match="more than the 200 that a GGUF file's header may have"):
        header_bytes(FIELDS, tensors())
