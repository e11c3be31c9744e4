"""Multiple choice: every protocol from questions to a record.

A protocol turns each question into a raw result, which is what a progress file keeps: {"scores": [log-likelihood in
nats of each option], "prior": [the same without context; pmi only]} or {"text": generated}. The record is a pure
function of the raw results.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from halve.decode.generate import generate
from halve.decode.text_stream import TokenizerLike
from halve.errors import HalveError
from halve.measure.quality.prompts import EncodedPrompt, encode_prompt
from halve.measure.quality.protocols import ChoiceProtocol
from halve.measure.quality.protocols.continuation import TEMPLATES
from halve.measure.quality.race import Question, QuestionSet
from halve.measure.quality.resume import Progress, ProgressFile
from halve.measure.quality.scoring import Node, question_nodes, score, sequence_node
from halve.measure.quality.statistics import accuracy_interval
from halve.measure.quality.task import Evaluation, Figures
from halve.model.decoder import Model
from halve.model.vocabulary import check_ids
from halve.progress import progress as progress_bar
from halve.progress import track

MAX_KINDS = 20  # a field with more values than this is a label, not a kind

# How an option's log-likelihood may be weighed; `continuation` goes by the first
NORMALISATIONS: dict[str, Callable[[str], int]] = {
    "sum": lambda option: 1,
    "per_byte": lambda option: len(option.encode()),
    "per_character": len,
}


@dataclass(frozen=True)
class ChoiceOptions:
    """What a run depends on besides model and questions: the options of a request with their defaults filled in."""

    task: str
    protocol: ChoiceProtocol
    template: str
    limit: int | None
    batch_tokens: int
    seed: int

    def json(self) -> dict[str, Any]:
        """For records and for telling runs apart."""
        return vars(self) | {"protocol": self.protocol.name}


def choice_evaluation(data: QuestionSet, options: ChoiceOptions) -> Evaluation:
    """The questions of a set, to be put to any model."""
    return lambda model, tokenizer, progress_file: run(model, tokenizer, data, options, progress_file)


def run(
    model: Model,
    tokenizer: TokenizerLike,
    data: QuestionSet,
    options: ChoiceOptions,
    progress_file: ProgressFile | None = None,
) -> Figures:
    """Ask every question and return the figures; an interrupted run goes on from `progress_file`."""
    questions = data.questions[: options.limit]
    protocol = options.protocol
    ask = protocol.prompt or TEMPLATES[options.template]
    room = model.config.max_positions - (0 if protocol.read is None else protocol.max_new_tokens)
    encoded = [encode_prompt(tokenizer, ask(q), room) for q in track(questions, len(questions), "tokenize")]
    sent = [*(s for e in encoded for s in e.sequences), *([_start_tokens(tokenizer)] if protocol.prior else [])]
    check_ids(model.config.vocab_size, sent, tokenizer)
    batches = list(_batches(questions, encoded, options.batch_tokens, shared=protocol.read is None))
    label = f"{options.task} {protocol.name}"
    with (
        Progress(progress_file, model, options.json() | {"data": data.files or data.sha256}) as progress,
        progress_bar(label, sum(len(group) for batch in batches for group in batch)) as advance,
    ):
        for number, batch in enumerate(batches):
            indices = [index for group in batch for index in group]
            if not all(str(index) in progress.results for index in indices):
                if protocol.read is None:
                    raw = _score_batch(model, tokenizer, batch, encoded, options)
                else:
                    raw = _generate_batch(model, tokenizer, indices, encoded, options, number)
                progress.add({str(index): raw[index] for index in indices})
            advance(len(indices))
        results = [progress.results.get(str(index)) for index in range(len(questions))]
        record = summarise(questions, encoded, results, options)
        progress.finish()
    return record | {"data": data.name, "data_sha256": data.sha256}


def _batches(
    questions: Sequence[Question], encoded: Sequence[EncodedPrompt], batch_tokens: int, shared: bool
) -> Iterator[list[list[int]]]:
    """Questions that fit, by article, articles of similar length together, longest first.

    An article is one row of a batch where its questions share it, else each of its questions is.
    The division depends on the whole set only, so a resumed run computes the very same batches.
    """
    articles: dict[str, list[int]] = {}
    for index, question in enumerate(questions):
        if not encoded[index].overflow:
            articles.setdefault(question.article, []).append(index)

    def length(group: list[int]) -> int:
        return max(len(s) for index in group for s in encoded[index].sequences)

    batch: list[list[int]] = []
    rows = 0
    for group in sorted(articles.values(), key=length, reverse=True):
        more = 1 if shared else len(group)
        if batch and (rows + more) * length(batch[0]) > batch_tokens:
            yield batch
            batch, rows = [], 0
        batch.append(group)
        rows += more
    if batch:
        yield batch


def _score_batch(
    model: Model,
    tokenizer: TokenizerLike,
    batch: list[list[int]],
    encoded: Sequence[EncodedPrompt],
    options: ChoiceOptions,
) -> dict[int, dict[str, Any]]:
    roots: list[Node] = []
    places: dict[int, slice] = {}
    slots = 0
    for group in batch:
        asked = []
        for index in group:
            prompt = encoded[index]
            places[index] = slice(slots, slots + len(prompt.sequences))
            asked.append((prompt.sequences, prompt.starts, slots))
            slots += len(prompt.sequences)
        roots += question_nodes(asked)
    prior = options.protocol.prior
    if prior:
        start = _start_tokens(tokenizer)
        for index, place in places.items():
            prompt = encoded[index]
            for offset, (tokens, begin) in enumerate(zip(prompt.sequences, prompt.starts, strict=True)):
                roots.append(sequence_node((*start, *tokens[begin:]), slots + place.start + offset, len(start)))
    sums = score(model, roots, slots * (2 if prior else 1), options.batch_tokens).tolist()
    results = {index: {"scores": sums[place]} for index, place in places.items()}
    if prior:
        for index, place in places.items():
            results[index]["prior"] = sums[slots:][place]
    return results


def _start_tokens(tokenizer: TokenizerLike) -> tuple[int, ...]:
    """What stands for "no context": what the tokenizer puts before a text, or the end-of-text token where that is nothing."""
    if tokenizer.bos_ids:
        return tokenizer.bos_ids
    end_of_text = tokenizer.end_of_text_id
    if end_of_text is None:
        raise HalveError("protocol pmi: this tokenizer has neither a BOS nor an EOS token; use protocol continuation")
    return (end_of_text,)


def _generate_batch(
    model: Model,
    tokenizer: TokenizerLike,
    indices: list[int],
    encoded: Sequence[EncodedPrompt],
    options: ChoiceOptions,
    number: int,
) -> dict[int, dict[str, Any]]:
    protocol, sampling = options.protocol, options.protocol.sampling
    if sampling is not None:
        # streams are numbered by row, so every batch begins at a seed of its own
        sampling = replace(sampling, seed=options.seed + (number << 32))
    stop_ids = tokenizer.eos_ids if protocol.stops else ()
    prompts = [encoded[index].sequences[0] for index in indices]
    answers = generate(model, prompts, max_new_tokens=protocol.max_new_tokens, sampling=sampling, stop_ids=stop_ids)
    return {index: {"text": tokenizer.decode(a.tokens)} for index, a in zip(indices, answers, strict=True)}


def summarise(
    questions: Sequence[Question],
    encoded: Sequence[EncodedPrompt],
    results: Sequence[dict[str, Any] | None],
    options: ChoiceOptions,
) -> Figures:
    """The figures of raw results, None where a question overflowed the context."""
    protocol = options.protocol
    picked = [_pick(question, result, protocol) for question, result in zip(questions, results, strict=True)]
    right = [pick == question.answer for pick, question in zip(picked, questions, strict=True)]
    answered = [pick is not None for pick in picked]
    counted = [i for i in range(len(questions)) if answered[i] or not protocol.over_answered]
    accuracy, interval = _accuracy([right[i] for i in counted], [questions[i].article_id for i in counted])
    not_measured = {name: "the task is multiple choice" for name in ("nll_nats_per_token", "perplexity", "tokens")}
    if accuracy is None:
        not_measured["accuracy"] = f"undefined: none of the {len(questions)} questions was answered"
    record: dict[str, Any] = {
        "task": options.task,
        "protocol": protocol.name,
        "template": options.template if protocol.prompt is None else None,
        "limit": options.limit,
        "accuracy": accuracy,
        "accuracy_ci95": interval,
        "questions": len(questions),
        "articles": len({q.article_id for q in questions}),
        "answered": sum(answered),
        "correct": sum(right),
        "chance": sum(1 / len(q.options) for q in questions) / len(questions),
        "overflow": sum(e.overflow for e in encoded),
        "cut": sum(e.cut > 0 for e in encoded),
        "nll_nats_per_token": None,
        "perplexity": None,
        "tokens": None,
        "not_measured": not_measured,
    }
    if protocol.prompt is None:
        record["log_likelihood"] = _normalised(questions, results)
    if protocol.sampling is not None:
        record["sampling"] = asdict(protocol.sampling) | {"seed": options.seed}
    kinds = _by_kind(questions, right, answered)
    if kinds:
        record["by_kind"] = kinds
    record["answers"] = _answers(questions, right, answered)
    return record


def _pick(question: Question, result: dict[str, Any] | None, protocol: ChoiceProtocol) -> int | None:
    """Index of the chosen option, None when there is no answer."""
    if result is None:
        return None
    if protocol.read is not None:
        return protocol.read(result["text"], len(question.options))
    scores = result["scores"]
    if protocol.prior:
        scores = [score - prior for score, prior in zip(scores, result["prior"], strict=True)]
    return _best(scores)


def _best(scores: Sequence[float]) -> int:
    return max(range(len(scores)), key=lambda i: scores[i])


def _accuracy(right: Sequence[bool], clusters: Sequence[str]) -> tuple[float | None, list[float] | None]:
    if not right:
        return None, None
    return sum(right) / len(right), list(accuracy_interval(right, clusters))


def _normalised(questions: Sequence[Question], results: Sequence[dict[str, Any] | None]) -> dict[str, Any]:
    """Accuracy when the log-likelihood is taken as it is, per byte, or per character of the option's text."""
    clusters = [q.article_id for q in questions]
    accuracies = {}
    for name, size in NORMALISATIONS.items():
        right = []
        for question, result in zip(questions, results, strict=True):
            sizes = [size(option) for option in question.options]
            scores = None if result is None else [s / n for s, n in zip(result["scores"], sizes, strict=True)]
            right.append(scores is not None and _best(scores) == question.answer)
        accuracy, interval = _accuracy(right, clusters)
        accuracies[name] = {"accuracy": accuracy, "accuracy_ci95": interval}
    return accuracies


