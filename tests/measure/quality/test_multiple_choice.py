"""Protocols from questions to records: against a slow loop over transformers, hand-written generations, interruptions."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from halve.checkpoint.reader import load_model
from halve.checkpoint.tokenizer import load_tokenizer
from halve.decode.sampling import Sampling
from halve.errors import HalveError, OutputError
from halve.measure.quality import multiple_choice
from halve.measure.quality.evaluate import prepare
from halve.measure.quality.multiple_choice import ChoiceOptions, summarise
from halve.measure.quality.options import EvaluationOptions
from halve.measure.quality.prompts import EncodedPrompt
from halve.measure.quality.protocols import PROTOCOLS, ChoiceProtocol
from halve.measure.quality.protocols.generate import open_prompt, strict_answer
from halve.measure.quality.race import Question, read_questions
from halve.measure.quality.resume import ProgressFile
from halve.model.decoder import Model
from tests.common import write_lines

CONTEXT = 160
ARTICLES = ["Tom has a cat.", "Ann went to town to buy bread. It rained.", "Long ago " * 12 + "a king lived."]


def evaluate(model: Model, tokenizer: Any, progress_file: Path | None = None, **options: Any) -> dict[str, Any]:
    """The figures of a model in memory."""
    kept = None if progress_file is None else ProgressFile(progress_file, {})
    return prepare(EvaluationOptions(**options))(model, tokenizer, kept)


@pytest.fixture(scope="module")
def folder(make_hf: Callable[..., Path]) -> Path:
    return make_hf("llama", vocab_size=98, max_position_embeddings=CONTEXT)


@pytest.fixture(scope="module")
def model(folder: Path) -> Model:
    return load_model(folder, dtype=torch.float32)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three articles, 7 questions of 2 to 4 options; the third article must be cut, its last question cannot fit."""
    path = tmp_path_factory.mktemp("questions") / "exam.jsonl"
    records = [
        {
            "id": f"article{number}",
            "article": article,
            "questions": ["Who?", "What is it?", "Why?" * 40][: 2 + (number == 2)],
            "options": [["he", "she"], ["a cat", "bread", "a town", "rain"], ["so", "no"]][: 2 + (number == 2)],
            "answers": ["A", "B", "A"][: 2 + (number == 2)],
            "kind": ["who", "what", "why"][: 2 + (number == 2)],
        }
        for number, article in enumerate(ARTICLES)
    ]
    return write_lines(path, *records)


class SlowLoop:
    """Every option of every question in a forward pass of its own, through transformers; nothing shared with halve."""

    def __init__(self, folder: Path, encode: Callable[[str], list[int]], context: int) -> None:
        from transformers import AutoModelForCausalLM

        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.encode, self.context = encode, context

    def log_likelihood(self, head: str, article: str, tail: str, option: str) -> float | None:
        """log p(option | BOS head article tail) in nats; None when it does not fit even without article.

        Works for tokenizers in which every token of the article can be dropped by dropping characters from its left.
        """
        options = len(self.encode(head + article + tail + option)) - len(self.encode(head + article + tail))
        while len(ids := self.encode(head + article + tail + option)) > self.context:
            if not article:
                return None
            article = article[1:]
        with torch.no_grad():
            log_probs = self.model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
        return sum(log_probs[t - 1, ids[t]].item() for t in range(len(ids) - options, len(ids)))


def raw_results(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any] | None]:
    """Collects the per-question results of the runs that follow."""
    seen: list[dict[str, Any] | None] = []

    def spy(questions: Any, encoded: Any, results: Any, how: Any) -> dict[str, Any]:
        seen.extend(results)
        return summarise(questions, encoded, results, how)

    monkeypatch.setattr(multiple_choice, "summarise", spy)
    return seen


