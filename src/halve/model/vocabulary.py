"""What may be sent into a model, ids that it has an embedding for, and what has to come out, logits that are numbers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from halve.errors import DataError, HalveError


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


def check_finite(scores: Tensor) -> None:
    """HalveError unless all logits, or log-probabilities, are."""
    if not bool(torch.isfinite(scores).all()):
        raise HalveError("the model's logits are not finite (NaN or Inf); use --dtype fp32, or check the checkpoint")
