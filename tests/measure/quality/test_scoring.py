"""Prefix-tree scoring against one full forward pass per sequence."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from halve.checkpoint.reader import load_model
from halve.errors import HalveError
from halve.measure.quality import scoring
from halve.measure.quality.scoring import Node, fork, question_nodes, score, sequence_node
from halve.model.decoder import Model

LONGROPE = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0, 1.2, 1.5, 1.9]}
LONGROPE |= {"long_factor": [1.0, 2.5, 4.0, 9.0]}
FAMILIES = {
    "llama": {},
    "mistral": {"sliding_window": 9},
    "gemma3_text": {"sliding_window": 9, "sliding_window_pattern": 2, "head_dim": 16},
    # longer than some rows, and than some prefixes
    "llama-longrope": {"rope_parameters": LONGROPE | {"original_max_position_embeddings": 30}},
    "opt": {},  # learned positions: nothing may stand beyond the last one, padding included
}


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest, make_hf: Callable[..., Path]) -> Model:
    return load_model(make_hf(request.param.removesuffix("-longrope"), **FAMILIES[request.param]), dtype=torch.float32)


def one_by_one(model: Model, tokens: list[int], start: int) -> float:
    with torch.inference_mode():
        log_probs = model(torch.tensor([tokens[:-1]])).double().log_softmax(-1)[0]
    return sum(log_probs[t - 1, tokens[t]].item() for t in range(start, len(tokens)))


Questions = list[tuple[list[list[int]], list[int], int]]


def check(model: Model, questions: Questions, roots: list[Node], batch_tokens: int) -> None:
    slots = sum(len(sequences) for sequences, _, _ in questions)
    sums = score(model, roots, slots, batch_tokens)
    expected = [
        one_by_one(model, s, b) for sequences, starts, _ in questions for s, b in zip(sequences, starts, strict=True)
    ]
    torch.testing.assert_close(sums, torch.tensor(expected, dtype=torch.float64), rtol=1e-5, atol=1e-4)


def random_article(rng: random.Random, questions: int, cut: bool, context: int = 64) -> Questions:
    """Questions about one article; with `cut`, some options lose some of the article's beginning."""

    def tokens(low: int, high: int) -> list[int]:
        return [rng.randrange(97) for _ in range(rng.randint(low, high))]

    article, result, slot = [0, *tokens(5, 25)], [], 0
    for _ in range(questions):
        stem = tokens(1, 12)
        common = tokens(0, 2)  # options that begin alike
        options = [common + tokens(1, 8) for _ in range(rng.randint(2, 5))]
        sequences, starts = [], []
        for option in options:
            gone = rng.randint(0, 4) if cut else 0
            prompt = [0, *article[1 + gone :], *stem]
            sequences.append((prompt + option)[:context])
            starts.append(len(prompt))
        result.append((sequences, starts, slot))
        slot += len(options)
    return result


@pytest.mark.parametrize("batch_tokens", [1, 150, 10_000])
@pytest.mark.parametrize("cut", [False, True])
def test_shared_prefixes_change_no_score(model: Model, cut: bool, batch_tokens: int) -> None:
    rng = random.Random(batch_tokens + cut)
    questions, roots, slots = [], [], 0
    for count in (1, 3, 2, 1):
        article = [(s, b, slot + slots) for s, b, slot in random_article(rng, count, cut)]
        slots += sum(len(sequences) for sequences, _, _ in article)
        questions += article
        roots += question_nodes(article, model.config.length_limit)
    check(model, questions, roots, batch_tokens)


def test_options_of_one_token_need_no_pass_of_their_own(model: Model) -> None:
    questions = [([[0, 5, 6, 7, letter] for letter in (10, 11, 12)], [4, 4, 4], 0)]
    (root,) = question_nodes(questions)
    assert root.tokens == [0, 5, 6, 7] and root.children == []
    check(model, questions, [root], 1000)


