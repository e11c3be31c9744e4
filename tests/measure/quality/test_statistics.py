"""Intervals and tests on constructed answers whose errors are known in closed form."""

from __future__ import annotations

import math
import random
from itertools import pairwise

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


def test_interval_by_hand() -> None:
    low, high = accuracy_interval([1, 0] * 50, range(100))
    # the mean's variance is 1/4 / 99: as good as 99 answers; the ends solve (x - 1/2)^2 = t^2 x (1 - x) / 99
    share = 1.984217**2 / 99
    half = 0.5 * math.sqrt(share / (1 + share))
    assert (low, high) == pytest.approx((0.5 - half, 0.5 + half), abs=1e-6)
    for end in accuracy_interval([1, 1, 1, 0] * 25, range(100)):
        assert (end - 0.75) ** 2 == pytest.approx(share * end * (1 - end), rel=1e-5)


def test_many_answers_have_the_interval_of_the_mean_and_t_errors() -> None:
    clusters = [i // 4 for i in range(4000)]
    mean, error, groups = clustered_error([int(i % 10 < 7) for i in range(4000)], clusters)
    half = t_quantile(groups - 1) * error
    shift = t_quantile(groups - 1) ** 2 * error**2 / (mean * (1 - mean)) * (0.5 - mean)  # t^2 / k (1/2 - m)
    ends = accuracy_interval([int(i % 10 < 7) for i in range(4000)], clusters)
    assert ends == pytest.approx((mean - half + shift, mean + half + shift), abs=2e-5)
    assert abs(shift) < 5e-4


def test_all_right_or_all_wrong_is_not_a_certainty() -> None:
    low, high = accuracy_interval([1] * 30, [i // 3 for i in range(30)])
    assert high == 1.0
    assert low**10 == pytest.approx(0.025)  # ten articles all right has probability 2.5 % at this accuracy
    assert accuracy_interval([0] * 30, [i // 3 for i in range(30)]) == pytest.approx((0.0, 1 - low))


@pytest.mark.parametrize("groups", [2, 3, 10, 40, 300])
@pytest.mark.parametrize(("right", "of"), [(1, 2), (2, 3), (1, 4), (19, 20), (1, 1), (0, 3)])
def test_articles_that_agree_are_not_a_certainty(groups: int, right: int, of: int) -> None:
    answers, clusters = ([1] * right + [0] * (of - right)) * groups, [i // of for i in range(groups * of)]
    low, high = accuracy_interval(answers, clusters)
    # no narrower than as many answers that have nothing to do with each other would allow, of t = 1.96 at least
    independent = 1.96 * math.sqrt(right / of * (1 - right / of) / (of * groups))
    assert high - low > max(independent, 1 / (groups * of)) and 0 <= low <= right / of <= high <= 1


@pytest.mark.parametrize("groups", [2, 10, 30])
def test_a_right_answer_more_lowers_neither_end(groups: int) -> None:
    clusters = [i % groups for i in range(4 * groups)]  # one more of each article before the next of the first
    ends = [accuracy_interval([1] * right + [0] * (4 * groups - right), clusters) for right in range(4 * groups + 1)]
    assert all(one[0] <= more[0] + 1e-9 and one[1] <= more[1] + 1e-9 for one, more in pairwise(ends))
    assert [low for low, _ in ends] == pytest.approx([1 - high for _, high in reversed(ends)])


def test_one_article_says_nothing_about_others() -> None:
    assert accuracy_interval([1, 0, 1, 1], ["a"] * 4) == (0.0, 1.0)


def _simulated(rng: random.Random, articles: int, accuracy: float, alike: float) -> tuple[list[int], list[int]]:
    """Four answers an article, whose accuracy is a beta variate; `alike`: the correlation of two answers of an article."""
    answers, clusters = [], []
    shape = (1 - alike) / alike
    for article in range(articles):
        p = rng.betavariate(accuracy * shape, (1 - accuracy) * shape)
        answers += [int(rng.random() < p) for _ in range(4)]
        clusters += [article] * 4
    return answers, clusters


@pytest.mark.parametrize(
    ("articles", "accuracy", "alike"),
    [(5, 0.6, 0.001), (10, 0.9, 0.1), (20, 0.9, 0.5), (20, 0.97, 0.3), (40, 0.6, 0.4), (120, 0.97, 0.5)],
)
def test_intervals_cover_the_truth_as_often_as_they_say(articles: int, accuracy: float, alike: float) -> None:
    rng, draws = random.Random(1), 600
    inside = above = 0
    for _ in range(draws):
        low, high = accuracy_interval(*_simulated(rng, articles, accuracy, alike))
        inside += low <= accuracy <= high
        above += low > accuracy
    # standard deviations of 0.009 and 0.006; the intervals of few articles are wider than they need be
    assert inside / draws >= 0.925
    assert above / draws <= 0.045, "what a floor under the lower end relies on"
    assert articles < 40 or inside / draws <= 0.985


def test_clustering_matters() -> None:
    rng = random.Random(2)
    blind = 0
    for _ in range(400):
        answers, _ = _simulated(rng, 40, 0.6, 0.4)
        low, high = accuracy_interval(answers, range(len(answers)))
        blind += low <= 0.6 <= high
    assert blind / 400 < 0.925


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
    assert (result.difference, result.p_value) == (0.0, 1.0)
    # another model may do better in each of two articles with a probability up to 1 - sqrt(0.025), and not have shown it
    assert result.ci95 == pytest.approx((math.sqrt(0.025) - 1, 1 - math.sqrt(0.025)))


def test_paired_test_where_every_article_gains_alike() -> None:
    # ten articles, each one better by one of three: all signs the same way has probability 2 / 2^10
    result = paired_test([1, 1, 0] * 10, [1, 0, 0] * 10, [i // 3 for i in range(30)])
    assert result.p_value == 2.0**-9
    reach = 1 - 0.025**0.1
    assert result.ci95 == pytest.approx((1 / 3 - reach, 1 / 3 + reach))


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
