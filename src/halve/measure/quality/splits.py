"""Questions divided by article into two sets that share no text, and a check that sets and calibration text do not.

Two texts share content when one holds RUN_WORDS consecutive words of an article in the other (all words of a shorter
one), compared without case and punctuation. Articles of fewer than SHORT_WORDS words only match a text equal to them.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence

from halve.errors import DataError
from halve.measure.quality.race import Question, QuestionSet

RUN_WORDS = 24
SHORT_WORDS = 8


def divide(data: QuestionSet, share: float) -> tuple[QuestionSet, QuestionSet]:
    """About `share` of the questions, and the others; articles that share content stay on one side.

    The same questions are always divided in the same way, whatever their order. Raises DataError when a side is empty.
    """
    articles = list(dict.fromkeys(q.article for q in data.questions))
    groups = _related(articles)
    order = sorted(groups, key=lambda group: min(_digest(articles[i]) for i in group))
    count = {article: 0 for article in articles}
    for question in data.questions:
        count[question.article] += 1
    wanted, taken, first = share * len(data.questions), 0, set()
    for group in order:
        size = sum(count[articles[i]] for i in group)
        if taken and taken + size / 2 > wanted:
            break
        taken += size
        first.update(articles[i] for i in group)
    sides = [[q for q in data.questions if (q.article in first) is side] for side in (True, False)]
    if not all(sides):
        raise DataError(
            f"{data.name}: its {len(articles)} articles cannot be divided into two sets that share no text: "
            "give the questions for the final test apart (held_out_data)"
        )
    names = (f"{data.name}, search part", f"{data.name}, held-out part")
    return named_set(sides[0], names[0], data.files), named_set(sides[1], names[1], data.files)


def named_set(questions: list[Question], name: str, files: dict[str, str] | None = None) -> QuestionSet:
    """A set of its own, with the SHA-256 of its questions, and of the files they are from."""
    digest = hashlib.sha256()
    for question in questions:
        digest.update(repr((question.article, question.text, question.options, question.answer)).encode())
    return QuestionSet(questions, name, digest.hexdigest(), files or {})


def shared_articles(data: QuestionSet, texts: Sequence[str]) -> list[Question]:
    """The first question of every article of `data` whose content is in one of `texts`."""
    articles: dict[str, Question] = {}
    for question in data.questions:
        articles.setdefault(question.article, question)
    shared = {article for article, _ in _matches(list(articles), texts)}
    return [question for index, question in enumerate(articles.values()) if index in shared]


def without_shared(data: QuestionSet, other: QuestionSet) -> QuestionSet:
    """`data` without the questions whose article shares content with one of `other`; itself where none does.

    Raises DataError when nothing is left.
    """
    articles, others = [list(dict.fromkeys(q.article for q in one.questions)) for one in (data, other)]
    gone = {articles[text] for _, text in _matches(others, articles)}
    gone |= {articles[article] for article, _ in _matches(articles, others)}
    left = [q for q in data.questions if q.article not in gone]
    if not left:
        raise DataError(
            f"{data.name}: all of its articles are in {other.name} as well: use other questions for one of them"
        )
    return data if not gone else named_set(left, data.name, data.files)


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def _length(words: list[str]) -> int:
    """How many consecutive words of an article count as its content."""
    return min(RUN_WORDS, len(words))


def _runs(words: list[str], length: int) -> Iterator[bytes]:
    for start in range(len(words) - length + 1):
        yield hashlib.blake2b(" ".join(words[start : start + length]).encode(), digest_size=12).digest()


def _matches(articles: Sequence[str], texts: Sequence[str]) -> Iterator[tuple[int, int]]:
    """(article, text) for every pair that shares content."""
    owners: dict[int, dict[bytes, list[int]]] = {}
    for index, article in enumerate(articles):
        words = _words(article)
        runs = owners.setdefault(_length(words), {})
        for run in _runs(words, _length(words)):
            runs.setdefault(run, []).append(index)
    for number, text in enumerate(texts):
        words = _words(text)
        for length, runs in owners.items():
            if length < SHORT_WORDS and length != len(words):
                continue
            for run in _runs(words, length):
                for index in runs.get(run, ()):
                    yield index, number


def _related(articles: Sequence[str]) -> list[list[int]]:
    """Articles in groups: those that share content, directly or through others, together."""
    parent = list(range(len(articles)))

    def root(index: int) -> int:
        while parent[index] != index:
            parent[index] = parent[parent[index]]
            index = parent[index]
        return index

    for one, other in _matches(articles, articles):
        parent[root(one)] = root(other)
    groups: dict[int, list[int]] = {}
    for index in range(len(articles)):
        groups.setdefault(root(index), []).append(index)
    return list(groups.values())
