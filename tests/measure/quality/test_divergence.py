"""Divergence of distributions against its definition in float64, and what must hold whatever the model."""

from __future__ import annotations

import math

import pytest
import torch

from halve.measure.quality.divergence import Distribution, diverge, figures, log_softmax, perplexity_figures

SEEDS = range(4)


def pair(
    seed: int, spread: float, change: float, positions: int = 40, vocabulary: int = 300
) -> tuple[torch.Tensor, ...]:
    """Logits of a base and of a model a little off."""
    generator = torch.Generator().manual_seed(seed)
    logits = spread * torch.randn(positions, vocabulary, generator=generator)
    return logits, logits + change * torch.randn(positions, vocabulary, generator=generator)


def by_definition(base: torch.Tensor, model: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """KL and the sum of the lesser probabilities, in float64."""
    p, q = base.double().log_softmax(1), model.double().log_softmax(1)
    return (p.exp() * (p - q)).sum(1), torch.minimum(p.exp(), q.exp()).sum(1)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("spread", "change"), [(1.0, 0.01), (3.0, 0.5), (8.0, 4.0), (40.0, 40.0)])
def test_whole_distributions_by_definition(seed: int, spread: float, change: float) -> None:
    base, model = pair(seed, spread, change)
    found = diverge(Distribution(log_softmax(base)), log_softmax(model))
    kl, acceptance = by_definition(base, model)
    # float32 keeps a log-probability to half an ulp of the largest logit, which is a factor of the probability
    rounding = 4 * 2**-24 * max(base.abs().max().item(), model.abs().max().item())
    torch.testing.assert_close(found.kl, kl, rtol=rounding, atol=1e-6)
    torch.testing.assert_close(found.acceptance, acceptance, rtol=0, atol=rounding)
    assert torch.equal(found.same_top, (base.argmax(1) == model.argmax(1)).double())


def test_a_model_diverges_from_itself_by_exactly_nothing() -> None:
    base, _ = pair(0, 5.0, 0.0)
    found = diverge(Distribution(log_softmax(base)), log_softmax(base))
    assert found.kl.tolist() == [0.0] * len(base)
    assert found.same_top.tolist() == found.acceptance.tolist() == [1.0] * len(base)


@pytest.mark.parametrize("change", [1e-7, 1e-5, 1e-3])
def test_never_negative(change: float) -> None:
    base, model = pair(1, 4.0, change, positions=500)
    assert bool((diverge(Distribution(log_softmax(base)), log_softmax(model)).kl >= 0).all())


@pytest.mark.parametrize("seed", SEEDS)
def test_the_most_probable_tokens_bound_what_all_of_them_give(seed: int) -> None:
    base, model = pair(seed, 3.0, 0.7)
    whole, log_probs = Distribution(log_softmax(base)), log_softmax(model)
    exact = diverge(whole, log_probs)
    last = torch.zeros(len(base), dtype=torch.float64)
    for count in (1, 3, 30, 299, 300, 1000):
        kept = whole.kept(count)
        assert kept.tokens is not None and kept.tail is not None
        assert torch.equal(kept.top, whole.top)
        masses = kept.log_probs.exp().sum(1) + kept.tail.exp()
        torch.testing.assert_close(masses, torch.ones_like(masses))
        found = diverge(kept, log_probs)
        assert bool((found.kl <= exact.kl + 1e-6).all()) and bool((found.kl >= last - 1e-6).all())
        assert bool((found.acceptance >= exact.acceptance - 1e-6).all())
        assert torch.equal(found.same_top, exact.same_top)
        last = found.kl
    torch.testing.assert_close(last, exact.kl, rtol=1e-6, atol=1e-6)


def test_of_equally_probable_tokens_the_same_is_on_top_whatever_is_kept() -> None:
    log_probs = log_softmax(torch.tensor([[0.0, 2.0, 2.0, 2.0, 1.0], [1.0, 1.0, 1.0, 1.0, 1.0]]))
    whole = Distribution(log_probs)
    for count in range(1, 6):
        kept = whole.kept(count)
        assert kept.tokens is not None
        assert torch.equal(kept.top, whole.top)
        assert [len(set(row)) for row in kept.tokens.tolist()] == [count, count]


def test_figures_by_hand() -> None:
    rows = [
        {"kl": [0.1, 0.3], "same_top": [1.0, 1.0], "acceptance": [0.9, 0.7]},
        {"kl": [0.5], "same_top": [0.0], "acceptance": [0.5]},
    ]
    record = figures(rows, ["a", "b"], [0.3, -0.1])
    assert record["positions"] == 3
    assert record["kl_nats_per_token"] == pytest.approx(0.3)
    assert record["kl_nats_percentiles"] == pytest.approx(
        {"50": 0.3, "90": 0.46, "95": 0.48, "99": 0.496, "99.9": 0.4996, "100": 0.5}
    )
    assert record["same_top_share"] == pytest.approx(2 / 3) and record["expected_acceptance"] == pytest.approx(0.7)
    change = record["right_token_probability_change"]
    assert (change["mean"], change["rms"]) == pytest.approx((0.1, math.sqrt(0.05)))
    # residuals of the clusters -0.2 and 0.2; G/(G-1) = 2, n = 3; t of 1 degree 12.706
    half = 12.7062 * math.sqrt(2 * 0.08 / 9)
    assert record["kl_nats_per_token_interval"] == pytest.approx([0.0, 0.3 + half], abs=1e-3)
    assert figures(rows, ["a", "a"], [0.0])["kl_nats_per_token_interval"] is None


def test_perplexities_by_hand() -> None:
    record = perplexity_figures([1.0, 2.0, 3.0], [1.0, 1.0, 2.0], ["a", "b", "c"])
    assert record["base_nll_nats_per_token"] == pytest.approx(4 / 3)
    assert record["perplexity_ratio"] == pytest.approx(math.exp(2 / 3))
    low, high = record["perplexity_ratio_interval"]
    half = 4.30265 * math.sqrt(1.5 * (4 / 9 + 1 / 9 + 1 / 9) / 9)
    assert (math.log(low), math.log(high)) == pytest.approx((2 / 3 - half, 2 / 3 + half), abs=1e-4)
    assert record["perplexity_difference"] == pytest.approx(math.exp(2) - math.exp(4 / 3))
    low, high = record["perplexity_difference_interval"]
    assert (low + high) / 2 == pytest.approx(record["perplexity_difference"])


def test_a_model_broken_beyond_measure_has_a_record() -> None:
    record = perplexity_figures([2000.0, 1.0], [1.0, 1.0], ["a", "b"])
    assert record["perplexity_ratio"] == math.inf
