"""Tokenizers small enough to see through."""

from __future__ import annotations

import pytest


class CharTokenizer:
    """One token per character: BOS 0, EOS 1, newline 2, then the printable ASCII characters from 3 on; 98 in all."""

    bos_ids: tuple[int, ...] = (0,)
    eos_ids: tuple[int, ...] = (1,)

    def encode(self, text: str, bos: bool) -> list[int]:
        ids = [2 if c == "\n" else ord(c) - 29 for c in text]
        return [*self.bos_ids, *ids] if bos else ids

    def decode(self, ids: list[int]) -> str:
        return "".join("\n" if i == 2 else chr(i + 29) for i in ids if i > 1)

    @property
    def end_of_text_id(self) -> int | None:
        return next(iter(self.eos_ids), None)

    def byte_counts(self, text: str) -> list[int]:
        return [1] * len(text)


@pytest.fixture
def characters() -> CharTokenizer:
    return CharTokenizer()