def _tails(question: Question, protocol: str) -> tuple[str, list[str]]:
    cue = f"\nQuestion: {question.text}"
    if protocol == "letter":
        cue += "".join(f"\n{letter}) {option}" for letter, option in zip("ABCD", question.options, strict=False))
        return f"{cue}\nAnswer:", [f" {letter}" for letter in "ABCD"[: len(question.options)]]
    return f"{cue}\nAnswer:", [f" {option}" for option in question.options]


@pytest.mark.parametrize("protocol", ["letter", "continuation", "pmi"])
@pytest.mark.parametrize("batch_tokens", [1, 4096])
def test_scores_are_those_of_the_slow_loop(
    folder: Path,
    model: Model,
    data: Path,
    characters: Any,
    monkeypatch: pytest.MonkeyPatch,
    protocol: str,
    batch_tokens: int,
) -> None:
    results = raw_results(monkeypatch)
    record = evaluate(
        model, characters, task="multiple-choice", data=data, protocol=protocol, batch_tokens=batch_tokens
    )
    slow = SlowLoop(folder, lambda text: characters.encode(text, bos=True), CONTEXT)
    right = overflow = 0
    for question, result in zip(read_questions(data).questions, results, strict=True):
        tail, options = _tails(question, protocol)
        expected = [slow.log_likelihood("Article: ", question.article, tail, option) for option in options]
        if None in expected:
            overflow += 1
            assert result is None
            continue
        assert result is not None
        assert result["scores"] == pytest.approx(expected, abs=1e-3)
        final = [e for e in expected if e is not None]
        if protocol == "pmi":
            prior = [slow.log_likelihood("", "", "", option) for option in options]
            assert result["prior"] == pytest.approx(prior, abs=1e-3)
            final = [e - (p or 0.0) for e, p in zip(final, prior, strict=True)]
        right += max(range(len(final)), key=final.__getitem__) == question.answer
    assert (record["overflow"], record["answered"], record["questions"]) == (1, 6, 7) and overflow == 1
    # of the long article: the question with four options, and with the options in the prompt the other one too
    assert record["cut"] == (2 if protocol == "letter" else 1)
    assert record["correct"] == right
    assert record["accuracy"] == right / 7, "what does not fit counts as wrong"


