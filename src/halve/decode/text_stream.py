"""Text from tokens as they come, whole characters only."""

from __future__ import annotations

from typing import Protocol


class TokenizerLike(Protocol):
    """What generation and evaluation need of a tokenizer."""

    @property
    def bos_ids(self) -> tuple[int, ...]: ...

    @property
    def eos_ids(self) -> tuple[int, ...]: ...

    def encode(self, text: str, bos: bool) -> list[int]: ...

    def decode(self, ids: list[int]) -> str: ...

    def token(self, token_id: int) -> str: ...


class TextStream:
    """Turns tokens into text as they come, never cutting inside a character or dropping a word's leading space."""

    WINDOW = 4  # tokens of context decoded along with the new ones; SentencePiece strips the space of a first token

    def __init__(self, tokenizer: TokenizerLike, prompt: list[int]) -> None:
        self._tokenizer = tokenizer
        self._context = list(prompt[-self.WINDOW :])
        self._pending: list[int] = []
        self.text = ""

    def push(self, token: int) -> str:
        """The text that became certain with this token, possibly ""."""
        self._pending.append(token)
        piece = self._decoded()
        # a trailing replacement character is half of a multi-byte character whose rest may still come
        return "" if piece.endswith("\ufffd") else self._accept(piece)

    def close(self) -> str:
        """What was held back, once no more tokens come."""
        return self._accept(self._decoded()) if self._pending else ""

    def _decoded(self) -> str:
        before = self._tokenizer.decode(self._context)
        return self._tokenizer.decode(self._context + self._pending)[len(before) :]

    def _accept(self, piece: str) -> str:
        self._context = (self._context + self._pending)[-self.WINDOW :]
        self._pending = []
        self.text += piece
        return piece
