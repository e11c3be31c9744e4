"""Perplexity against transformers, against known losses of real models, and on texts there is nothing to learn from."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

from halve.checkpoint.reader import load_model
from halve.checkpoint.tokenizer import Tokenizer, load_tokenizer
from halve.errors import DataError, HalveError
from halve.measure.quality.evaluate import prepare
from halve.measure.quality.options import EvaluationOptions
from halve.measure.quality.resume import ProgressFile
from halve.measure.quality.tasks import perplexity
from halve.model.decoder import Model
from tests.common import write_lines
from tests.vocabularies import small_folder

TEXT = "Tom has a cat.\nThe cat is black and it sleeps all day. " * 4


def evaluate(model: Model, tokenizer: Any, progress_file: Path | None = None, **options: Any) -> dict[str, Any]:
    """The figures of a model in memory."""
    kept = None if progress_file is None else ProgressFile(progress_file, {})
    return prepare(EvaluationOptions(**options))(model, tokenizer, kept)


@pytest.fixture(scope="module")
def folder(make_hf: Callable[..., Path]) -> Path:
    return make_hf("llama", vocab_size=98)


@pytest.fixture(scope="module")
def model(folder: Path) -> Model:
    return load_model(folder, dtype=torch.float32)


def transformers_nll(folder: Path, sequences: list[list[int]]) -> tuple[float, int]:
    """Sum of the negative log-likelihood and number of predicted tokens, one sequence at a time."""
    from transformers import AutoModelForCausalLM

    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    total = 0.0
    with torch.no_grad():
        for sequence in sequences:
            ids = torch.tensor([sequence])
            total += reference(ids, labels=ids).loss.item() * (len(sequence) - 1)
    return total, sum(len(s) - 1 for s in sequences)


@pytest.mark.parametrize("protocol", ["windows", "joined"])
def test_windows_are_cut_from_the_running_text(
    tmp_path: Path, folder: Path, model: Model, characters: Any, protocol: str
) -> None:
    """`windows`: each behind a BOS, every token of the text predicted; `joined`: one BOS, and no first token is."""
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    record = evaluate(model, characters, task="perplexity", data=path, window=50, protocol=protocol)
    ids = characters.encode(TEXT, bos=False)
    if protocol == "windows":
        pieces = [[*characters.bos_ids, *ids[i : i + 49]] for i in range(0, len(ids), 49)]
        assert record["tokens"] == len(ids)
    else:
        running = [*characters.bos_ids, *ids]
        pieces = [running[i : i + 50] for i in range(0, len(running), 50)]
        assert record["tokens"] == len(running) - record["windows"]
    nll, tokens = transformers_nll(folder, pieces)
    assert (record["tokens"], record["windows"]) == (tokens, len(pieces))
    assert record["nll_nats_per_token"] == pytest.approx(nll / tokens, rel=1e-5)
    assert record["perplexity"] == pytest.approx(math.exp(nll / tokens), rel=1e-4)
    assert (record["window"], record["protocol"], record["data"]) == (50, protocol, "text.txt")
    assert record["accuracy"] is None and "accuracy" in record["not_measured"]


def test_documents_begin_with_bos_and_end_at_the_context(
    tmp_path: Path, folder: Path, model: Model, characters: Any
) -> None:
    documents = ["A short one.", TEXT, "Two\nlines."]
    text, lines = tmp_path / "text.raw", tmp_path / "text.jsonl"
    text.write_text("\n<|endoftext|>\n".join(documents) + "\n<|endoftext|>\n  ")
    lines.write_text("\n".join(json.dumps({"text": d.strip()}) for d in documents))
    first = evaluate(model, characters, task="perplexity", data=text, protocol="documents")
    second = evaluate(model, characters, task="perplexity", data=lines, protocol="documents", batch_tokens=1)
    nll, tokens = transformers_nll(folder, [characters.encode(d.strip(), bos=True)[:64] for d in documents])
    for record in (first, second):
        assert (record["documents"], record["tokens"], record["cut"]) == (3, tokens, 1)
        assert record["nll_nats_per_token"] == pytest.approx(nll / tokens, rel=1e-5)
        # one byte per character here; what was cut off does not count
        assert record["bits_per_byte"] == pytest.approx(nll / tokens / math.log(2), rel=1e-5)


def test_a_model_that_knows_nothing_has_the_perplexity_of_its_vocabulary(
    tmp_path: Path, folder: Path, characters: Any
) -> None:
    blank = load_model(folder, dtype=torch.float32)
    blank.head = blank.head.replaced(weight=torch.zeros_like(blank.head.dense_weight()))
    blank.head.select_backend("auto", torch.float32)
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    assert evaluate(blank, characters, task="perplexity", data=path)["perplexity"] == pytest.approx(98)


def test_bits_count_the_bytes_of_the_text(tmp_path: Path, make_hf: Callable[..., Path]) -> None:
    """Of bytes spelled one by one, of the space at the start of a window, of a character that a window begins within."""
    model = load_model(make_hf("llama", vocab_size=310), dtype=torch.float32)
    tokenizer = Tokenizer(small_folder(tmp_path))
    text = "the 鷗外 🙂 the नमस्ते the  日本" * 5
    path = tmp_path / "text.jsonl"
    write_lines(path, {"text": text})
    ids, counts = tokenizer.encode(text, bos=True), tokenizer.byte_counts(text)
    assert counts is not None
    of_token = [0, *counts]
    for protocol, window in product(("windows", "joined"), (2, 7, 10, 64)):
        record = evaluate(model, tokenizer, task="perplexity", data=path, window=window, protocol=protocol)
        firsts = range(0, len(ids), window) if protocol == "joined" else [0]
        assert record["tokens"] == len(ids) - len(firsts)
        bits = record["nll_nats_per_token"] * record["tokens"] / math.log(2)
        assert bits / record["bits_per_byte"] == pytest.approx(len(text.encode()) - sum(of_token[i] for i in firsts))
    short = tmp_path / "short.jsonl"
    write_lines(short, {"text": "the 鷗"}, {"text": "🙂"})
    record = evaluate(model, tokenizer, task="perplexity", data=short, protocol="documents")
    bits = record["nll_nats_per_token"] * record["tokens"] / math.log(2)
    assert bits / record["bits_per_byte"] == pytest.approx(len("the 鷗🙂".encode())), "all of it follows a BOS"


def test_bytes_a_tokenizer_does_not_tell_are_not_guessed(
    tmp_path: Path, model: Model, characters: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    monkeypatch.setattr(characters, "byte_counts", lambda text: None)
    record = evaluate(model, characters, task="perplexity", data=path)
    assert record["bits_per_byte"] is None and "does not tell" in record["not_measured"]["bits_per_byte"]


def test_limit_takes_the_first_parts(tmp_path: Path, folder: Path, model: Model, characters: Any) -> None:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    record = evaluate(model, characters, task="perplexity", data=path, window=20, limit=2)
    nll, tokens = transformers_nll(
        folder, [[*characters.bos_ids, *characters.encode(TEXT, bos=False)[i : i + 19]] for i in (0, 19)]
    )
    assert (record["windows"], record["tokens"]) == (2, tokens)
    assert record["nll_nats_per_token"] == pytest.approx(nll / tokens, rel=1e-5)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", "", "holds no text"),
        ("blank.jsonl", '{"text": " "}\n', "holds no text"),
        ("table.csv", "a", "unknown kind of text '.csv'"),
        ("field.jsonl", '{"text": "a"}\n{"body": "b"}\n', "line 2: no 'text' field"),
        ("broken.jsonl", '{"text": "a"}\n\n{"text"', "line 3: not JSON"),
    ],
)
def test_bad_texts_are_named(
    tmp_path: Path, model: Model, characters: Any, name: str, content: str, message: str
) -> None:
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(DataError, match=message) as caught:
        evaluate(model, characters, task="perplexity", data=path)
    assert str(path) in str(caught.value)


def test_too_short_a_text(tmp_path: Path, model: Model, characters: Any) -> None:
    path = tmp_path / "one.txt"
    path.write_text("x")
    characters.bos_ids = ()  # with BOS one character can be predicted
    with pytest.raises(DataError, match="fewer than 2 tokens"):
        evaluate(model, characters, task="perplexity", data=path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 65}, "window 65: must be 2 to 64"),
        ({"window": 1}, "window 1: must be 2 to 64"),
        (
            {"protocol": "letter"},
            "protocol 'letter': unknown for task perplexity; choose one of windows, documents, joined",
        ),
        ({"template": "plain"}, "template 'plain'"),
        ({"limit": 0}, "limit 0: must be at least 1"),
        ({"data": None}, "give --data"),
        ({"data": Path("absent.txt")}, "absent.txt: cannot be read"),
    ],
)
def test_bad_requests_are_explained(
    tmp_path: Path, model: Model, characters: Any, options: dict[str, Any], message: str
) -> None:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    with pytest.raises(HalveError, match=message):
        evaluate(model, characters, **({"task": "perplexity", "data": path} | options))


def test_a_window_holds_more_than_what_begins_it(tmp_path: Path, model: Model, characters: Any) -> None:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    characters.bos_ids = (1, 2)
    with pytest.raises(HalveError, match="window 2: the tokenizer begins a text with 2 tokens; take a longer window"):
        evaluate(model, characters, task="perplexity", data=path, window=2)


def test_an_interrupted_run_goes_on(
    tmp_path: Path, model: Model, characters: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, kept = tmp_path / "text.txt", tmp_path / "run.progress"
    path.write_text(TEXT)
    request: dict[str, Any] = {"task": "perplexity", "data": path, "window": 20, "batch_tokens": 40}
    whole = evaluate(model, characters, **request)
    score, calls = perplexity.score, []

    def failing(*arguments: Any) -> torch.Tensor:
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return score(*arguments)

    monkeypatch.setattr(perplexity, "score", failing)
    with pytest.raises(KeyboardInterrupt):
        evaluate(model, characters, **request, progress_file=kept)
    assert kept.exists()
    assert evaluate(model, characters, **request, progress_file=kept) == whole
    assert len(calls) == 1 + math.ceil(whole["windows"] / 2), "finished batches are not computed again"
    assert not kept.exists()


def test_known_loss_of_a_real_model(assets: Path) -> None:
    folder = assets / "models/babyllama-tok361"
    record = evaluate(
        load_model(folder),
        load_tokenizer(folder),
        task="perplexity",
        data=assets / "data/tinystories_317.txt",
        protocol="documents",
    )
    assert (record["documents"], record["cut"], record["window"]) == (317, 317, 256)
    assert record["nll_nats_per_token"] == pytest.approx(0.7045, abs=5e-5)
    assert record["bits_per_byte"] == pytest.approx(1.019, abs=5e-4)
