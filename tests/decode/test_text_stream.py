"""Streams of tokens spell what their tokenizer decodes of all of them: real vocabularies, random text and random tokens."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from tokenizers import Tokenizer as Made
from tokenizers import models

from halve.checkpoint.tokenizer import Tokenizer
from halve.decode.text_stream import TextStream
from tests.common import random_text
from tests.vocabularies import save_tokenizer


def streamed(tokenizer: Tokenizer, prompt: list[int], ids: list[int]) -> list[str]:
    """The pieces of a stream that begins after `prompt`, what was held back at the end last."""
    stream = TextStream(tokenizer, prompt)
    pieces = [*(stream.push(token) for token in ids), stream.close()]
    assert "".join(pieces) == stream.text
    return pieces


def sequences(tokenizer: Tokenizer, rng: random.Random, count: int) -> list[list[int]]:
    """Tokens of random text: whole, cut anywhere, with others among them; and tokens drawn at random, bytes foremost."""
    size = len(tokenizer.inner)
    drawn = []
    for _ in range(count):
        ids = tokenizer.encode(random_text(rng), bos=rng.random() < 0.5)
        mixed = list(ids)
        for _ in range(rng.randint(1, 4)):
            mixed.insert(rng.randint(0, len(mixed)), rng.choice([0, 1, 2, size - 1, rng.randrange(size)]))
        noise = [rng.randrange(rng.choice([size, min(size, 262)])) for _ in range(rng.randint(1, 20))]
        drawn += [ids, ids[: rng.randint(0, len(ids))], mixed, noise]
    return drawn


def test_a_stream_spells_what_is_decoded_at_once(any_tokenizer: Tokenizer) -> None:
    rng = random.Random(7)
    for ids in sequences(any_tokenizer, rng, 80):
        assert "".join(streamed(any_tokenizer, [], ids)) == any_tokenizer.decode(ids)


def test_a_stream_goes_on_where_its_prompt_ends(any_tokenizer: Tokenizer) -> None:
    rng = random.Random(8)
    for ids in sequences(any_tokenizer, rng, 80):
        cut = rng.randint(0, len(ids))
        prompt, whole = any_tokenizer.decode(ids[:cut]), any_tokenizer.decode(ids)
        text = "".join(streamed(any_tokenizer, ids[:cut], ids[cut:]))
        # a prompt may end inside a character, which then is the continuation's
        assert whole.endswith(text) and (not whole.startswith(prompt) or prompt + text == whole)


@pytest.mark.parametrize(
    "text",
    [
        "吾輩は猫である。名前はまだ無い。",
        "नमस्ते दुनिया",
        "👩‍👩‍👧‍👦 🙂🏽",
        "\n\tcafé  鷗外\r\n",
        "\ufffd is a character too",
    ],
)
def test_text_of_rare_characters_comes_back(any_tokenizer: Tokenizer, text: str) -> None:
    prompt = any_tokenizer.encode("Once", bos=True)
    ids = any_tokenizer.encode("Once" + text, bos=True)
    if ids[: len(prompt)] == prompt and any_tokenizer.decode(ids) == "Once" + text:
        assert "".join(streamed(any_tokenizer, prompt, ids[len(prompt) :])) == text
    pieces = streamed(any_tokenizer, [], any_tokenizer.encode(text, bos=True))
    assert "".join(pieces) == text
    assert text.startswith("\ufffd") or not any("\ufffd" in piece for piece in pieces)


def test_text_does_not_wait_for_the_end(any_tokenizer: Tokenizer) -> None:
    ids = any_tokenizer.encode("The 鷗 is a bird", bos=True)
    pieces = streamed(any_tokenizer, ids[:1], ids[1:])
    assert pieces[-1] == "", "nothing is open after a letter"
    assert sum(map(bool, pieces)) >= 5


def test_a_vocabulary_that_refuses_characters_streams(tmp_path: Path) -> None:
    words = Made(models.WordLevel({"a": 0, "cat": 1, "sat": 2}))
    tokenizer = Tokenizer(save_tokenizer(words, tmp_path))
    assert streamed(tokenizer, [0], [1, 2]) == [" cat", " sat", ""]
