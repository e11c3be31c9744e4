"""The vocabulary as ranks share it: each has some rows of the embedding and of the head.

Shape legend: B prompts, T tokens of this pass, D hidden size, V vocabulary, v tokens of this rank.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from halve.model.linear import Linear
from halve.ranks.collective import Ranks


def vocabulary_bounds(size: int, ranks: int) -> list[int]:
    """Where each rank's tokens begin, and the end: as even as whole tokens are."""
    return [size * rank // ranks for rank in range(ranks + 1)]


class VocabularyShare:
    """The tokens of one rank, and what ranks make together of what each knows of its own; of one rank, all of them."""

    def __init__(self, ranks: Ranks, size: int) -> None:
        bounds = vocabulary_bounds(size, ranks.size)
        self.ranks, self.size = ranks, size
        self.own = range(bounds[ranks.rank], bounds[ranks.rank + 1])
        self._widths = [end - begin for begin, end in pairwise(bounds)]

    def embed(self, tokens_BT: Tensor, table_vD: Linear, dtype: torch.dtype) -> Tensor:
        """Rows of the whole embedding, [B, T, D] in `dtype`: a rank looks up its own tokens, for the others it adds zeros.

        Raises IndexError for a token that none has, where that can be told without waiting for a device.
        """
        if self.ranks.size == 1:
            return table_vD.look_up(tokens_BT, dtype)
        if tokens_BT.device.type == "cpu" and not bool(((tokens_BT >= 0) & (tokens_BT < self.size)).all()):
            raise IndexError(f"a token of {tokens_BT.flatten().tolist()} is not in the vocabulary of {self.size}")
        rows = tokens_BT - self.own.start
        others = (rows < 0) | (rows >= len(self.own))
        x = table_vD.look_up(rows.masked_fill(others, 0), dtype)
        return self.ranks.add(x.masked_fill(others.unsqueeze(-1), 0))

    def join(self, logits: Tensor) -> Tensor:
        """Logits [..., V] of all tokens, of [..., v] of this rank's."""
        return self.ranks.join(logits, self._widths)

    def greedy(self, logits_Bv: Tensor) -> tuple[Tensor, Tensor]:
        """The likeliest of all tokens, int64 [B, 1], and its logit, float64 [B]: ranks tell each other a number and a token
        per prompt, not their logits. Of equal ones the first, as one rank takes it."""
        values, tokens = logits_Bv.max(-1)
        # both are exact as float64, so one message carries them
        told = torch.stack((values.double(), (tokens + self.own.start).double()), dim=-1)
        all_told = self.ranks.join(told, [2] * self.ranks.size).unflatten(-1, (self.ranks.size, 2))
        best, rank = all_told[..., 0].max(-1, keepdim=True)
        return all_told[..., 1].gather(-1, rank).long(), best.squeeze(-1)
