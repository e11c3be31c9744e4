"""Generation: against the uncached forward, against transformers, batches against single prompts, sampling by hand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from halve.checkpoint.reader import load_model
from halve.checkpoint.tokenizer import load_tokenizer
from halve.decode.generate import generate, generate_text
from halve.decode.sampling import Sampling, TokenChooser, kept_logits, sample
from halve.decode.text_stream import TextStream
from halve.errors import DataError, HalveError
from halve.model.decoder import Model

PROMPTS = [[5, 9, 3, 44], [7] * 11, [90, 2, 61, 33, 8, 8, 17]]


@pytest.fixture(scope="module")
def model(make_hf: Callable[..., Path]) -> Model:
    """A random Llama with 64 positions and 97 tokens."""
    return load_model(make_hf("llama"))


def naive_greedy(model: Model, prompt: list[int], count: int) -> list[int]:
    """Greedy decoding without a cache: the whole sequence runs again for every token."""
    tokens = list(prompt)
    with torch.inference_mode():
        for _ in range(count):
            tokens.append(int(model(torch.tensor([tokens]))[0, -1].argmax()))
    return tokens[len(prompt) :]


def test_greedy_equals_the_uncached_forward(model: Model) -> None:
    (made,) = generate(model, [PROMPTS[0]], max_new_tokens=20)
    assert made.tokens == naive_greedy(model, PROMPTS[0], 20)
    assert made.ended == "length"


@pytest.mark.parametrize(
    ("family", "options"),
    [("llama", {}), ("opt", {}), ("mistral", {"sliding_window": 6}), ("qwen3", {"head_dim": 8})],
)
def test_unequal_prompts_together_equal_one_by_one(
    make_hf: Callable[..., Path], family: str, options: dict[str, int]
) -> None:
    model = load_model(make_hf(family, **options))
    together = generate(model, PROMPTS, max_new_tokens=15)
    assert [g.tokens for g in together] == [naive_greedy(model, p, 15) for p in PROMPTS]


def test_equal_prompts_together_equal_one_by_one(model: Model) -> None:
    prompts = [[1, 2, 3], [30, 20, 10]]
    together = generate(model, prompts, max_new_tokens=9)
    assert [g.tokens for g in together] == [naive_greedy(model, p, 9) for p in prompts]


def test_a_full_context_ends_a_row_and_the_others_go_on(model: Model) -> None:
    long, short = [3] * 60, [4] * 10
    first, second = generate(model, [long, short], max_new_tokens=100)
    # the last new token needs no position, so 64 positions give 64 - 60 + 1 tokens
    assert (len(first.tokens), first.ended) == (5, "context")
    assert (len(second.tokens), second.ended) == (55, "context")
    assert first.tokens == naive_greedy(model, long, 5)
    assert second.tokens == naive_greedy(model, short, 55)


def test_a_prompt_as_long_as_the_context_gives_one_token(model: Model) -> None:
    (made,) = generate(model, [[1] * 64], max_new_tokens=8)
    assert (len(made.tokens), made.ended) == (1, "context")


def test_stop_tokens_end_their_row_only(model: Model) -> None:
    free = generate(model, PROMPTS, max_new_tokens=12)
    stop = free[0].tokens[4]
    expected = [g.tokens[: g.tokens.index(stop)] if stop in g.tokens else g.tokens for g in free]
    seen: list[tuple[int, int]] = []
    stopped = generate(
        model, PROMPTS, max_new_tokens=12, stop_ids=[stop], on_token=lambda row, token: seen.append((row, token))
    )
    assert [g.tokens for g in stopped] == expected
    assert stopped[0].ended == "stop"
    assert [g.ended for g in stopped] == ["stop" if stop in g.tokens else "length" for g in free]
    for row, made in enumerate(stopped):
        assert [token for r, token in seen if r == row] == made.tokens


def test_tokens_arrive_while_the_model_still_runs(model: Model) -> None:
    passes, at_pass = [0], []
    handle = model.blocks[0].register_forward_pre_hook(lambda *_: passes.__setitem__(0, passes[0] + 1))
    try:
        generate(model, [PROMPTS[0]], max_new_tokens=4, on_token=lambda row, token: at_pass.append(passes[0]))
    finally:
        handle.remove()
    assert at_pass == [1, 2, 3, 4]


def test_matches_transformers_on_the_real_models(assets: Path) -> None:
    from transformers import AutoModelForCausalLM

    for name in ("stories260K", "babyllama-tok361"):
        folder = assets / "models" / name
        theirs: Any = AutoModelForCausalLM.from_pretrained(folder)
        ours, tokenizer = load_model(folder), load_tokenizer(folder)
        prompt = tokenizer.encode("Once upon a time, there was a little girl", bos=True)
        want = theirs.generate(torch.tensor([prompt]), max_new_tokens=80, do_sample=False)[0, len(prompt) :].tolist()
        (made,) = generate(ours, [prompt], max_new_tokens=80, stop_ids=tokenizer.eos_ids)
        assert made.tokens == [t for t in want if t not in tokenizer.eos_ids]


def test_streamed_text_is_the_text(assets: Path) -> None:
    folder = assets / "models" / "stories260K"
    model, tokenizer, pieces = load_model(folder), load_tokenizer(folder), []
    (made,) = generate_text(model, tokenizer, "Once upon a time", max_new_tokens=60, on_text=pieces.append)
    assert len(pieces) > 20
    assert "".join(pieces) == made.text
    whole = tokenizer.decode(tokenizer.encode("Once upon a time", bos=True) + made.tokens)
    assert whole == "Once upon a time" + made.text


def test_top_k_of_one_is_greedy(model: Model) -> None:
    sampled = generate(model, PROMPTS, max_new_tokens=10, sampling=Sampling(temperature=5.0, top_k=1, seed=3))
    assert [g.tokens for g in sampled] == [naive_greedy(model, p, 10) for p in PROMPTS]


def test_a_row_samples_as_it_would_alone(model: Model) -> None:
    together = generate(model, PROMPTS, max_new_tokens=12, sampling=Sampling(temperature=1.0, seed=7))
    for row, prompt in enumerate(PROMPTS):
        (alone,) = generate(model, [prompt], max_new_tokens=12, sampling=Sampling(temperature=1.0, seed=7 + row))
        assert alone.tokens == together[row].tokens
    (other,) = generate(model, PROMPTS[:1], max_new_tokens=12, sampling=Sampling(temperature=1.0, seed=8))
    assert other.tokens != together[0].tokens


PROBABILITIES = torch.tensor([[0.05, 0.5, 0.3, 0.15]])


@pytest.mark.parametrize(
    ("sampling", "kept"),
    [
        (Sampling(1.0), [0, 1, 2, 3]),
        (Sampling(1.0, top_k=2), [1, 2]),
        (Sampling(1.0, top_p=0.75), [1, 2]),
        (Sampling(1.0, top_p=0.4), [1]),
        (Sampling(1.0, top_p=0.83), [1, 2, 3]),
        # top-k first: 0.5 and 0.3 become 0.842 of the remaining mass, which already reaches 0.83
        (Sampling(1.0, top_k=3, top_p=0.83), [1, 2]),
    ],
)
def test_cuts_keep_the_hand_computed_tokens(sampling: Sampling, kept: list[int]) -> None:
    logits = kept_logits(PROBABILITIES.log(), sampling)
    assert torch.isfinite(logits[0]).nonzero().flatten().tolist() == kept


@pytest.mark.parametrize(
    ("temperature", "expected"),
    # p^(1/T) normalised: for T = 0.5 the squares 0.0025, 0.25, 0.09, 0.0225 over 0.365
    [(1.0, [0.05, 0.5, 0.3, 0.15]), (0.5, [0.0068, 0.6849, 0.2466, 0.0616])],
)
def test_draws_follow_the_distribution(temperature: float, expected: list[float]) -> None:
    draws = 4000
    generators = [torch.Generator().manual_seed(seed) for seed in range(draws)]
    chosen = sample(PROBABILITIES.log().expand(draws, -1), Sampling(temperature), generators)
    shares = torch.bincount(chosen, minlength=4) / draws
    # 4 standard errors of a share of 0.5 over 4000 draws
    assert torch.allclose(shares, torch.tensor(expected), atol=4 * (0.25 / draws) ** 0.5)


@pytest.mark.parametrize("temperature", [5e-324, 1e-46, 1e-40, 1.2e-38, 1e-30, 1e-6])
@pytest.mark.parametrize("cut", [{}, {"top_k": 3}, {"top_p": 0.9}])
def test_a_temperature_near_0_is_greedy(temperature: float, cut: dict[str, float]) -> None:
    logits = torch.tensor([[-2.0, 5.0, 4.0, 60.0, 59.0], [-500.0, -7.0, -7.5, -80.0, -9.0]])
    choose = TokenChooser(Sampling(temperature, seed=4, **cut), 2, logits.device)  # type: ignore[arg-type]
    assert choose(logits).flatten().tolist() == [3, 1]


@pytest.mark.parametrize("top_p", [5e-324, 1e-46, 1e-30, 1e-3])
@pytest.mark.parametrize("temperature", [1e-3, 1.0])
def test_a_top_p_near_0_keeps_the_likeliest(top_p: float, temperature: float) -> None:
    assert torch.isfinite(kept_logits(PROBABILITIES.log(), Sampling(1.0, top_p=top_p)))[0].tolist() == [
        False,
        True,
        False,
        False,
    ]
    chosen = sample(PROBABILITIES.log(), Sampling(temperature, top_p=top_p), [torch.Generator().manual_seed(1)])
    assert chosen.tolist() == [1]


def test_a_temperature_beyond_all_logits_makes_tokens_alike() -> None:
    generators = [torch.Generator().manual_seed(seed) for seed in range(400)]
    chosen = sample(PROBABILITIES.log().expand(400, -1), Sampling(1e300), generators)
    # 4 standard errors of a share of a quarter over 400 draws
    assert torch.allclose(
        torch.bincount(chosen, minlength=4) / 400, torch.tensor(0.25), atol=4 * (0.25 * 0.75 / 400) ** 0.5
    )


class ByteTokenizer:
    """One token a byte; like SentencePiece it drops a leading space of what it decodes."""

    eos_ids = ()

    def encode(self, text: str, bos: bool) -> list[int]:
        return list(text.encode())

    def decode(self, ids: list[int]) -> str:
        return bytes(ids).decode("utf-8", errors="replace").removeprefix(" ")


def test_pieces_keep_spaces_and_never_split_a_character() -> None:
    text, tokenizer = " a café, 東京 ", ByteTokenizer()
    stream = TextStream(tokenizer, tokenizer.encode("Once", bos=False))
    pieces = [stream.push(token) for token in text.encode()]
    assert "".join(pieces) + stream.close() == text == stream.text
    assert not any("\ufffd" in piece for piece in pieces)
    assert pieces[:2] == [" ", "a"]


def test_half_a_character_at_the_end_is_still_shown() -> None:
    stream = TextStream(ByteTokenizer(), [65])
    assert [stream.push(token) for token in "é".encode()[:1]] == [""]
    assert stream.close() == "\ufffd"


@pytest.mark.parametrize(
    ("prompts", "says"),
    [
        ([], "no prompt"),
        ([[1], []], "prompt 2 is empty"),
        ([[1] * 65], "65 tokens, the model's context holds 64"),
        ([[1, 97]], "token id 97 is outside of the model's vocabulary of 97"),
        ([[1, -1]], "token id -1"),
    ],
)
def test_bad_prompts_are_refused(model: Model, prompts: list[list[int]], says: str) -> None:
    with pytest.raises(DataError, match=says):
        generate(model, prompts)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"temperature": -1.0}, "temperature=-1.0"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"temperature": float("inf")}, "temperature=inf"),
        ({"top_p": float("nan")}, "top_p=nan"),
        ({"top_k": -1}, "top_k=-1"),
        ({"top_p": 0.0}, "top_p=0.0"),
        ({"top_p": 1.5}, "top_p=1.5"),
        ({"seed": 10**26}, "seed=1000"),
        ({"seed": -(10**26)}, "seed=-1000"),
    ],
)
def test_bad_sampling_is_refused(options: dict[str, float], says: str) -> None:
    with pytest.raises(HalveError, match=says):
        Sampling(**options)  # type: ignore[arg-type]


def test_bad_requests_are_refused(model: Model) -> None:
    with pytest.raises(HalveError, match="max_new_tokens=0"):
        generate(model, [[1]], max_new_tokens=0)
    with pytest.raises(HalveError, match="single prompt, 2 were given"):
        generate_text(model, ByteTokenizer(), ["a", "b"], on_text=print)
