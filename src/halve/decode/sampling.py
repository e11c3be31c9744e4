"""How the next token is chosen from logits: greedily, or drawn from what top-k and top-p leave.

Shape legend: B prompts, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from halve.errors import HalveError
from halve.model.vocabulary import check_finite
from halve.model.vocabulary_share import VocabularyShare

SEEDS = 1 << 62  # PyTorch takes 64 bits; what is added for rows and batches has to fit as well


def check_seed(seed: int) -> None:
    """Raise HalveError for a seed too large for PyTorch's generators."""
    if not -SEEDS <= seed <= SEEDS:
        raise HalveError(f"seed={seed} must lie between -{SEEDS} and {SEEDS}")


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. Temperature 0 is greedy, as is one below float32's smallest normal number, which no
    logit can be divided by; top_k 0 and top_p 1 cut nothing.

    Row i of a batch draws from its own stream, seeded `seed + i`, so it gets the tokens it would get alone.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise HalveError(f"temperature={self.temperature} must be 0 (greedy) or a positive number")
        if self.top_k < 0:
            raise HalveError(f"top_k={self.top_k} must be 0 (off) or a positive number of tokens")
        if not 0 < self.top_p <= 1:
            raise HalveError(f"top_p={self.top_p} must be above 0 and at most 1 (off)")
        check_seed(self.seed)

    @property
    def greedy(self) -> bool:
        return self.temperature < torch.finfo(torch.float32).tiny


class TokenChooser:
    """Chooses the next token of every row; each row draws from a stream of its own."""

    def __init__(
        self, sampling: Sampling, batch: int, device: torch.device, vocabulary: VocabularyShare | None = None
    ) -> None:
        self.sampling = sampling
        self._shared = None if vocabulary is None or vocabulary.ranks.size == 1 else vocabulary
        self._generators: list[torch.Generator] = []
        if not sampling.greedy:
            for row in range(batch):
                generator = torch.Generator(device=device)
                self._generators.append(generator.manual_seed(sampling.seed + row))

    def __call__(self, logits_BV: Tensor) -> Tensor:
        """int64 [B, 1] from logits [B, V], or of ranks that share a vocabulary those of its own tokens; HalveError, on the
        CPU alone, where the largest is not finite."""
        if self._shared is not None and self.sampling.greedy:
            tokens, best_B = self._shared.greedy(logits_BV)
            if logits_BV.device.type == "cpu":
                check_finite(best_B)
            return tokens
        if self._shared is not None:
            logits_BV = self._shared.join(logits_BV)
        if logits_BV.device.type == "cpu":  # a GPU would wait for the answer at each step
            check_finite(logits_BV.amax(-1))
        if self.sampling.greedy:
            return logits_BV.argmax(-1, keepdim=True)
        return sample(logits_BV.float(), self.sampling, self._generators).unsqueeze(1)


def sample(logits_BV: Tensor, sampling: Sampling, generators: Sequence[torch.Generator]) -> Tensor:
    """One token per row, int64 [B], from float32 logits [B, V] cut by top-k, then by top-p (nucleus, arXiv 1904.09751).

    The draw is argmax(p / e) with e from Exp(1), which has the distribution of p and one stream per row.
    """
    # the largest logit becomes 0: at a low temperature the others may reach -inf, none inf
    scaled = (logits_BV - logits_BV.amax(-1, keepdim=True)) / sampling.temperature
    probabilities = torch.softmax(kept_logits(scaled, sampling), dim=-1)
    noise = torch.empty_like(probabilities)
    for row, generator in zip(noise, generators, strict=True):
        row.exponential_(generator=generator)
    return (probabilities / noise).argmax(-1)


def kept_logits(logits_BV: Tensor, sampling: Sampling) -> Tensor:
    """The logits with everything outside the top k, then outside the smallest set of probability >= top_p, at -inf."""
    if 0 < sampling.top_k < logits_BV.shape[-1]:
        smallest = logits_BV.topk(sampling.top_k, dim=-1).values[:, -1:]
        logits_BV = logits_BV.masked_fill(logits_BV < smallest, float("-inf"))
    if sampling.top_p < 1:
        ordered, order = logits_BV.sort(dim=-1, descending=True)
        before = torch.softmax(ordered, dim=-1).cumsum(-1) - torch.softmax(ordered, dim=-1)
        dropped = torch.zeros_like(before, dtype=torch.bool).scatter_(-1, order, before >= sampling.top_p)
        dropped.scatter_(-1, order[:, :1], False)  # the likeliest stays, however small top_p
        logits_BV = logits_BV.masked_fill(dropped, float("-inf"))
    return logits_BV
