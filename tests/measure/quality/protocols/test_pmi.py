"""What stands for "no context" where a model has no BOS: the token between the texts it was trained on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer as Made
from tokenizers import models

from halve.checkpoint.tokenizer import Tokenizer
from tests.vocabularies import save_tokenizer

END, TURN = "<|endoftext|>", "<|im_end|>"


@pytest.mark.parametrize(
    ("special", "eos", "ends_generation", "expected"),
    [
        # a base model, and the chat model made of it, whose first EOS ends a turn
        ([END, TURN], END, None, END),
        ([END, TURN], TURN, [TURN, END], END),
        ([END, TURN], TURN, [END, TURN], END),
        ([END, TURN], TURN, TURN, END),
        ([END, TURN], TURN, None, END),
        (["<|end_of_text|>", "<|eot_id|>"], "<|eot_id|>", ["<|eot_id|>", "<|end_of_text|>"], "<|end_of_text|>"),
        # its own EOS goes before another token that bears such a name
        ([END, "</s>"], "</s>", None, "</s>"),
        # no name that says it: what the tokenizer calls EOS
        (["<stop>", "<turn>"], "<stop>", ["<turn>", "<stop>"], "<stop>"),
        (["<stop>", "<turn>"], None, ["<turn>"], "<turn>"),
        (["<stop>"], None, None, None),
    ],
)
def test_end_of_text_is_not_the_end_of_a_turn(
    tmp_path: Path, special: list[str], eos: str | None, ends_generation: str | list[str] | None, expected: str | None
) -> None:
    words = ["<unk>", "a", *special]
    ids = {word: index for index, word in enumerate(words)}
    names = {"unk_token": "<unk>"} | ({"eos_token": eos} if eos else {})
    save_tokenizer(Made(models.WordLevel(ids, unk_token="<unk>")), tmp_path, special, **names)
    if ends_generation is not None:
        listed = [ids[t] for t in ends_generation] if isinstance(ends_generation, list) else ids[ends_generation]
        (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": listed}))
    assert Tokenizer(tmp_path).end_of_text_id == (None if expected is None else ids[expected])
