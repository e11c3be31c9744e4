"""`perplexity` of a text: non-overlapping windows of the running text, or documents one by one."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from halve.decode.text_stream import TokenizerLike
from halve.errors import DataError, HalveError
from halve.measure.quality import divergence
from halve.measure.quality.base import Asked, BaseComparison
from halve.measure.quality.resume import Progress, fingerprint
from halve.measure.quality.scoring import BATCH_TOKENS, check_ids, score, sequence_node
from halve.measure.quality.task import Evaluation, Figures, Task
from halve.model.decoder import Model
from halve.progress import track
from halve.texts import SEPARATOR, json_rows, read_file

if TYPE_CHECKING:
    from halve.measure.quality.options import EvaluationOptions

PROTOCOLS = {"windows": "stretches of the running text", "documents": "each on its own"}
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

    windows: one piece, the whole file (the documents of a .jsonl joined by an empty line). documents: every line of a
    .jsonl, or what stands between the separators of a .txt or .raw, without surrounding white space. Raises DataError.
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


def split(tokenizer: TokenizerLike, text: Text, window: int) -> tuple[list[list[int]], int]:
    """Token sequences to be predicted from their second token on, and how many documents were cut to the window.

    windows: BOS (where there is one) and the text, in stretches of `window` tokens; documents: BOS + document, cut.
    """
    if text.protocol == "windows":
        tokens = tokenizer.encode(text.pieces[0], bos=True)
        sequences = [tokens[i : i + window] for i in range(0, len(tokens), window)]
        return [s for s in sequences if len(s) >= 2], 0
    sequences = [tokenizer.encode(piece, bos=True) for piece in text.pieces]
    return [s[:window] for s in sequences if len(s) >= 2], sum(len(s) > window for s in sequences)


def run(
    text: Text,
    options: EvaluationOptions,
    model: Model,
    tokenizer: TokenizerLike,
    progress_file: Path | None = None,
    comparison: BaseComparison | None = None,
) -> Figures:
    """Mean negative log-likelihood (nats) over all predicted tokens and its exponential, as a record's figures; with a
    comparison those of its base and the divergence from it as well.

    An interrupted run goes on from `progress_file`. Raises HalveError on a bad window, DataError on too short a text.
    """
    context = model.config.max_positions
    window, batch_tokens = options.window, options.batch_tokens or BATCH_TOKENS
    if window is None:
        window = min(DEFAULT_WINDOW, context) if text.protocol == "windows" else context
    if not 2 <= window <= context:
        raise HalveError(f"window {window}: must be 2 to {context}, the context of this model")
    sequences, cut = split(tokenizer, text, window)
    sequences = sequences[: options.limit]
    if not sequences:
        raise DataError(f"{text.name}: fewer than 2 tokens, nothing can be predicted; give a longer text")
    check_ids(model, sequences)
    if comparison is not None:
        asked = Asked.of("perplexity", text.protocol, None, text.sha256, sequences, model)
        comparison.begin(asked, lambda other: split(other, text, window)[0][: options.limit])
    identity: dict[str, Any] = {}
    if progress_file is not None:
        identity = {"task": "perplexity", "protocol": text.protocol, "window": window, "limit": options.limit}
        identity |= {"batch_tokens": batch_tokens, "data": text.sha256, "model": fingerprint(model)}
        identity |= {"base": comparison and comparison.about}
    with Progress(progress_file, identity) as progress:
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
    record = _record(tokenizer, sequences, nll, text.protocol, window)
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


def _record(
    tokenizer: TokenizerLike, sequences: Sequence[Sequence[int]], nll_nats: float, protocol: str, window: int
) -> dict[str, Any]:
    tokens = sum(len(s) - 1 for s in sequences)
    # bytes of the text that the predicted tokens spell: what was cut off or only conditioned on does not count
    spelled = sum(len(tokenizer.decode(list(s[1:])).encode()) for s in sequences)
    mean = nll_nats / tokens
    absent = ("accuracy", "accuracy_ci95", "questions", "answered")
    not_measured = {name: "the task is perplexity" for name in absent}
    try:
        perplexity = math.exp(mean)
    except OverflowError:  # a model broken beyond measure
        perplexity = math.inf
    return {
        "task": "perplexity",
        "protocol": protocol,
        "window": window,
        protocol: len(sequences),
        "tokens": tokens,
        "nll_nats_per_token": mean,
        "perplexity": perplexity,
        "bits_per_byte": nll_nats / math.log(2) / spelled if spelled else None,
        "accuracy": None,
        "accuracy_ci95": None,
        "questions": None,
        "answered": None,
        "not_measured": not_measured,
    }