def test_the_plain_template_is_article_and_option(
    folder: Path, model: Model, data: Path, characters: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = raw_results(monkeypatch)
    record = evaluate(model, characters, task="multiple-choice", data=data, protocol="continuation", template="plain")
    slow = SlowLoop(folder, lambda text: characters.encode(text, bos=True), CONTEXT)
    for question, result in zip(read_questions(data).questions, results, strict=True):
        expected = [slow.log_likelihood("", question.article, "", f" {option}") for option in question.options]
        assert result is not None and result["scores"] == pytest.approx(expected, abs=1e-3)
    assert (record["overflow"], record["template"]) == (0, "plain")


def test_greedy_answers_are_those_of_transformers(
    folder: Path, model: Model, data: Path, characters: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoModelForCausalLM

    results = raw_results(monkeypatch)
    record = evaluate(model, characters, task="multiple-choice", data=data, protocol="generate", limit=4)
    reference: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    for question, result in zip(read_questions(data).questions[:4], results, strict=True):
        ids = characters.encode(f"Article: {question.article}{_tails(question, 'letter')[0]}", bos=True)
        assert len(ids) <= CONTEXT - 20
        with torch.no_grad():
            made = reference.generate(
                torch.tensor([ids]), max_new_tokens=20, do_sample=False, eos_token_id=1, pad_token_id=1
            )[0, len(ids) :].tolist()
        assert result == {"text": characters.decode(made)}
    assert (record["questions"], record["protocol"]) == (4, "generate")


def test_sampled_answers_depend_on_the_seed_only(
    model: Model, data: Path, characters: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = raw_results(monkeypatch)
    protocol = ChoiceProtocol("sampled", open_prompt, read=strict_answer, sampling=Sampling(1.5), stops=False)
    request: dict[str, Any] = {"task": "race-h", "data": data, "protocol": protocol, "limit": 4}
    records = [evaluate(model, characters, **request, seed=seed) for seed in (1, 1, 2)]
    assert results[:4] == results[4:8] != results[8:]
    assert records[0] == records[1]
    assert all(result is not None and len(result["text"]) <= 20 for result in results)
    assert records[2]["sampling"] == {"temperature": 1.5, "top_k": 0, "top_p": 1.0, "seed": 2}


def _summary(texts: list[str | None], protocol: str) -> dict[str, Any]:
    """The record of hand-written generations to questions whose right answer is always B; two questions an article."""
    questions = [Question(f"article{i // 2}", "text", "What?", ("a", "b", "c", "d"), 1) for i in range(len(texts))]
    encoded = [EncodedPrompt((), (), overflow=text is None) for text in texts]
    results = [None if text is None else {"text": text} for text in texts]
    return summarise(questions, encoded, results, ChoiceOptions("race-h", PROTOCOLS[protocol], "race", None, 4096, 0))


def test_generate_counts_the_unanswered_as_wrong() -> None:
    record = _summary(["B", "answer is B", "B.", "C", None], "generate")
    assert (record["questions"], record["answered"], record["correct"]) == (5, 3, 2)
    assert record["accuracy"] == pytest.approx(2 / 5)


def test_ties_lengths_and_kinds_by_hand() -> None:
    questions = [
        Question("x", "t", "q", ("aa", "éé", "b"), 1, (("kind", "who"), ("people", "1"), ("label", "0"))),
        Question("x", "t", "q", ("a", "b"), 0, (("kind", "what"), ("people", "1"), ("label", "1"))),
        Question("y", "t", "q", ("a", "b"), 1, (("kind", "who"), ("people", "2"), ("label", "2"))),
    ]
    scores = [[-4.0, -6.0, -3.5], [-1.0, -1.0], [-2.0, -3.0]]
    encoded = [EncodedPrompt(((0, 1),) * len(s), (1,) * len(s), cut) for s, cut in zip(scores, (0, 7, 0), strict=True)]
    record = summarise(
        questions,
        encoded,
        [{"scores": s} for s in scores],
        ChoiceOptions("multiple-choice", PROTOCOLS["continuation"], "race", None, 1, 0),
    )
    # sums: the first picks "b" (wrong), the second the first of two equal ones (right), the third "a" (wrong)
    assert record["answers"] == {"x": "01", "y": "0"}
    assert (record["correct"], record["cut"], record["chance"]) == (1, 1, pytest.approx((1 / 3 + 1 / 2 + 1 / 2) / 3))
    # per character -2, -3, -3.5 picks "aa"; per byte -2, -1.5, -3.5 picks "éé", the right one
    accuracies = {name: value["accuracy"] for name, value in record["log_likelihood"].items()}
    assert accuracies == {"sum": 1 / 3, "per_byte": 2 / 3, "per_character": 1 / 3}
    kinds = record["by_kind"]
    assert {kind: (row["questions"], row["accuracy"]) for kind, row in kinds["kind"].items()} == {
        "what": (1, 1.0),
        "who": (2, 0.0),
    }
    assert {people: row["accuracy"] for people, row in kinds["people"].items()} == {"1": 0.5, "2": 0.0}


def _interrupted(monkeypatch: pytest.MonkeyPatch, at: int) -> list[int]:
    """Raise KeyboardInterrupt in the batch number `at`; returns the list that counts the batches computed."""
    score, calls = multiple_choice.score, []

    def failing(*arguments: Any) -> torch.Tensor:
        calls.append(len(calls))
        if len(calls) == at:
            raise KeyboardInterrupt
        return score(*arguments)

    monkeypatch.setattr(multiple_choice, "score", failing)
    return calls


def test_an_interrupted_run_gives_the_identical_record(
    model: Model, data: Path, tmp_path: Path, characters: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = tmp_path / "record.json.progress"
    request: dict[str, Any] = {"task": "race-h", "data": data, "protocol": "pmi", "batch_tokens": 1}
    whole = evaluate(model, characters, **request)
    calls = _interrupted(monkeypatch, at=3)
    with pytest.raises(KeyboardInterrupt):
        evaluate(model, characters, **request, progress_file=kept)
    kept.write_text(kept.read_text() + '{"key": "0", "result": {"scores"')  # killed in the middle of a line
    assert evaluate(model, characters, **request, progress_file=kept) == whole
    assert len(calls) == 3 + 1, "of three articles two were kept and one was computed again"
    assert not kept.exists()


def test_progress_of_another_model_or_setting_is_not_taken_up(
    model: Model, data: Path, tmp_path: Path, characters: Any, monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    kept = tmp_path / "progress"
    request: dict[str, Any] = {"task": "race-h", "data": data, "batch_tokens": 1, "progress_file": kept}
    other = load_model(folder, dtype=torch.float32)
    other.head = other.head.replaced(weight=other.head.dense_weight() * 1.01)
    other.head.select_backend("auto", torch.float32)
    expected = {name: evaluate(m, characters, **request) for name, m in (("same", model), ("other", other))}
    reruns: list[tuple[str, Model, dict[str, Any]]] = [
        ("other", other, {}),
        ("same", model, {"protocol": "continuation"}),
    ]
    for name, m, changes in reruns:
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            _interrupted(patch, at=3)
            evaluate(model, characters, **request)
        with monkeypatch.context() as patch:
            calls = _interrupted(patch, at=0)
            record = evaluate(m, characters, **request | changes)
        assert len(calls) == 3
        assert changes or record == expected[name]


def test_a_progress_file_that_cannot_be_written(model: Model, data: Path, tmp_path: Path, characters: Any) -> None:
    with pytest.raises(OutputError, match="cannot be written"):
        evaluate(model, characters, task="race-h", data=data, progress_file=tmp_path / "absent" / "p")
    (tmp_path / "p").write_text("notes of mine")
    with pytest.raises(OutputError, match="is not the progress of an evaluation"):
        evaluate(model, characters, task="race-h", data=data, progress_file=tmp_path / "p")
    assert (tmp_path / "p").read_text() == "notes of mine"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"task": "race"}, "task 'race': unknown; choose one of perplexity, race-h, multiple-choice"),
        ({"protocol": "windows"}, "protocol 'windows': unknown for task race-h; choose one of letter, continuation"),
        ({"template": "other"}, "template 'other': unknown; choose one of race, plain"),
        ({"template": "plain"}, "protocol letter has its own prompt; use it with continuation, pmi"),
        ({"window": 8}, "task race-h has no window"),
        ({"limit": -1}, "limit -1: must be at least 1"),
        ({"batch_tokens": 0}, "batch_tokens 0: must be at least 1"),
    ],
)
def test_bad_requests_are_explained(
    model: Model, data: Path, characters: Any, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(HalveError, match=message):
        evaluate(model, characters, **({"task": "race-h", "data": data} | options))


def test_pmi_starts_from_the_end_of_text_where_there_is_no_bos(
    folder: Path, model: Model, data: Path, characters: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    characters.bos_ids = ()
    results = raw_results(monkeypatch)
    evaluate(model, characters, task="race-h", data=data, protocol="pmi", limit=1)
    slow = SlowLoop(folder, lambda text: [1, *characters.encode(text, bos=False)], CONTEXT)
    question = read_questions(data).questions[0]
    assert results[0] is not None
    assert results[0]["prior"] == pytest.approx(
        [slow.log_likelihood("", "", "", f" {option}") for option in question.options], abs=1e-3
    )
    characters.eos_ids = ()
    with pytest.raises(HalveError, match="neither a BOS nor an EOS"):
        evaluate(model, characters, task="race-h", data=data, protocol="pmi")


LONG = bool(os.environ.get("HALVE_TEST_LONG"))
STORY_CLOZE = {"stories260K": (0.400, 0.477, 0.797), "babyllama-tok361": (0.328, 0.352, 0.580)}


@pytest.mark.parametrize("name", STORY_CLOZE)
def test_story_cloze_figures_of_real_models(assets: Path, name: str) -> None:
    folder = assets / "models" / name
    record = evaluate(
        load_model(folder),
        load_tokenizer(folder),
        task="multiple-choice",
        data=assets / "data/story_cloze_615.jsonl",
        protocol="pmi",
        template="plain",
        limit=400,
    )
    plain, per_character, pmi = STORY_CLOZE[name]
    assert record["accuracy"] == pytest.approx(pmi, abs=0.005)
    assert record["log_likelihood"]["sum"]["accuracy"] == pytest.approx(plain, abs=0.005)
    assert record["log_likelihood"]["per_character"]["accuracy"] == pytest.approx(per_character, abs=0.005)
    low, high = record["accuracy_ci95"]
    assert high - low == pytest.approx(2 * 1.966 * (pmi * (1 - pmi) / 400) ** 0.5, rel=0.02)  # 400 different stories


@pytest.mark.parametrize("protocol", ["letter", "pmi"])
def test_race_scores_are_those_of_transformers(assets: Path, monkeypatch: pytest.MonkeyPatch, protocol: str) -> None:
    """Some questions; 200 with HALVE_TEST_LONG=1. Article tokens are found by their place in the text here."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, path = assets / "models/stories260K", assets / "data/race/race_high_test.jsonl"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    context, limit = reference.config.max_position_embeddings, 200 if LONG else {"letter": 24, "pmi": 8}[protocol]
    results = raw_results(monkeypatch)
    record = evaluate(
        load_model(folder), load_tokenizer(folder), task="race-h", data=path, protocol=protocol, limit=limit
    )

    def log_likelihood(head: str, article: str, tail: str, option: str, longest: str) -> float | None:
        plain = tokenizer(head + article + tail)["input_ids"]
        coded = tokenizer(head + article + tail + option, return_offsets_mapping=True)
        ids, places = coded["input_ids"], coded["offset_mapping"]
        option_length = len(ids) - next(
            (i for i, (a, b) in enumerate(zip(plain, ids, strict=False)) if a != b), len(plain)
        )
        inside = [i for i, (a, b) in enumerate(places) if b > len(head) and a < len(head + article) and b > a]
        excess = max(0, len(tokenizer(head + article + tail + longest)["input_ids"]) - context)
        if excess > len(inside):
            return None
        ids = [token for i, token in enumerate(ids) if i not in inside[:excess]]
        with torch.no_grad():
            log_probs = reference(torch.tensor([ids])).logits[0].double().log_softmax(-1)
        return sum(log_probs[t - 1, ids[t]].item() for t in range(len(ids) - option_length, len(ids)))

    right = overflow = cut = 0
    for question, result in zip(read_questions(path).questions, results, strict=False):
        tail, options = _tails(question, protocol)
        parts = ("Article: ", question.article, tail)
        # letters are answers to one prompt, so they share one cut
        longest = max(options, key=lambda o: len(tokenizer("".join(parts) + o)["input_ids"]))
        expected = [log_likelihood(*parts, o, longest if protocol == "letter" else o) for o in options]
        cut += len(tokenizer("Article: " + question.article + tail)["input_ids"]) > context
        if None in expected:
            overflow += 1
            assert result is None
            continue
        assert result is not None
        assert result["scores"] == pytest.approx(expected, abs=1e-3)
        if protocol == "letter":
            right += max(range(4), key=lambda i: expected[i] or 0.0) == question.answer
    assert record["overflow"] == overflow and record["questions"] == limit
    assert cut - overflow <= record["cut"] <= limit - overflow
    if protocol == "letter":
        assert record["correct"] == right
