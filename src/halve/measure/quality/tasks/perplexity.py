"""`perplexity` of a text: non-overlapping windows of the running text, or documents one by one."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

from halve.decode.text_stream import TokenizerLike
from halve.errors import DataError, HalveError
from halve.measure.quality import divergence
from halve.measure.quality.base import Asked, BaseComparison
from halve.measure.quality.resume import Progress, ProgressFile
from halve.measure.quality.scoring import BATCH_TOKENS, score, sequence_node
from halve.measure.quality.task import Evaluation, Figures, Task
from halve.model.config import ModelConfig
from halve.model.decoder import Model
from halve.model.vocabulary import check_ids
from halve.progress import track
from halve.texts import SEPARATOR, json_rows, read_file

if TYPE_CHECKING:
    from halve.measure.quality.options import EvaluationOptions

PROTOCOLS = {
    "windows": "stretches of the running text, each begun as a text is",
    "documents": "each on its own",
    "joined": "stretches of the running text, which alone is begun",
}
DEFAULT_WINDOW = 2048


@dataclass(frozen=True)
class Text:
    """Pieces to be tokenized one by one, and where they come from."""

    pieces: list[str]
    protocol: str
    name: str
    sha256: str


class PerplexityTask(Task):
    """How well a model predicts a text."""

    name = "perplexity"
    figure = "perplexity"
    protocols = PROTOCOLS

    def check(self, options: EvaluationOptions) -> None:
        if options.template is not None:
            raise HalveError(f"template '{options.template}': task perplexity has no template; leave it out")

    def prepare(self, options: EvaluationOptions) -> Evaluation:
        if options.data is None:
            raise DataError("task perplexity has no data of its own; give --data with a .txt, .raw or .jsonl file")
        text = read_text(Path(options.data), options.protocol_name or next(iter(PROTOCOLS)))
        return partial(run, text, options)


PERPLEXITY = PerplexityTask()


def read_text(path: Path, protocol: str) -> Text:
    """The text of a file as the protocol takes it.

    windows, joined: one piece, the whole file (the documents of a .jsonl joined by an empty line). documents: every line
    of a .jsonl, or what stands between the separators of a .txt or .raw, without surrounding white space. Raises DataError.
    """
    assert protocol in PROTOCOLS
    if path.suffix not in (".txt", ".raw", ".jsonl"):
        raise DataError(f"{path}: unknown kind of text '{path.suffix}'; want .txt, .raw or .jsonl with a 'text' field")
    text, content = read_file(path)
    if path.suffix == ".jsonl":
        documents = _jsonl_texts(path, text)
        pieces = documents if protocol == "documents" else ["\n\n".join(documents)]
    else:
        pieces = [part.strip() for part in text.split(SEPARATOR)] if protocol == "documents" else [text]
    pieces = [piece for piece in pieces if piece.strip()]
    if not pieces:
        raise DataError(f"{path}: holds no text; give a file with at least a few words")
    return Text(pieces, protocol, path.name, hashlib.sha256(content).hexdigest())


def _jsonl_texts(path: Path, text: str) -> list[str]:
    texts = []
    for where, row in json_rows(text, path, "want one object per line"):
        if not isinstance(row, dict) or not isinstance(row.get("text"), str):
            raise DataError(f"{where}: no 'text' field with text; want {{\"text\": ...}} on every line")
        texts.append(row["text"])
    return texts


@dataclass(frozen=True)
class Stretch:
    """Tokens of which all but the first are predicted, and the bytes of the text that the predicted ones stand for."""

    tokens: list[int]
    predicted_bytes: int | None  # None: the tokenizer does not tell


def split(tokenizer: TokenizerLike, text: Text, window: int) -> tuple[list[Stretch], int]:
    """Token sequences to be predicted from their second token on, and how many documents were cut to the window.

    With what the tokenizer puts before a text (BOS, mostly, or nothing) before every window and document; before the
    whole text alone in `joined`. Raises HalveError where that leaves a window no token of the text.
    """
    stretches, cut, bos = [], 0, list(tokenizer.bos_ids)
    if len(bos) >= window:
        raise HalveError(f"window {window}: the tokenizer begins a text with {len(bos)} tokens; take a longer window")
    for piece in text.pieces:
        tokens, counts = tokenizer.encode(piece, bos=False), tokenizer.byte_counts(piece)
        begun = bos
        if text.protocol == "joined":  # what stands before the text is none of its bytes
            tokens, counts, begun = bos + tokens, counts and [0] * len(bos) + counts, []
        place = None if counts is None else [0, *accumulate(counts)]
        body = window - len(begun)
        last = 1 if text.protocol == "documents" else len(tokens)
        cut += text.protocol == "documents" and len(tokens) > body
        for begin in range(0, last, body):
            end = min(begin + body, len(tokens))
            if len(begun) + end - begin >= 2:
                covered = None if place is None else place[end] - place[begin + (not begun)]
                stretches.append(Stretch(begun + tokens[begin:end], covered))
    return stretches, cut


def window_of(text: Text, options: EvaluationOptions, config: ModelConfig) -> int:
    """Tokens a window that a model of this config is asked in. Raises HalveError where its context does not hold them."""
    context, window = config.max_positions, options.window
    if window is None:
        window = context if text.protocol == "documents" else min(DEFAULT_WINDOW, context)
    if not 2 <= window <= context:
        raise HalveError(f"window {window}: must be 2 to {context}, the context of this model")
    return window


def asked_stretches(
    text: Text, options: EvaluationOptions, config: ModelConfig, tokenizer: TokenizerLike
) -> tuple[list[Stretch], int]:
    """What a model of this config is asked, see `split`; needs no weights.

    Raises HalveError on a bad window or tokens that the model does not have, DataError on too short a text.
    """
    stretches, cut = split(tokenizer, text, window_of(text, options, config))
    stretches = stretches[: options.limit]
    if not stretches:
        raise DataError(f"{text.name}: fewer than 2 tokens, nothing can be predicted; give a longer text")
    check_ids(config.vocab_size, [stretch.tokens for stretch in stretches], tokenizer)
    return stretches, cut


def run(
    text: Text,
    options: EvaluationOptions,
    model: Model,
    tokenizer: TokenizerLike,
    progress_file: ProgressFile | None = None,
    comparison: BaseComparison | None = None,
) -> Figures:
    """Mean negative log-likelihood (nats) over all predicted tokens and its exponential, as a record's figures; with a
    comparison those of its base and the divergence from it as well.

    An interrupted run goes on from `progress_file`. Raises HalveError on a bad window, DataError on too short a text.
    """
    window, batch_tokens = window_of(text, options, model.config), options.batch_tokens or BATCH_TOKENS
    stretches, cut = asked_stretches(text, options, model.config, tokenizer)
    sequences = [stretch.tokens for stretch in stretches]
    asked: dict[str, Any] = {"task": "perplexity", "protocol": text.protocol, "window": window, "limit": options.limit}
    asked |= {"batch_tokens": batch_tokens, "data": {text.name: text.sha256}}
    if comparison is not None:
        same = Asked.of("perplexity", text.protocol, None, text.sha256, sequences, model)
        comparison.begin(same, lambda other: [s.tokens for s in split(other, text, window)[0][: options.limit]])
        asked["base"] = comparison.about
    with Progress(progress_file, model, asked) as progress:
        batches = _batches(sequences, batch_tokens)
        for batch in track(batches, len(batches), f"perplexity {text.protocol}"):
            if all(str(index) in progress.results for index in batch):
                continue
            nodes = [sequence_node(sequences[index], slot) for slot, index in enumerate(batch)]
            if comparison is not None:
                progress.add(comparison.run(model, nodes, [str(index) for index in batch], batch_tokens))
                continue
            sums = score(model, nodes, len(batch), batch_tokens).tolist()
            progress.add({str(index): {"log_probs": [value]} for index, value in zip(batch, sums, strict=True)})
        rows = [progress.results[str(index)] for index in range(len(sequences))]
        progress.finish()
    nll = -math.fsum(value for row in rows for value in row["log_probs"])
    record = _record(stretches, nll, text.protocol, window)
    if comparison is not None and comparison.compares:
        record |= _compared(rows)
    record |= {"limit": options.limit, "data": text.name, "data_sha256": text.sha256}
    if text.protocol == "documents":
        record["cut"] = cut
    return record


def _compared(rows: list[Mapping[str, list[float]]]) -> Figures:
    """The divergence from the base; a document or window is a cluster."""
    model, base = ([v for row in rows for v in row[key]] for key in ("log_probs", "base_log_probs"))
    clusters = [index for index, row in enumerate(rows) for _ in row["log_probs"]]
    changes = [math.exp(q) - math.exp(p) for q, p in zip(model, base, strict=True)]
    record = divergence.figures(rows, range(len(rows)), changes)
    return record | divergence.perplexity_figures([-q for q in model], [-p for p in base], clusters)


def _batches(sequences: Sequence[Sequence[int]], batch_tokens: int) -> list[list[int]]:
    """Indices of sequences of similar length together, longest first."""
    batches: list[list[int]] = []
    for index in sorted(range(len(sequences)), key=lambda i: -len(sequences[i])):
        if not batches or (len(batches[-1]) + 1) * len(sequences[batches[-1][0]]) > batch_tokens:
            batches.append([])
        batches[-1].append(index)
    return batches


def _record(stretches: Sequence[Stretch], nll_nats: float, protocol: str, window: int) -> dict[str, Any]:
    tokens = sum(len(stretch.tokens) - 1 for stretch in stretches)
    counted = [stretch.predicted_bytes for stretch in stretches if stretch.predicted_bytes is not None]
    predicted_bytes = sum(counted) if len(counted) == len(stretches) else 0
    mean = nll_nats / tokens
    absent = ("accuracy", "accuracy_ci95", "questions", "answered")
    not_measured = {name: "the task is perplexity" for name in absent}
    if not predicted_bytes:
        not_measured["bits_per_byte"] = "the tokenizer does not tell which bytes of the text its tokens stand for"
    try:
        perplexity = math.exp(mean)
    except OverflowError:  # a model broken beyond measure
        perplexity = math.inf
    return {
        "task": "perplexity",
        "protocol": protocol,
        "window": window,
        "documents" if protocol == "documents" else "windows": len(stretches),
        "tokens": tokens,
        "nll_nats_per_token": mean,
        "perplexity": perplexity,
        "bits_per_byte": nll_nats / math.log(2) / predicted_bytes if predicted_bytes else None,
        "accuracy": None,
        "accuracy_ci95": None,
        "questions": None,
        "answered": None,
        "not_measured": not_measured,
    }
