"""The token ids that a model has an embedding for: the one check of all that is sent into it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

from halve.errors import DataError


class Speller(Protocol):
    """What knows how a token is written."""

    def token(self, token_id: int) -> str: ...


def check_ids(vocab_size: int, sequences: Iterable[Sequence[int]], tokenizer: Speller | None = None) -> None:
    """Raise DataError for a token id outside of 0 to `vocab_size` - 1, named as `tokenizer`, if it made them, writes it."""
    for tokens in sequences:
        if tokens and (min(tokens) < 0 or max(tokens) >= vocab_size):
            outside = next(token for token in tokens if not 0 <= token < vocab_size)
            named = f"token id {outside}" if tokenizer is None else f"token {tokenizer.token(outside)!r} (id {outside})"
            raise DataError(
                f"{named} is outside of the model's vocabulary of {vocab_size} entries: use the tokenizer that belongs to "
                "the model, or give the model the new tokens with transformers' resize_token_embeddings"
            )
