"""Intervals and tests on constructed answers whose errors are known in closed form."""

from __future__ import annotations

import math
import random

import pytest

from halve.errors import DataError
from halve.measure.quality.statistics import (
    accuracy_interval,
    clustered_error,
    paired_records,
    paired_test,
    t_quantile,
    two_sided_p,
)


@pytest.mark.parametrize(
    ("degrees", "expected"), [(1, 12.7062), (2, 4.30265), (10, 2.22814), (30, 2.04227), (1000, 1.96234)]
)
def test_quantiles_are_those_of_the_printed_tables(degrees: int, expected: float) -> None:
    assert t_quantile(degrees) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("t", "degrees", "expected"),
    [
        (0.0, 7, 1.0),
        (1.0, 1, 0.5),  # the Cauchy distribution: P(|T| > 1) = 1 - 2 atan(1) / pi
        (3.0, 2, 1 - 3 / math.sqrt(11)),  # two degrees of freedom: P(|T| > t) = 1 - t / sqrt(t^2 + 2)
        (40.0, 2, 1 - 40 / math.sqrt(1602)),
        (1.959964, 10**6, 0.05),
        (6.0, 10**6, 1.97318e-9),  # the normal distribution's tail: no loss of digits far out
    ],
)
def test_tail_probabilities_with_a_closed_form(t: float, degrees: int, expected: float) -> None:
    assert two_sided_p(t, degrees) == pytest.approx(expected, rel=1e-4)


def test_single_questions_give_the_ordinary_standard_error() -> None:
    # sample variance of (1, 1, 1, 0) is 1/4, over n = 4
    mean, error, groups = clustered_error([1, 1, 1, 0], ["a", "b", "c", "d"])
    assert (mean, groups) == (0.75, 4)
    assert error == pytest.approx(0.25)


def test_answers_that_agree_within_an_article_count_as_one_each() -> None:
    articles = [1, 1, 0, 1, 0, 0, 1, 1]
    answers = [a for a in articles for _ in range(5)]
    clusters = [g for g in range(len(articles)) for _ in range(5)]
    mean, error, groups = clustered_error(answers, clusters)
    one_each = clustered_error(articles, range(len(articles)))
    assert (mean, groups) == (5 / 8, 8)
    # s^2 = (5 * (3/8)^2 + 3 * (5/8)^2) / 7 = 15/56, over 8 articles; five times as many answers bring nothing
    assert error == pytest.approx(math.sqrt(15 / 56 / 8))
    assert error == pytest.approx(one_each[1])


def test_articles_of_unequal_size_by_hand() -> None:
    # mean 3/5; residual sums: a: 2 * 2/5 = 4/5, b: 2/5 - 3/5 - 3/5 = -4/5; G/(G-1) = 2
    mean, error, groups = clustered_error([1, 1, 1, 0, 0], ["a", "a", "b", "b", "b"])
    assert (mean, groups) == (0.6, 2)
    assert error == pytest.approx(math.sqrt(2 * 2 * 0.8**2 / 25))


def test_interval_is_the_mean_and_t_errors_within_the_range() -> None:
    low, high = accuracy_interval([1, 0] * 50, range(100))
    half = 1.984217 * math.sqrt(0.25 / 99)  # t for 99 degrees of freedom
    assert (low, high) == pytest.approx((0.5 - half, 0.5 + half), abs=1e-6)
    assert accuracy_interval([1, 0, 1], ["a", "b", "c"])[1] == 1.0