def test_options_that_differ_in_their_last_token_only_are_one_branch(model: Model) -> None:
    questions = [([[0, 5, 6, 7, 8, 20], [0, 5, 6, 7, 9, 10], [0, 5, 6, 7, 9, 11], [0, 5, 6, 7, 12]], [4] * 4, 0)]
    (root,) = question_nodes(questions)
    assert [list(child.tokens) for child in root.children] == [[8], [9]]
    check(model, questions, [root], 1000)


def test_short_prefixes_are_not_shared(model: Model) -> None:
    long = [[0, 5, *range(begin, begin + 30)] for begin in (10, 20, 40)]
    questions = [(long, [25, 25, 25], 0)]
    roots = question_nodes(questions)
    assert [len(root.tokens) for root in roots] == [31, 31, 31]
    check(model, questions, roots, 1000)


def test_the_article_is_computed_once_for_all_its_questions(model: Model) -> None:
    article = [0, *range(20, 40)]
    questions = [([[*article, 50 + q, 60, option] for option in (1, 2)], [22, 22], 2 * q) for q in range(3)]
    (root,) = question_nodes(questions)
    assert root.tokens == article
    assert [list(child.tokens) for child in root.children] == [[50, 60], [51, 60], [52, 60]]
    check(model, questions, [root], 1000)


def test_identical_options_and_an_option_inside_another(model: Model) -> None:
    questions = [([[0, 5, 6, 7], [0, 5, 6, 7], [0, 5, 6], [0, 5, 6, 7, 8, 9]], [2, 2, 2, 2], 0)]
    check(model, questions, question_nodes(questions), 1000)


def test_options_that_share_nothing_but_the_start(model: Model) -> None:
    questions = [([[3, 4, 5], [6, 7, 8, 9]], [1, 1], 0)]
    check(model, questions, question_nodes(questions), 1000)


def test_a_sequence_as_long_as_the_context(model: Model) -> None:
    rng = random.Random(3)
    full = [rng.randrange(97) for _ in range(64)]
    # rows of length 64 beside short ones with long options: their padding must stay inside the context
    questions = [([full, full[:60]], [63, 59], 0), ([[5, *full[:40]], [5, *full[:50]]], [2, 2], 2)]
    roots = [node for question in questions for node in question_nodes([question])]
    check(model, questions, roots, 10_000)


def test_large_vocabularies_are_taken_in_stretches(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = list(range(40))
    whole = score(model, [sequence_node(tokens, 0)], 1)
    monkeypatch.setattr(scoring, "LOGIT_ELEMENTS", 97 * 3)
    rows = []
    head = model.head.forward
    monkeypatch.setattr(model.head, "forward", lambda x: rows.append(len(x)) or head(x))
    torch.testing.assert_close(score(model, [sequence_node(tokens, 0)], 1), whole)
    assert max(rows) == 3 and sum(rows) == 39


def test_forked_rows_continue_like_their_originals(model: Model) -> None:
    with torch.inference_mode():
        cache = model.new_cache(2, 6)
        model(torch.tensor([[1, 2, 3, 4], [5, 6, 0, 0]]), cache)
        cache.lengths = torch.tensor([4, 2])
        forked = fork(cache, [1, 0, 1], 3)
        logits = model(torch.tensor([[7, 8, 9]] * 3), forked)
        short, long = (model(torch.tensor([[*prefix, 7, 8, 9]]))[0, -3:] for prefix in ([5, 6], [1, 2, 3, 4]))
    for row, expected in zip(logits, (short, long, short), strict=True):
        torch.testing.assert_close(row, expected, rtol=1e-4, atol=1e-4)


def test_logits_that_are_not_finite_are_refused(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    head = model.head.forward
    monkeypatch.setattr(model.head, "forward", lambda x: head(x) * float("nan"))
    with pytest.raises(HalveError, match="not finite"):
        score(model, [sequence_node([1, 2, 3], 0)], 1)
