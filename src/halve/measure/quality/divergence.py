"""How far a model's predictions lie from those of the model it was made from: the maths, and the figures of a record.

Names and definitions are those of llama.cpp's `--kl-divergence` where it has them. Everything is per predicted position:
p is the base's distribution of the next token, q the model's. Legend: N positions, K tokens kept, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from halve.measure.quality.statistics import clustered_error, t_quantile

PERCENTILES = (50.0, 90.0, 95.0, 99.0, 99.9, 100.0)
CHANGE_PERCENTILES = (1.0, 5.0, 10.0, 25.0, 50.0, 75.0, 90.0, 95.0, 99.0)
NOTHING = -1e4  # the logarithm of a mass that float32 does not tell from none; finite, so that 0 * log 0 is 0


@dataclass(frozen=True)
class Distribution:
    """Log-probabilities (nats) of N positions: of all tokens, or of the K most probable ones and of all others together.

    log_probs: float32 [N, K], K = V where `tokens` is None. tokens: int64 [N, K], the most probable first. tail: float32
    [N], the logarithm of the mass of the tokens that are not kept.
    """

    log_probs: Tensor
    tokens: Tensor | None = None
    tail: Tensor | None = None

    def __getitem__(self, part: slice) -> Distribution:
        """Of some of the positions."""
        tokens, tail = (None if tensor is None else tensor[part] for tensor in (self.tokens, self.tail))
        return Distribution(self.log_probs[part], tokens, tail)

    @staticmethod
    def cat(distributions: Sequence[Distribution]) -> Distribution:
        """One after another; of those that keep the most probable tokens."""
        return Distribution(
            *(torch.cat(parts) for parts in zip(*(vars(d).values() for d in distributions), strict=True))
        )

    @property
    def top(self) -> Tensor:
        """The most probable token, int64 [N]."""
        return self.log_probs.argmax(dim=1) if self.tokens is None else self.tokens[:, 0]

    def kept(self, count: int) -> Distribution:
        """The `count` most probable tokens of a whole distribution, and the rest as one."""
        assert self.tokens is None
        log_probs, tokens = self.log_probs.topk(min(count, self.log_probs.shape[1]), dim=1)
        # of equally probable tokens the one that argmax takes comes first, so that `top` does not depend on what is kept
        place = (tokens == self.top.unsqueeze(1)).int().argmax(dim=1, keepdim=True)
        first = tokens[:, :1].clone()
        tokens = tokens.scatter(1, place, first)
        tokens[:, 0] = self.top
        log_probs = self.log_probs.gather(1, tokens)
        return Distribution(log_probs, tokens, log_mass_without(self.log_probs, tokens))


@dataclass
class Divergence:
    """Figures of positions, float64 [N] each on the CPU."""

    kl: Tensor
    same_top: Tensor  # 1 or 0
    acceptance: Tensor


def log_softmax(logits: Tensor) -> Tensor:
    """Float32 log-probabilities of float32 logits [N, V]."""
    return logits - logits.logsumexp(dim=1, keepdim=True)


def log_mass_without(log_probs_NV: Tensor, tokens_NK: Tensor) -> Tensor:
    """The logarithm of the mass of all tokens but the given ones, float32 [N]; very low where there are no others."""
    return log_probs_NV.scatter(1, tokens_NK, NOTHING).logsumexp(dim=1)


def diverge(base: Distribution, log_probs_NV: Tensor) -> Divergence:
    """Compare the base's distribution with the model's float32 log-probabilities [N, V] of the same positions.

    KL(p || q) is the sum of p log(p/q) - p + q, whose terms are never negative and which does not see that float32
    distributions sum to one only nearly. What the base does not keep counts as one token: KL is then a lower bound (the
    log-sum inequality); expected acceptance, the sum of min(p, q) (Leviathan et al. 2023, arXiv 2211.17192,
    theorem 3.5), an upper one.
    """
    same_top = base.top == log_probs_NV.argmax(dim=1)
    p, q = base.log_probs, log_probs_NV
    if base.tokens is not None:
        assert base.tail is not None
        q = torch.cat([q.gather(1, base.tokens), log_mass_without(q, base.tokens).unsqueeze(1)], dim=1)
        p = torch.cat([p, base.tail.unsqueeze(1)], dim=1)
    mass_p, mass_q = p.exp(), q.exp()
    # the sum of min(p, q) of distributions that sum to 1
    acceptance = (1 - (mass_p - mass_q).abs_().sum(dim=1, dtype=torch.float64) / 2).clamp_(min=0)
    terms = (p - q).mul_(mass_p).sub_(mass_p).add_(mass_q).clamp_(min=0)
    kl = terms.sum(dim=1, dtype=torch.float64)
    return Divergence(kl.cpu(), same_top.double().cpu(), acceptance.cpu())


def figures(
    rows: Sequence[Mapping[str, Sequence[float]]], clusters: Sequence[Hashable], changes: Sequence[float]
) -> dict[str, Any]:
    """The fields of a record, from the rows of all items (see base.py) and the cluster each belongs to (its article; a
    document or window its own). changes: of the probabilities of right tokens, q - p."""
    owners = [cluster for row, cluster in zip(rows, clusters, strict=True) for _ in row["kl"]]
    kl, same_top, acceptance = ([v for row in rows for v in row[key]] for key in ("kl", "same_top", "acceptance"))
    mean, interval = mean_interval(kl, owners, 0.0, math.inf)
    same, same_interval = mean_interval(same_top, owners, 0.0, 1.0)
    return {
        "positions": len(kl),
        "kl_nats_per_token": mean,
        "kl_nats_per_token_interval": interval,
        "kl_nats_percentiles": _percentiles(kl, PERCENTILES),
        "same_top_share": same,
        "same_top_share_interval": same_interval,
        "expected_acceptance": math.fsum(acceptance) / len(acceptance),
        "right_token_probability_change": {
            "mean": math.fsum(changes) / len(changes),
            "rms": math.sqrt(math.fsum(change * change for change in changes) / len(changes)),
            "percentiles": _percentiles(changes, CHANGE_PERCENTILES),
        },
    }


def perplexity_figures(nll: Sequence[float], base_nll: Sequence[float], clusters: Sequence[Hashable]) -> dict[str, Any]:
    """Ratio and difference of the perplexities of a model and its base, paired, from nats of each token.

    The ratio's interval is that of the mean difference of the losses; that of the difference of perplexities is
    linearized: the mean of ppl nll_i - ppl_base base_nll_i has the error of ppl - ppl_base.
    """
    perplexity, base_perplexity = (_exp(math.fsum(values) / len(values)) for values in (nll, base_nll))
    change, interval = mean_interval([a - b for a, b in zip(nll, base_nll, strict=True)], clusters)
    difference = perplexity - base_perplexity
    linear = [perplexity * a - base_perplexity * b for a, b in zip(nll, base_nll, strict=True)]
    centre, around = mean_interval(linear, clusters)
    return {
        "base_nll_nats_per_token": math.fsum(base_nll) / len(base_nll),
        "base_perplexity": base_perplexity,
        "perplexity_ratio": _exp(change),
        "perplexity_ratio_interval": interval and [_exp(end) for end in interval],
        "perplexity_difference": difference,
        "perplexity_difference_interval": around and [difference + end - centre for end in around],
    }


def mean_interval(
    values: Sequence[float], clusters: Sequence[Hashable], low: float = -math.inf, high: float = math.inf
) -> tuple[float, list[float] | None]:
    """The mean and its clustered 95 % interval (Student's t) within low and high; None with a single cluster."""
    mean, error, groups = clustered_error(values, clusters)
    if groups == 1:
        return mean, None
    half = t_quantile(groups - 1) * error
    return mean, [max(low, mean - half), min(high, mean + half)]


def _exp(nats: float) -> float:
    """Infinite for a model broken beyond measure."""
    return math.exp(nats) if nats < 700 else math.inf


def _percentiles(values: Sequence[float], percents: Sequence[float]) -> dict[str, float]:
    found = np.percentile(values, percents)
    return {f"{percent:g}": float(value) for percent, value in zip(percents, found, strict=True)}
