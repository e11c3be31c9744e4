"""What models are asked in a search: questions or a text, in two parts that share nothing, nor with the calibration text."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from halve.decode.text_stream import TokenizerLike
from halve.errors import DataError, HalveError
from halve.measure.quality.base_file import BASE_TOKENS
from halve.measure.quality.multiple_choice import ChoiceOptions, choice_evaluation
from halve.measure.quality.options import EvaluationOptions
from halve.measure.quality.race import QuestionSet, load_question_set
from halve.measure.quality.splits import (
    divide,
    first_side,
    part_names,
    shared,
    shared_paragraphs,
    unshared,
    without_shared,
)
from halve.measure.quality.task import Evaluation
from halve.measure.quality.tasks import QUESTION_TASKS
from halve.measure.quality.tasks.perplexity import PERPLEXITY, PROTOCOLS, Text, asked_stretches, read_text, run
from halve.measure.quality.tasks.question_task import QuestionTask
from halve.model.config import ModelConfig
from halve.studies.search.figures import FIGURES
from halve.studies.search.options import TEXT_TASK, Floor, SearchOptions
from halve.texts import SEPARATOR

OF_QUESTIONS, OF_TEXT = ("accuracy",), ("kl", "same-top")  # what each measures of a model's quality
_LINE = 2000  # characters within which a running text is cut at the end of a line, and else of a word


@dataclass(frozen=True)
class Part:
    """One part of what is asked, ready to be put to any number of models.

    articles: what is read, by the name that messages use; one of a running text. counts: how much is asked, in words of
    its own. against_dense: whether models are compared with the dense one, whose predictions are kept for that.
    """

    name: str
    sha256: str
    files: dict[str, str]
    articles: Mapping[str, str]
    counts: dict[str, int]
    evaluation: Evaluation
    running: bool = False
    against_dense: bool = False

    @property
    def about(self) -> dict[str, Any]:
        """For records."""
        return {"name": self.name, **self.counts, "sha256": self.sha256}

    def check_shares_nothing(self, texts: list[str], source: str) -> None:
        """Raise DataError when what is asked is in `texts`, which are `source`'s."""
        articles = list(self.articles.values())
        found = shared_paragraphs(articles[0], texts) if self.running else shared(articles, texts)
        if not found:
            return
        if self.running:
            what, first = f"{len(found)} of its paragraphs", f"begins '{' '.join(found[0].split())[:40]}'"
        else:
            what = f"{len(found)} of its {len(articles)} articles"
            first = f"is {next(name for name, article in self.articles.items() if article == found[0])}"
        raise DataError(
            f"{self.name}: {what} are in {source} as well (the first {first}): the figures would be too good; take them out "
            "of one of the two"
        )


@dataclass(frozen=True)
class AskedParts:
    """What models are asked: trials one part, the winner another. `figures`: what that tells of their quality, of FIGURES;
    `about`: all options, to tell searches apart; `kept_tokens`: of the dense model's distributions, from which KL is then a
    lower bound, None for all of them; `divided`: both parts are of one file, and share nothing by that."""

    task: str
    protocol: str
    template: str | None
    limit: int | None
    about: dict[str, Any]
    figures: tuple[str, ...]
    search: Part
    final: Part
    divided: bool
    kept_tokens: int | None = None


def check_overlaps(asked: AskedParts, calibration: str, documents: list[str] | None) -> None:
    """Nothing of the final test may have been searched or calibrated on, nothing of the search calibrated on.

    documents: those of the calibration text, None where no step reads it. Raises DataError.
    """
    if not asked.divided:
        asked.final.check_shares_nothing(list(asked.search.articles.values()), asked.search.name)
    for part in (asked.final, asked.search) if documents is not None else ():
        part.check_shares_nothing(documents or [], f"calibration text {Path(calibration).name}")


def quality_of(evaluation: EvaluationOptions, floor: Floor) -> tuple[str, ...]:
    """The figures of quality that are measured. Raises HalveError when the limit is on another one."""
    of_text = evaluation.task == PERPLEXITY.name
    figures = OF_TEXT if of_text else OF_QUESTIONS
    if floor.limited.of_quality and floor.figure not in figures:
        if of_text:
            raise HalveError(
                f"{floor.text}: the floor is an accuracy, which a text does not give: use max_kl or min_same_top, or task "
                f"{' or '.join(QUESTION_TASKS)}"
            )
        raise HalveError(f"{floor.text}: is measured on a text, not by task {evaluation.task}: use task {TEXT_TASK}")
    if of_text and evaluation.data is None:
        raise DataError(f"task {TEXT_TASK} has no data of its own; give --data with a .txt, .raw or .jsonl file")
    return figures


def exam_of(
    evaluation: EvaluationOptions,
    options: SearchOptions,
    floor: Floor,
    calibration: Callable[[], list[str] | None],
    config: ModelConfig,
    tokenizer: TokenizerLike,
) -> AskedParts:
    """Read and check what models of this config are asked, in its two parts; calibration: reads the documents of that text,
    where there is one. Raises HalveError and DataError."""
    if evaluation.task in QUESTION_TASKS:
        return _questions(QUESTION_TASKS[evaluation.task], evaluation, options)
    return _text(evaluation, options, floor, calibration, config, tokenizer)


