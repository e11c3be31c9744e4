"""Text from tokens as they come, whole characters only."""

from __future__ import annotations

from collections.abc import Sequence
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

    @property
    def end_of_text_id(self) -> int | None: ...

    def byte_counts(self, text: str) -> list[int] | None: ...


class TextStream:
    """Turns tokens into text as they come: what is given out once is what `decode` makes of all tokens together.

    Text is given out when no token to come can change it. Whole characters are not enough for that: a vocabulary with
    byte fallback spells all bytes of a run as U+FFFD when one of them is wrong, so a run is held back until it ends.
    """

    def __init__(self, tokenizer: TokenizerLike, prompt: list[int]) -> None:
        self._tokenizer = tokenizer
        self._probe = _end_of_character(tokenizer)
        # begins where text was certain, and holds some: the first space of what is decoded may be dropped
        self._context = list(prompt)
        self._before = tokenizer.decode(self._context)
        self._pending: list[int] = []
        self.text = ""

    def push(self, token: int) -> str:
        """The text that became certain with this token, possibly ""."""
        self._pending.append(token)
        whole = self._decoded()
        # a trailing replacement character may be part of a character whose rest is still to come
        if whole.endswith("\ufffd") or not self._decoded(self._probe).startswith(whole):
            return ""
        return self._accept(whole)

    def close(self) -> str:
        """What was held back, once no more tokens come."""
        return self._accept(self._decoded()) if self._pending else ""

    def _decoded(self, more: Sequence[int] = ()) -> str:
        return self._tokenizer.decode([*self._context, *self._pending, *more])

    def _accept(self, whole: str) -> str:
        kept = len(self._before)
        while not whole.startswith(self._before[:kept]):  # a prompt that ends inside a character: it is made whole here
            kept -= 1
        piece = whole[kept:]
        self._before = self._tokenizer.decode(self._pending)
        if self._before:
            self._context = self._pending
        else:
            self._context, self._before = self._context + self._pending, whole
        self._pending = []
        self.text += piece
        return piece


def _end_of_character(tokenizer: TokenizerLike) -> list[int]:
    """A token that spells a byte no character begins with, where there are such: after an open run it spoils the run."""
    try:
        return tokenizer.encode("\U0010fffd", bos=False)[-1:]
    except Exception:  # a vocabulary of words alone may refuse a character, each library in its own way
        return []