def test_all_right_or_all_wrong_is_not_a_certainty() -> None:
    low, high = accuracy_interval([1] * 30, [i // 3 for i in range(30)])
    assert high == 1.0
    assert low**10 == pytest.approx(0.025)  # ten articles all right has probability 2.5 % at this accuracy
    assert accuracy_interval([0] * 30, [i // 3 for i in range(30)]) == pytest.approx((0.0, 1 - low))


def test_one_article_says_nothing_about_others() -> None:
    assert accuracy_interval([1, 0, 1, 1], ["a"] * 4) == (0.0, 1.0)


def _simulated(rng: random.Random, articles: int, size: int) -> tuple[list[int], list[int]]:
    """Answers whose accuracy differs from article to article, around 0.6."""
    answers, clusters = [], []
    for article in range(articles):
        p = min(1.0, max(0.0, rng.gauss(0.6, 0.3)))
        answers += [int(rng.random() < p) for _ in range(size)]
        clusters += [article] * size
    return answers, clusters


def test_intervals_cover_the_truth_as_often_as_they_say() -> None:
    rng = random.Random(1)
    truth = sum(min(1.0, max(0.0, rng.gauss(0.6, 0.3))) for _ in range(200_000)) / 200_000
    inside = blind = 0
    for _ in range(800):
        answers, clusters = _simulated(rng, 40, 4)
        low, high = accuracy_interval(answers, clusters)
        inside += low <= truth <= high
        low, high = accuracy_interval(answers, range(len(answers)))
        blind += low <= truth <= high
    # 800 draws at 0.95: standard deviation 0.008
    assert 0.925 <= inside / 800 <= 0.975
    assert blind / 800 < 0.925, "the data must be clustered enough for the clustering to matter"


def test_paired_difference_by_hand() -> None:
    first, second = [1, 1, 1, 0, 1, 1], [0, 1, 0, 0, 1, 1]
    result = paired_test(first, second, ["a", "a", "b", "b", "c", "c"])
    # differences 1 0 1 0 0 0: mean 1/3, residual sums 1/3, 1/3, -2/3; variance 3/2 * (6/9) / 36 = 1/36
    assert result.difference == pytest.approx(1 / 3)
    assert (result.questions, result.clusters, result.gained, result.lost) == (6, 3, 2, 0)
    half = 4.30265 / 6
    assert result.ci95 == pytest.approx((1 / 3 - half, 1.0), abs=1e-6)  # 1.05 is beyond the range
    assert result.p_value == pytest.approx(1 - 2 / math.sqrt(6))  # t = 2 with 2 degrees of freedom


def test_paired_test_of_equal_answers() -> None:
    answers = [1, 0, 1, 1]
    result = paired_test(answers, answers, ["a", "a", "b", "b"])
    assert (result.difference, result.p_value, result.ci95) == (0.0, 1.0, (0.0, 0.0))


def test_paired_test_where_every_article_gains_alike() -> None:
    # ten articles, each one better by one of three: all signs the same way has probability 2 / 2^10
    result = paired_test([1, 1, 0] * 10, [1, 0, 0] * 10, [i // 3 for i in range(30)])
    assert result.p_value == 2.0**-9
    assert result.ci95 == pytest.approx((1 / 3, 1 / 3))


def test_pairing_is_sharper_than_two_intervals() -> None:
    # 400 articles, a third right; the second model loses 8 of the right ones
    base = [int(i % 3 == 0) for i in range(400)]
    worse = [0 if i < 24 else x for i, x in enumerate(base)]
    result = paired_test(worse, base, range(400))
    intervals = [accuracy_interval(x, range(400)) for x in (base, worse)]
    assert result.p_value < 0.01 and result.ci95[1] < 0
    assert intervals[1][1] > intervals[0][0], "the two intervals overlap widely"


def test_false_alarms_are_as_rare_as_the_p_value_says() -> None:
    rng = random.Random(2)
    alarms = 0
    for _ in range(600):
        first, second, clusters = [], [], []
        for article in range(40):
            # per article one of the two models happens to know more, with no difference on the whole
            p, q = rng.sample([0.2, 0.8], 2)
            first += [int(rng.random() < p) for _ in range(4)]
            second += [int(rng.random() < q) for _ in range(4)]
            clusters += [article] * 4
        alarms += paired_test(first, second, clusters).p_value < 0.05
    assert 0.025 <= alarms / 600 <= 0.08


def _record(**changes: object) -> dict[str, object]:
    answers = {"a": "110", "b": "0-"}
    base = {"task": "race-h", "protocol": "letter", "template": None, "data_sha256": "x", "answers": answers}
    return base | changes


def test_records_are_paired_by_article() -> None:
    other = {"b": "01", "a": "100"}
    result = paired_records(_record(), _record(answers=other))
    assert result.difference == 0.0
    assert (result.gained, result.lost, result.clusters) == (1, 1, 2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"protocol": "pmi"}, "protocol"),
        ({"data_sha256": "y"}, "data_sha256"),
        ({"answers": {"a": "110"}}, "5 against 3"),
        ({"answers": None}, "answers"),
    ],
)
def test_records_of_different_questions_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(DataError, match=message):
        paired_records(_record(), _record(**changes))