def _by_kind(questions: Sequence[Question], right: Sequence[bool], answered: Sequence[bool]) -> dict[str, Any]:
    """Accuracy by every other field of the data that has 2 to MAX_KINDS values."""
    groups: dict[str, dict[str, list[int]]] = {}
    for index, question in enumerate(questions):
        for name, value in question.kinds:
            groups.setdefault(name, {}).setdefault(value, []).append(index)
    table: dict[str, Any] = {}
    for name, values in groups.items():
        if not 2 <= len(values) <= MAX_KINDS:
            continue
        table[name] = {}
        for value, indices in sorted(values.items()):
            accuracy, interval = _accuracy([right[i] for i in indices], [questions[i].article_id for i in indices])
            counts = {"questions": len(indices), "answered": sum(answered[i] for i in indices)}
            table[name][value] = counts | {"accuracy": accuracy, "accuracy_ci95": interval}
    return table


def _answers(questions: Sequence[Question], right: Sequence[bool], answered: Sequence[bool]) -> dict[str, str]:
    """Per article, one character per question in file order: 1 right, 0 wrong, - not answered."""
    table: dict[str, str] = {}
    for question, ok, given in zip(questions, right, answered, strict=True):
        table[question.article_id] = table.get(question.article_id, "") + ("1" if ok else "0" if given else "-")
    return table