def _questions(task: QuestionTask, evaluation: EvaluationOptions, options: SearchOptions) -> AskedParts:
    asked = task.choice_options(evaluation)
    if evaluation.data is None and task.questions is None:
        load_question_set(None, None)  # says what is missing
    searched = load_question_set(evaluation.data, task.search_questions)
    divided = options.held_out_data is None and evaluation.data is not None
    if divided:
        searched, final = divide(searched, options.search_share)
    else:
        final = load_question_set(options.held_out_data, task.questions)
        if options.leave_out_shared or evaluation.data is None:
            searched = without_shared(searched, final)
    about = asked.json()
    parts = _question_part(searched, asked), _question_part(final, replace(asked, limit=None))
    return AskedParts(
        asked.task, asked.protocol.name, asked.template, asked.limit, about, OF_QUESTIONS, *parts, divided
    )


def _question_part(data: QuestionSet, asked: ChoiceOptions) -> Part:
    chosen = data.questions[: asked.limit]
    counts = {"questions": len(chosen), "articles": len({q.article_id for q in chosen})}
    articles: dict[str, str] = {}
    for question in data.questions:
        articles.setdefault(question.article_id, question.article)
    return Part(data.name, data.sha256, data.files, articles, counts, choice_evaluation(data, asked))


@dataclass(frozen=True)
class _Documents:
    """A text as its documents, what stands between them in a running text, and the SHA-256 of its file by name."""

    name: str
    documents: list[str]
    between: str
    files: dict[str, str]

    @classmethod
    def read(cls, data: str | Path) -> _Documents:
        path = Path(data)
        text = read_text(path, "documents")
        return cls(path.name, text.pieces, "\n\n" if path.suffix == ".jsonl" else SEPARATOR, {path.name: text.sha256})

    def text(self, protocol: str) -> Text:
        pieces = self.documents if protocol == "documents" else [self.between.join(self.documents)]
        return Text(pieces, protocol, self.name, hashlib.sha256(repr(pieces).encode()).hexdigest())

    def without(self, others: list[str], source: str) -> _Documents:
        """Without the documents that share content with `others`. Raises DataError when all do."""
        return replace(self, documents=unshared(self.documents, others, self.name, source))

    def divided(self, share: float, protocol: str) -> tuple[_Documents, _Documents]:
        """About `share` of the characters, and the others: documents that share content stay on one side; a running text
        is cut once. Raises DataError when a side is empty."""
        sizes = {document: len(document) for document in self.documents}
        if len(sizes) == 1 and protocol != "documents":
            sides = _cut(self.documents[0], share)
        else:
            first = first_side(sizes, share)
            sides = [[d for d in self.documents if (d in first) is side] for side in (True, False)]
        if not all(sides):
            raise DataError(
                f"{self.name}: its {len(sizes)} documents cannot be divided into two parts that share no text: "
                "give the text for the final test apart (held_out_data)"
            )
        one, other = (replace(self, name=n, documents=d) for n, d in zip(part_names(self.name), sides, strict=True))
        return one, other


def _cut(text: str, share: float) -> list[list[str]]:
    """A running text in two, after the end of a line or else of a word; a part without text is empty."""
    place = round(share * len(text))
    end = re.compile(r"\n").search(text, place, place + _LINE) or re.compile(r"\s").search(text, place)
    at = end.end() if end else len(text)
    return [[part] if part.strip() else [] for part in (text[:at], text[at:])]


def _text(
    evaluation: EvaluationOptions,
    options: SearchOptions,
    floor: Floor,
    calibration: Callable[[], list[str] | None],
    config: ModelConfig,
    tokenizer: TokenizerLike,
) -> AskedParts:
    assert evaluation.data is not None
    protocol = evaluation.protocol_name or next(iter(PROTOCOLS))
    searched = _Documents.read(evaluation.data)
    divided = options.held_out_data is None
    if options.held_out_data is None:
        searched, final = searched.divided(options.search_share, protocol)
    else:
        final = _Documents.read(options.held_out_data)
    if options.leave_out_shared:
        used = calibration() or []
        searched, final = (part.without(used, "the calibration text") for part in (searched, final))
        searched = searched if divided else searched.without(final.documents, final.name)
    parts = []
    for documents, limit in ((searched, evaluation.limit), (final, None)):
        text, asked = documents.text(protocol), replace(evaluation, limit=limit)
        stretches, _ = asked_stretches(text, asked, config, tokenizer)
        if floor.lower_bound and len(stretches) < 2:
            raise DataError(
                f"{text.name}: is a single one of the {protocol}, from which no interval follows: give a longer text, or "
                "leave out floor_lower_bound"
            )
        running = protocol != "documents" and len(documents.documents) == 1
        unit = "documents" if protocol == "documents" else "windows"
        counts = {unit: len(stretches), "tokens": sum(len(stretch.tokens) - 1 for stretch in stretches)}
        articles = {f"document {number}": document for number, document in enumerate(documents.documents, 1)}
        evaluate = partial(run, text, asked)
        parts.append(
            Part(text.name, text.sha256, documents.files, articles, counts, evaluate, running, against_dense=True)
        )
    kept = BASE_TOKENS if config.vocab_size > BASE_TOKENS else None
    about = evaluation.json() | {"window": evaluation.window, "batch_tokens": evaluation.batch_tokens}
    return AskedParts(TEXT_TASK, protocol, None, evaluation.limit, about, OF_TEXT, parts[0], parts[1], divided, kept)


def keys_of(figures: tuple[str, ...]) -> list[str]:
    """The keys of records that these figures and their intervals have."""
    return [key for name in figures for key in (FIGURES[name].key, FIGURES[name].interval) if key]
