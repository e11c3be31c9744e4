"""Multiple choice: every protocol from questions to a record.

A protocol turns each question into a raw result, which is what a progress file keeps: {"scores": [log-likelihood in
nats of each option], "prior": [the same without context; pmi only]} or {"text": generated}. The record is a pure
function of the raw results.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

from halve.decode.generate import generate
from halve.decode.text_stream import TokenizerLike
from halve.errors import HalveError
from halve.measure.quality import divergence
from halve.measure.quality.base import Asked, BaseComparison
from halve.measure.quality.prompts import EncodedPrompt, encode_prompt
from halve.measure.quality.protocols import ChoiceProtocol
from halve.measure.quality.protocols.continuation import TEMPLATES
from halve.measure.quality.race import Question, QuestionSet
from halve.measure.quality.resume import Progress, ProgressFile
from halve.measure.quality.scoring import Node, question_nodes, score, sequence_node
from halve.measure.quality.statistics import accuracy_interval, paired_test
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
    return partial(run, data, options)


def run(
    data: QuestionSet,
    options: ChoiceOptions,
    model: Model,
    tokenizer: TokenizerLike,
    progress_file: ProgressFile | None = None,
    comparison: BaseComparison | None = None,
) -> Figures:
    """Ask every question and return the figures; an interrupted run goes on from `progress_file`. With a comparison the
    answers of its base and the divergence from it are among them."""
    questions = data.questions[: options.limit]
    protocol = options.protocol
    ask = protocol.prompt or TEMPLATES[options.template]
    room = model.config.max_positions - (0 if protocol.read is None else protocol.max_new_tokens)

    def encode(tokenizer: TokenizerLike) -> list[EncodedPrompt]:
        return [encode_prompt(tokenizer, ask(q), room) for q in track(questions, len(questions), "tokenize")]

    encoded = encode(tokenizer)
    sent = [*_sequences(encoded), *([_start_tokens(tokenizer)] if protocol.prior else [])]
    check_ids(model.config.vocab_size, sent, tokenizer)
    asked = options.json() | {"data": data.files or data.sha256}
    if comparison is not None:
        same = Asked.of(options.task, protocol.name, options.template, data.sha256, _sequences(encoded), model)
        comparison.begin(same, lambda other: _sequences(encode(other)))
        asked["base"] = comparison.about
    batches = list(_batches(questions, encoded, options.batch_tokens, shared=protocol.read is None))
    label = f"{options.task} {protocol.name}"
    with (
        Progress(progress_file, model, asked) as progress,
        progress_bar(label, sum(len(group) for batch in batches for group in batch)) as advance,
    ):
        for number, batch in enumerate(batches):
            indices = [index for group in batch for index in group]
            if not all(str(index) in progress.results for index in indices):
                if protocol.read is None:
                    raw = _score_batch(model, tokenizer, batch, encoded, options, comparison)
                else:
                    raw = _generate_batch(model, tokenizer, indices, encoded, options, number)
                progress.add({str(index): raw[index] for index in indices})
            advance(len(indices))
        results = [progress.results.get(str(index)) for index in range(len(questions))]
        record = summarise(questions, encoded, results, options)
        if comparison is not None and comparison.compares:
            record |= _compared(questions, results, protocol)
        progress.finish()
    return record | {"data": data.name, "data_sha256": data.sha256}


def _sequences(encoded: Sequence[EncodedPrompt]) -> list[tuple[int, ...]]:
    return [tokens for prompt in encoded for tokens in prompt.sequences]


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
    comparison: BaseComparison | None,
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
        roots += question_nodes(asked, model.config.length_limit)
    prior = options.protocol.prior
    if prior:
        start = _start_tokens(tokenizer)
        for index, place in places.items():
            prompt = encoded[index]
            for offset, (tokens, begin) in enumerate(zip(prompt.sequences, prompt.starts, strict=True)):
                roots.append(sequence_node((*start, *tokens[begin:]), slots + place.start + offset, len(start)))
    if comparison is not None:
        items = {str(index): place for index, place in places.items()}
        if prior:
            items |= {f"{index}-prior": slice(slots + p.start, slots + p.stop) for index, p in places.items()}
        return _compare_batch(model, comparison, roots, items, options.batch_tokens)
    sums = score(model, roots, slots * (2 if prior else 1), options.batch_tokens).tolist()
    results = {index: {"scores": sums[place]} for index, place in places.items()}
    if prior:
        for index, place in places.items():
            results[index]["prior"] = sums[slots:][place]
    return results


def _compare_batch(
    model: Model, comparison: BaseComparison, roots: Sequence[Node], items: dict[str, slice], batch_tokens: int
) -> dict[int, dict[str, Any]]:
    """Raw results with those of the base, for the slots of each item: a question, or its options without context."""
    item_of_slot = [item for item, place in items.items() for _ in range(place.start, place.stop)]
    results: dict[int, dict[str, Any]] = {}
    for item, row in comparison.run(model, roots, item_of_slot, batch_tokens).items():
        index, _, prior = item.partition("-")
        place = items[item]
        row["slots"] = [slot - place.start for slot in row["slots"]]
        result = results.setdefault(int(index), {"base": {}})
        if not prior:
            result["row"] = row
        for scored, key in ((result, "log_probs"), (result["base"], "base_log_probs")):
            if key in row:
                sums = [0.0] * (place.stop - place.start)
                for slot, value in zip(row["slots"], row[key], strict=True):
                    sums[slot] += value
                scored["prior" if prior else "scores"] = sums
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


def _compared(
    questions: Sequence[Question], results: Sequence[dict[str, Any] | None], protocol: ChoiceProtocol
) -> Figures:
    """What changed from the base: the answers, tested as pairs, and the predictions that options are scored by."""
    asked = [(question, result) for question, result in zip(questions, results, strict=True) if result is not None]
    if not asked:
        return {}
    picks = [_pick(question, result, protocol) for question, result in asked]
    base_picks = [_pick(question, result["base"], protocol) for question, result in asked]
    right, base_right = (
        [float(pick == question.answer) for pick, (question, _) in zip(picked, asked, strict=True)]
        for picked in (picks, base_picks)
    )
    clusters = [question.article_id for question, _ in asked]
    test = paired_test(right, base_right, clusters)
    rows = [result["row"] for _, result in asked]
    changes = [
        math.exp(q) - math.exp(p)
        for (question, _), row in zip(asked, rows, strict=True)
        for option, q, p in zip(row["slots"], row["log_probs"], row["base_log_probs"], strict=True)
        if option == question.answer
    ]
    return {
        "base_accuracy": sum(base_right) / len(questions),
        "agreement": sum(a == b for a, b in zip(picks, base_picks, strict=True)) / len(asked),
        "right_to_wrong": test.lost,
        "wrong_to_right": test.gained,
        "accuracy_difference": test.difference,
        "accuracy_difference_interval": list(test.ci95),
        "accuracy_difference_p_value": test.p_value,
    } | divergence.figures(rows, clusters, changes)


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
