"""Multiple-choice questions in RACE's layout: the original folder of one-JSON-per-file .txt, a .jsonl, or the hub.

One record is an article with its questions: {"article": str, "questions": [str], "options": [[str]], "answers": ["A"]}.
A record may also hold one "question", "options" and "answer" (the hub's layout). Other fields are kept for break-downs.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace
from itertools import chain, count
from pathlib import Path
from typing import Any

from halve.errors import DataError, reading
from halve.texts import hub_rows, json_file, json_rows, read_file

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
HUB_RACE = ("ehovy/race", "high", "test")
LAYOUT = 'want {"article": text, "questions": [...], "options": [[...], ...], "answers": ["A", ...]}'
_LAYOUT_FIELDS = {"id", "example_id", "article", "question", "questions", "options", "answer", "answers"}


@dataclass(frozen=True)
class Question:
    """One question about one article, whose id stands for its text; `answer` is the index of the right option."""

    article_id: str
    article: str
    text: str
    options: tuple[str, ...]
    answer: int
    kinds: tuple[tuple[str, str], ...] = ()  # the record's other fields, for break-downs


@dataclass(frozen=True)
class QuestionSet:
    """All questions of one source, with its name and the SHA-256 of what was read, whole and by file."""

    questions: list[Question]
    name: str
    sha256: str
    files: dict[str, str]


def read_questions(path: Path) -> QuestionSet:
    """Questions of a .jsonl file, a .txt file (one JSON object) or a folder of such .txt files, in name order.

    Raises DataError with file, line, what is wrong and the remedy.
    """
    with reading(path, DataError):
        files = sorted(p for p in path.iterdir() if p.suffix == ".txt") if path.is_dir() else [path]
        there = path.exists()
    if path.is_dir():
        if not files:
            raise DataError(f"{path}: holds no .txt files; name the folder that does (in RACE: RACE/test/high)")
    elif not there:
        raise DataError(f"{path}: no such file or folder; give a .jsonl file or a folder of RACE .txt files")
    digest, questions, hashes = hashlib.sha256(), [], {}
    for file in files:
        text, content = read_file(file)
        if not text.strip():
            raise DataError(f"{file}: is empty; {LAYOUT}")
        if path.is_dir():
            digest.update(file.name.encode() + b"\0")
        digest.update(content)
        hashes[file.name] = hashlib.sha256(content).hexdigest()
        questions += _parse_file(file, text)
    if not questions:
        raise DataError(f"{path}: holds no questions; {LAYOUT}")
    return QuestionSet(_by_article(questions), path.name, digest.hexdigest(), hashes)


def read_hub_questions(name: str, config: str | None, split: str) -> QuestionSet:
    """Questions of a hub dataset in RACE's layout, through the optional `datasets` package.

    Raises DataError when the package is missing, the dataset cannot be fetched, or a row has another layout.
    """
    remedy = "or give --data with a local copy (.jsonl, or RACE's folder of .txt files)"
    rows = hub_rows(name, config, remedy=remedy, split=split)
    digest, questions = hashlib.sha256(), []
    for number, row in enumerate(rows, 1):
        digest.update(json.dumps(row, sort_keys=True, default=str).encode() + b"\n")
        questions += _parse_record(row, f"{name}, row {number}", f"{name}:{number}")
    if not questions:
        raise DataError(f"{name} ({config}, {split}): holds no questions; {LAYOUT}")
    source = ":".join(part for part in (name, config, split) if part)
    return QuestionSet(_by_article(questions), source, digest.hexdigest(), {source: digest.hexdigest()})


def _by_article(questions: list[Question]) -> list[Question]:
    """The questions with one id for each article's text, the first that it has, apart from white space.

    Errors are clustered by it: a line of its own, or an id of its own, makes no question independent of the others.
    """
    names: dict[str, str] = {}
    taken: set[str] = set()
    for question in questions:
        text, name = " ".join(question.article.split()), question.article_id
        if text not in names:
            numbered = (f"{name} ({number})" for number in count(2))  # an id that stands over another article already
            names[text] = next(n for n in chain([name], numbered) if n not in taken)
            taken.add(names[text])
    return [replace(q, article_id=names[" ".join(q.article.split())]) for q in questions]


def load_question_set(data: Path | str | None, default: tuple[str, str, str] | None) -> QuestionSet:
    """Questions of a path, of "hub:NAME[[:CONFIG]:SPLIT]" (split: test), or of the task's `default` hub dataset."""
    if data is None:
        if default is None:
            raise DataError(
                "this task has no data of its own; give --data with a .jsonl file or a folder of .txt files"
            )
        return read_hub_questions(*default)
    if str(data).startswith("hub:"):
        name, *rest = str(data).removeprefix("hub:").split(":")
        if not name or len(rest) > 2:
            raise DataError(f"{data}: malformed; want hub:NAME, hub:NAME:SPLIT or hub:NAME:CONFIG:SPLIT")
        split = rest[-1] if rest else "test"
        return read_hub_questions(name, rest[0] if len(rest) == 2 else None, split)
    return read_questions(Path(data))


