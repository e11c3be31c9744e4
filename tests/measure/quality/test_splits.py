"""Questions divided without a shared text, and overlaps found."""

from __future__ import annotations

import random

import pytest

from halve.errors import DataError
from halve.measure.quality.race import Question
from halve.measure.quality.splits import RUN_WORDS, divide, named_set, shared_articles, without_shared

DRAW = random.Random(0)
VOCABULARY = [f"word{n}" for n in range(500)]


def prose(words: int) -> str:
    return " ".join(DRAW.choices(VOCABULARY, k=words))


def ask(article: str, text: str = "?") -> Question:
    return Question(article[:20], article, text, ("a", "b"), 0)


def test_the_halves_share_no_article_and_no_beginning_of_one() -> None:
    stories = [prose(60) for _ in range(40)]
    beginnings = [" ".join(story.split()[:40]) for story in stories]
    data = named_set([ask(a, q) for a in (*stories, *beginnings) for q in ("who?", "where?")], "stories")
    first, second = divide(data, 0.5)
    assert len(first.questions) + len(second.questions) == len(data.questions)
    assert abs(len(first.questions) - 80) <= 4  # groups of four
    starts = [{q.article.split()[0] + q.article.split()[1] for q in side.questions} for side in (first, second)]
    assert not starts[0] & starts[1]
    assert first.sha256 != second.sha256 and first.name != second.name


def test_the_division_follows_the_content_alone() -> None:
    articles = [prose(30) for _ in range(20)]
    one = divide(named_set([ask(a) for a in articles], "x"), 0.3)
    other = divide(named_set([ask(a) for a in reversed(articles)], "y"), 0.3)
    assert {q.article for q in one[0].questions} == {q.article for q in other[0].questions}
    assert 4 <= len(one[0].questions) <= 8


def test_what_cannot_be_divided_is_refused() -> None:
    with pytest.raises(DataError, match="cannot be divided"):
        divide(named_set([ask("one article of all of them"), ask("One article, of all of them!")], "one"), 0.5)


def test_overlaps_are_found_inside_longer_texts_whatever_their_spelling() -> None:
    article = prose(100)
    data = named_set([ask(article), ask(prose(100))], "exam")
    middle = " ".join(article.split()[50 : 50 + RUN_WORDS])
    assert [q.article for q in shared_articles(data, [f"{prose(50)} {middle.upper()}, {prose(50)}"])] == [article]
    too_short = " ".join(article.split()[50 : 50 + RUN_WORDS - 1])
    assert shared_articles(data, [f"{prose(50)} {too_short} {prose(50)}"]) == []


def test_every_article_with_the_same_beginning_is_found() -> None:
    story = prose(80)
    beginnings = [ask(" ".join(story.split()[:words])) for words in (30, 45, 60)]
    assert shared_articles(named_set([*beginnings, ask(prose(60))], "exam"), [prose(10), story]) == beginnings


def test_short_articles_match_whole() -> None:
    text = "She went to the shop and then read the passage with care before she left"
    ten, three = ask("to the shop and then read the passage with care"), ask("Read the passage")
    assert shared_articles(named_set([ten, three], "exam"), [text]) == [ten]
    assert shared_articles(named_set([ten, three], "exam"), ["read the passage"]) == [three]


def test_shared_articles_can_be_left_out_of_the_search_questions() -> None:
    inside, alone = prose(40), prose(60)
    search = named_set([ask(f"{inside} {prose(20)}"), ask(alone), ask("short one, read it")], "search")
    final = named_set([ask(inside), ask(prose(50)), ask("Short one! Read it.")], "final")
    left = without_shared(search, final)
    assert [q.article for q in left.questions] == [alone] and left.sha256 != search.sha256
    assert without_shared(left, final) is left
    with pytest.raises(DataError, match="all of its articles"):
        without_shared(final, final)
