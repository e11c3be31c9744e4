"""Questions and texts divided by article into two sets that share no text, and a check that sets and calibration text do not.

Two texts share content when one holds RUN_WORDS consecutive words of an article in the other (all words of a shorter
one), compared without case and punctuation. Articles of fewer than SHORT_WORDS words only match a text equal to them.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence

from halve.errors import DataError
from halve.measure.quality.race import Question, QuestionSet

RUN_WORDS = 24
SHORT_WORDS = 8


def divide(data: QuestionSet, share: float) -> tuple[QuestionSet, QuestionSet]:
    """About `share` of the questions, and the others; articles that share content stay on one side.

    The same questions are always divided in the same way, whatever their order. Raises DataError when a side is empty.
    """
    counts: dict[str, int] = {}
    for question in data.questions:
        counts[question.article] = counts.get(question.article, 0) + 1
    first = first_side(counts, share)
    sides = [[q for q in data.questions if (q.article in first) is side] for side in (True, False)]
    if not all(sides):
        raise DataError(
            f"{data.name}: its {len(counts)} articles cannot be divided into two sets that share no text: "
            "give the questions for the final test apart (held_out_data)"
        )
    first_name, other_name = part_names(data.name)
    return named_set(sides[0], first_name, data.files), named_set(sides[1], other_name, data.files)


def first_side(sizes: Mapping[str, int], share: float) -> set[str]:
    """Articles with about `share` of the sizes of all, none of which shares content with one that is left out.

    They follow from the articles and sizes, not from their order; they may be all.
    """
    articles = list(sizes)
    order = sorted(_related(articles), key=lambda group: min(_digest(articles[i]) for i in group))
    wanted, taken, first = share * sum(sizes.values()), 0, set()
    for group in order:
        size = sum(sizes[articles[i]] for i in group)
        if taken and taken + size / 2 > wanted:
            break
        taken += size
        first.update(articles[i] for i in group)
    return first


def part_names(name: str) -> tuple[str, str]:
    """What the parts of divided data are called."""
    return f"{name}, search part", f"{name}, held-out part"


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
    return [articles[article] for article in shared(list(articles), texts)]


def shared(articles: Sequence[str], texts: Sequence[str]) -> list[str]:
    """The articles whose content is in one of `texts`."""
    found = {article for article, _ in _matches(articles, texts)}
    return [article for index, article in enumerate(articles) if index in found]


def shared_paragraphs(text: str, texts: Sequence[str]) -> list[str]:
    """The lines and paragraphs of a running text, of RUN_WORDS words or more, that are one of `texts` as well.

    A running text is not refused for a phrase: of a long one some words in a row are anywhere.
    """
    others = {tuple(words) for other in texts for _, words in _paragraphs(other)}
    return [paragraph for paragraph, words in _paragraphs(text) if tuple(words) in others]


def _paragraphs(text: str) -> Iterator[tuple[str, list[str]]]:
    for paragraph in dict.fromkeys([*re.split(r"\n\s*\n", text), *text.split("\n")]):
        words = _words(paragraph)
        if len(words) >= RUN_WORDS:
            yield paragraph, words


def without_shared(data: QuestionSet, other: QuestionSet) -> QuestionSet:
    """`data` without the questions whose article shares content with one of `other`; itself where none does.

    Raises DataError when nothing is left.
    """
    articles, others = [list(dict.fromkeys(q.article for q in one.questions)) for one in (data, other)]
    kept = set(unshared(articles, others, data.name, other.name))
    left = [q for q in data.questions if q.article in kept]
    return data if len(left) == len(data.questions) else named_set(left, data.name, data.files)


def unshared(articles: Sequence[str], others: Sequence[str], name: str, other_name: str) -> list[str]:
    """The articles that share no content with one of `others`. Raises DataError, with both names, when all do."""
    gone = {index for _, index in _matches(others, articles)} | {index for index, _ in _matches(articles, others)}
    left = [article for index, article in enumerate(articles) if index not in gone]
    if not left:
        raise DataError(f"{name}: all of its articles are in {other_name} as well: use others for one of them")
    return left


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
