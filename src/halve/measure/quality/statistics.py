"""Intervals and paired tests for answers that come in clusters: the questions of one article are not independent.

Legend: n questions, G articles (clusters), x_i the value of question i (1 right, 0 wrong, or a difference of two such).
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from halve.errors import DataError

CONFIDENCE = 0.95
ROUNDING = 1e-12  # a standard error below this is nothing but rounding


@dataclass(frozen=True)
class PairedTest:
    """Two models on the same questions: `difference` = accuracy of the first minus accuracy of the second."""

    difference: float
    ci95: tuple[float, float]
    p_value: float
    questions: int
    clusters: int
    gained: int  # questions only the first model answers correctly
    lost: int  # questions only the second model answers correctly


def clustered_error(values: Sequence[float], clusters: Sequence[Hashable]) -> tuple[float, float, int]:
    """Mean of the values, its cluster-robust standard error, and the number of clusters G.

    Var(mean) = G/(G-1) * sum over clusters g of (sum over i in g of (x_i - mean))^2 / n^2: Liang and Zeger 1986 for a
    regression on a constant, with the usual G/(G-1) correction; also Miller 2024 (arXiv 2411.00640), equation 4. With
    one question per cluster it is the ordinary standard error. It is infinite when G = 1.
    """
    assert len(values) == len(clusters) > 0
    mean = math.fsum(values) / len(values)
    residuals: dict[Hashable, float] = {}
    for value, cluster in zip(values, clusters, strict=True):
        residuals[cluster] = residuals.get(cluster, 0.0) + (value - mean)
    groups = len(residuals)
    if groups == 1:
        return mean, math.inf, 1
    variance = groups / (groups - 1) * math.fsum(r * r for r in residuals.values()) / len(values) ** 2
    return mean, math.sqrt(variance), groups


def accuracy_interval(correct: Sequence[float], clusters: Sequence[Hashable]) -> tuple[float, float]:
    """95 % interval of the accuracy, clustered: Wilson's (1927), (m + t^2/2k +- t sqrt(m(1-m)/k + t^2/4k^2)) / (1 + t^2/k)
    with the mean m, Student's t with G - 1 degrees of freedom, and k for the number of answers.

    k is the effective sample size m(1-m) / Var(m) of Korn and Graubard 1998 (Survey Methodology 24), n at most: so many
    independent answers have this error. Articles that happen to agree do not make it infinite, as they make Var(m) 0. Near
    0 and 1 the answers say little of how articles differ: the interval is never less than that of G articles which are all
    right or all wrong, whose end is the exact binomial limit 0.025^(1/G) (Clopper and Pearson 1934).
    """
    mean, error, groups = clustered_error(correct, clusters)
    if groups == 1:
        return 0.0, 1.0
    spread, limit = mean * (1 - mean), _unanimous(groups)
    if spread == 0:
        return (limit, 1.0) if mean == 1.0 else (0.0, 1.0 - limit)
    effective = min(len(correct), spread / max(error, ROUNDING) ** 2)
    share = t_quantile(groups - 1) ** 2 / effective
    middle = (mean + share / 2) / (1 + share)
    half = math.sqrt(share * spread + share**2 / 4) / (1 + share)
    return max(0.0, min(middle - half, limit)), min(1.0, max(middle + half, 1 - limit))


def _unanimous(groups: int) -> float:
    """The least accuracy at which all of G articles are right in 2.5 % of cases."""
    return ((1 - CONFIDENCE) / 2) ** (1 / groups)


def paired_test(first: Sequence[float], second: Sequence[float], clusters: Sequence[Hashable]) -> PairedTest:
    """Test whether two vectors of answers (1 right, 0 wrong) to the same questions have the same mean.

    A t test of the mean difference per question with the clustered standard error and G - 1 degrees of freedom. Where
    all clusters differ by the same amount that error is 0; the p-value is then that of the exact sign-flip test over
    clusters, 2^(1-G). The interval reaches at least as far to both sides as that of G articles which all agree.
    """
    assert len(first) == len(second)
    differences = [a - b for a, b in zip(first, second, strict=True)]
    mean, error, groups = clustered_error(differences, clusters)
    if groups == 1:
        interval, p_value = (-1.0, 1.0), 1.0
    else:
        half = max(t_quantile(groups - 1) * error, 1 - _unanimous(groups))
        interval = max(-1.0, mean - half), min(1.0, mean + half)
        certain = 1.0 if mean == 0 else 2.0 ** (1 - groups)
        p_value = two_sided_p(abs(mean) / error, groups - 1) if error > ROUNDING else certain
    gained = sum(d > 0 for d in differences)
    lost = sum(d < 0 for d in differences)
    return PairedTest(mean, interval, p_value, len(differences), groups, gained, lost)


def paired_records(record: Mapping[str, Any], baseline: Mapping[str, Any]) -> PairedTest:
    """The paired test of two multiple-choice records; an unanswered question counts as wrong in both.

    Raises DataError when they do not answer the same questions in the same way.
    """
    for key in ("task", "protocol", "template", "data_sha256"):
        if record.get(key) != baseline.get(key):
            raise DataError(
                f"{key}: '{record.get(key)}' against '{baseline.get(key)}'; only runs with the same {key} can be paired"
            )
    answers, others = record.get("answers"), baseline.get("answers")
    if not answers or not others:
        raise DataError("answers: missing from a record; only multiple-choice records of this version can be paired")
    if {a: len(given) for a, given in answers.items()} != {a: len(given) for a, given in others.items()}:
        counts = f"{sum(map(len, answers.values()))} against {sum(map(len, others.values()))}"
        raise DataError(f"questions: {counts}; only runs over the same questions can be paired (same --limit)")
    first, second, clusters = [], [], []
    for article, given in answers.items():
        first += [float(mark == "1") for mark in given]
        second += [float(mark == "1") for mark in others[article]]
        clusters += [article] * len(given)
    return paired_test(first, second, clusters)


def two_sided_p(t: float, degrees: int, steps: int = 2000) -> float:
    """P(|T| > t) for Student's T with `degrees` degrees of freedom.

    With T = sqrt(degrees) tan(a) the density becomes cos(a)^(degrees-1) on a finite range, which Simpson's rule
    integrates without loss in the tail.
    """
    assert t >= 0 and degrees >= 1
    start = math.atan(t / math.sqrt(degrees))
    # beyond this many standard widths past the start the integrand is below 1e-40 of its first value
    end = min(math.pi / 2, start + 14 / math.sqrt(degrees))
    width = (end - start) / steps
    total = 0.0
    for i in range(steps + 1):
        weight = 1 if i in (0, steps) else 4 if i % 2 else 2
        total += weight * math.cos(start + i * width) ** (degrees - 1)
    log_constant = math.lgamma((degrees + 1) / 2) - math.lgamma(degrees / 2) - 0.5 * math.log(math.pi)
    return min(1.0, 2 * math.exp(log_constant) * total * width / 3)


@cache
def t_quantile(degrees: int, confidence: float = CONFIDENCE) -> float:
    """The t with P(|T| <= t) = confidence, by bisection (12.706 for 1 degree of freedom, 1.960 for many)."""
    low, high = 0.0, 1e3
    for _ in range(60):
        middle = (low + high) / 2
        if two_sided_p(middle, degrees) > 1 - confidence:
            low = middle
        else:
            high = middle
    return (low + high) / 2