def _parse_file(file: Path, text: str) -> list[Question]:
    if file.suffix == ".txt":
        return _parse_record(json_file(text, file, LAYOUT), str(file), file.name)
    if file.suffix != ".jsonl":
        raise DataError(f"{file}: unknown kind of file '{file.suffix}'; want .jsonl, .txt or a folder of .txt files")
    questions = []
    for where, row in json_rows(text, file, LAYOUT):
        questions += _parse_record(row, where, f"{file.name}:{where.rsplit(' ', 1)[-1]}")
    return questions


def _parse_record(record: Any, where: str, fallback_id: str) -> list[Question]:
    if not isinstance(record, dict):
        raise DataError(f"{where}: is a {type(record).__name__}, not an object; {LAYOUT}")
    single = "question" in record and "questions" not in record
    if single:
        record = record | {
            "questions": [record.get("question")],
            "options": [record.get("options")],
            "answers": [record.get("answer")],
        }
    article = record.get("article")
    if not isinstance(article, str) or not article.strip():
        raise DataError(f"{where}: 'article' is {_shown(article)}; it must be non-empty text")
    lists = [record.get(field) for field in ("questions", "options", "answers")]
    for field, value in zip(("questions", "options", "answers"), lists, strict=True):
        if not isinstance(value, list) or not value:
            raise DataError(f"{where}: '{field}' is {_shown(value)}; it must be a non-empty list; {LAYOUT}")
    questions, options, answers = (value for value in lists if value is not None)
    if not len(questions) == len(options) == len(answers):
        counts = f"{len(questions)} questions, {len(options)} lists of options and {len(answers)} answers"
        raise DataError(f"{where}: {counts}; give one list of options and one answer per question")
    identity = record.get("id") or record.get("example_id") or fallback_id
    result = []
    for index, (text, choices, answer) in enumerate(zip(questions, options, answers, strict=True)):
        place = where if single else f"{where}, question {index + 1}"
        choice_texts, right = _checked(text, choices, answer, place)
        result.append(
            Question(str(identity), article, text, choice_texts, right, _kinds(record, index, len(questions)))
        )
    return result


def _checked(text: Any, choices: Any, answer: Any, where: str) -> tuple[tuple[str, ...], int]:
    if not isinstance(text, str):
        raise DataError(f"{where}: the question is {_shown(text)}; it must be text")
    if not isinstance(choices, list) or not 2 <= len(choices) <= len(LETTERS):
        count = len(choices) if isinstance(choices, list) else _shown(choices)
        raise DataError(f"{where}: has {count} options; give a list of 2 to {len(LETTERS)}")
    for number, choice in enumerate(choices):
        if not isinstance(choice, str) or not choice.strip():
            raise DataError(f"{where}: option {LETTERS[number]} is {_shown(choice)}; it must be non-empty text")
    allowed = LETTERS[: len(choices)]
    if not isinstance(answer, str) or len(answer) != 1 or answer not in allowed:
        raise DataError(f"{where}: the answer is {_shown(answer)}; it must be one of {', '.join(allowed)}")
    return tuple(choices), allowed.index(answer)


def _kinds(record: dict[str, Any], index: int, count: int) -> tuple[tuple[str, str], ...]:
    """Other fields of the record that hold one value for the article, or one per question."""
    kinds = []
    for field, value in record.items():
        if field in _LAYOUT_FIELDS:
            continue
        if isinstance(value, list) and len(value) == count:
            value = value[index]
        if isinstance(value, str | int | float | bool):
            kinds.append((field, str(value)))
    return tuple(kinds)


def _shown(value: Any) -> str:
    if value is None:
        return "missing"
    text = json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= 40 else text[:37] + "..."
