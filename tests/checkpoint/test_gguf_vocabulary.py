"""Tokenizers as fields of a GGUF file: those that are read back make the same tokens of a text; others are refused."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Inner
from transformers import PreTrainedTokenizerFast

from halve.checkpoint.gguf_header import GgufHeader
from halve.checkpoint.gguf_tokenizer import splits, write_tokenizer
from halve.checkpoint.gguf_vocabulary import vocabulary_fields
from halve.checkpoint.tokenizer import Tokenizer
from halve.errors import UnsupportedModelError
from tests.common import random_text, write_word_tokenizer

GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False)
MERGES = [("t", "h"), ("th", "e"), ("Ġ", "the"), ("1", "2")]


def read_back(folder: Path, vocab_size: int, made: Path) -> tuple[dict[str, Any], Tokenizer]:
    fields = vocabulary_fields(folder, vocab_size)
    made.mkdir()
    write_tokenizer(GgufHeader(folder, {"general.architecture": "llama"} | fields, {}), vocab_size, made)
    return {key.removeprefix("tokenizer.ggml."): value for key, value in fields.items()}, Tokenizer(made)


def byte_level(folder: Path, pre: Any = GPT2, ignore: bool = False, **options: Any) -> Path:
    words = sorted(pre_tokenizers.ByteLevel.alphabet()) + ["".join(pair) for pair in MERGES] + ["Ġthe12"]
    model = models.BPE({word: index for index, word in enumerate(words)}, MERGES, ignore_merges=ignore)
    inner = Inner(model)
    inner.pre_tokenizer = pre
    inner.normalizer = options.pop("normalizer", None)
    inner.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    inner.add_special_tokens(["<s>", "</s>", "<|im_end|>"])
    inner.add_tokens([AddedToken("<think>", normalized=False)])
    folder.mkdir(exist_ok=True)
    fast = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>", **options)
    fast.save_pretrained(str(folder))
    return folder


def split_by(expression: str) -> Any:
    cut = pre_tokenizers.Split(Regex(expression), behavior="isolated")
    return pre_tokenizers.Sequence([cut, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def test_the_same_tokens_of_any_text(any_tokenizer: Tokenizer, tmp_path: Path) -> None:
    """A space before a text apart, which SentencePiece and the newer form that transformers builds treat differently."""
    size = len(any_tokenizer.inner)
    fields, again = read_back(any_tokenizer.folder, size, tmp_path / "made")
    assert len(fields["tokens"]) == len(fields["token_type"]) == size
    assert again.bos_ids == any_tokenizer.bos_ids and again.eos_ids == any_tokenizer.eos_ids[:1]
    rng = random.Random(1)
    texts = [random_text(rng, 60).lstrip() for _ in range(200)]
    texts += ["The quick brown fox, 12345 times.\n\n  It's  done!", "a", "   "[:0]]
    for text in texts:
        assert again.encode(text, bos=True) == any_tokenizer.encode(text, bos=True), text


@pytest.mark.parametrize("name", ["llama-bpe", "dbrx", "qwen2", "tekken", "gpt-4o"])
def test_a_split_is_known_by_its_expression(name: str, tmp_path: Path) -> None:
    split = splits()[name]
    folder = byte_level(tmp_path / "own", split_by(split.steps[0][1]), split.ignore_merges)
    fields, again = read_back(folder, 270, tmp_path / "made")
    assert fields["model"] == "gpt2" and fields["pre"] == name
    own = Tokenizer(folder)
    for text in ("the the12 thethe", " the 1234567,,\n\n\t it's IT'S", "<think>the</s>ß the12"):
        assert own.encode(text, bos=True) == again.encode(text, bos=True)


@pytest.mark.parametrize(
    ("name", "pre"), [("gpt-2", GPT2), ("smollm", pre_tokenizers.Sequence([pre_tokenizers.Digits(True), GPT2]))]
)
def test_a_split_by_the_expression_of_gpt_2(name: str, pre: Any, tmp_path: Path) -> None:
    folder = byte_level(tmp_path / "own", pre, normalizer=normalizers.NFC())
    fields, again = read_back(folder, 270, tmp_path / "made")
    assert fields["pre"] == name and fields["merges"] == tuple(" ".join(pair) for pair in MERGES)
    assert again.encode("the 12 the12", bos=False) == Tokenizer(folder).encode("the 12 the12", bos=False)
    types = dict(zip(fields["tokens"], fields["token_type"], strict=True))
    assert (types["t"], types["<s>"], types["<think>"], types["[PAD269]"]) == (1, 3, 4, 5)


@pytest.mark.parametrize(("name", "same"), [("olmo", "gpt-2"), ("refact", "smollm"), ("stablelm2", "qwen2")])
def test_other_names_of_a_split(name: str, same: str, tmp_path: Path) -> None:
    fields = vocabulary_fields(byte_level(tmp_path / "own"), 270) | {"general.architecture": "llama"}
    made = []
    for pre in (name, same):
        (tmp_path / pre).mkdir()
        write_tokenizer(GgufHeader(tmp_path, fields | {"tokenizer.ggml.pre": pre}, {}), 270, tmp_path / pre)
        made.append((tmp_path / pre / "tokenizer.json").read_text())
    assert made[0] == made[1]


def test_special_tokens_and_templates(tmp_path: Path) -> None:
    folder = byte_level(tmp_path / "own", chat_template="{{ messages }}")
    ends = [257 + 5, 257 + 6]
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    fields = vocabulary_fields(folder, 270)
    ids = {key: fields.get(f"tokenizer.ggml.{key}_token_id") for key in ("bos", "eos", "eot", "eom")}
    assert ids == {"bos": 261, "eos": 262, "eot": 263, "eom": None}
    assert fields["tokenizer.chat_template"] == "{{ messages }}"
    assert fields["tokenizer.ggml.add_bos_token"] is False
    # ids past the embedding have no row, and are not said
    cut = vocabulary_fields(folder, 262)
    assert len(cut["tokenizer.ggml.tokens"]) == 262 and "tokenizer.ggml.eos_token_id" not in cut


def test_fewer_rows_than_tokens(tmp_path: Path) -> None:
    """Merges of tokens that have no row go too: nothing could be made of them."""
    folder = byte_level(tmp_path / "own")
    words = sorted(pre_tokenizers.ByteLevel.alphabet())
    cut = vocabulary_fields(folder, len(words) + 2)
    assert cut["tokenizer.ggml.merges"] == ("t h", "th e")
    fields, again = read_back(folder, len(words) + 2, tmp_path / "made")
    assert [again.token(one) for one in again.encode("the 12", bos=False)] == ["the", "Ġ", "1", "2"]
    assert fields["tokens"][-2:] == ("th", "the")


def test_a_row_without_a_token_gets_a_name_of_its_own(tmp_path: Path) -> None:
    folder = byte_level(tmp_path / "own")
    inner = Inner.from_file(str(folder / "tokenizer.json"))
    inner.add_tokens(["[PAD269]"])  # its id is 265
    inner.save(str(folder / "tokenizer.json"))
    tokens = vocabulary_fields(folder, 270)["tokenizer.ggml.tokens"]
    assert len(set(tokens)) == 270 and tokens[265] == "[PAD269]" and tokens[269] == "[[PAD269]]"


def test_several_templates(tmp_path: Path) -> None:
    folder = byte_level(tmp_path / "own", chat_template={"default": "a", "tools": "b"})
    fields = vocabulary_fields(folder, 270)
    chosen = {key: value for key, value in fields.items() if "chat" in key}
    assert chosen == {
        "tokenizer.chat_template": "a",
        "tokenizer.chat_template.tools": "b",
        "tokenizer.chat_templates": ("tools",),
    }


def test_a_folder_without_a_tokenizer(tmp_path: Path) -> None:
    assert vocabulary_fields(tmp_path, 10) == {"tokenizer.ggml.model": "none"}


def sentencepiece(folder: Path, merges: list[tuple[str, str]], words: str = "abc ab bc abc", pre: Any = None) -> Path:
    names = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *dict.fromkeys([*"▁abc", *words.split()])]
    model = models.BPE(
        {name: index for index, name in enumerate(names)}, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True
    )
    inner = Inner(model)
    inner.pre_tokenizer = pre or pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
    folder.mkdir()
    PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>").save_pretrained(str(folder))
    return folder


def test_scores_stand_for_the_order_of_merges(tmp_path: Path) -> None:
    merges = [("b", "c"), ("a", "b"), ("ab", "c"), ("a", "bc")]
    fields, again = read_back(sentencepiece(tmp_path / "own", merges), 265, tmp_path / "made")
    score = dict(zip(fields["tokens"], fields["scores"], strict=True))
    assert score["bc"] > score["ab"] > score["abc"] > max(score[one] for one in "abc")
    assert fields["add_space_prefix"] is False and not again.bos_ids
    assert [again.token(one) for one in again.encode("abc ab", bos=False)] == ["abc", "▁", "ab"]


WHOLE = [("b", "c"), ("a", "b"), ("ab", "c"), ("a", "bc")]
UNFIT: dict[str, tuple[Any, str]] = {
    "words": (lambda f: write_word_tokenizer(f, ["a"]), "its model is WordLevel"),
    "split": (lambda f: byte_level(f, split_by(r"\d+")), "splits a text in a way that has no name there"),
    "merges ignored": (lambda f: byte_level(f, GPT2, True), "ignore_merges=True"),
    "space before": (lambda f: byte_level(f, pre_tokenizers.ByteLevel(add_prefix_space=True)), "has no name there"),
    "normalizer": (lambda f: byte_level(f, normalizer=normalizers.Lowercase()), "changes a text by Lowercase"),
    "merge left out": (lambda f: sentencepiece(f, WHOLE[:3]), "leave out .* which would be joined there"),
    "order": (lambda f: sentencepiece(f, [WHOLE[2], WHOLE[0], WHOLE[1], WHOLE[3]]), "an order that scores of tokens cannot"),
    "spaces": (lambda f: sentencepiece(f, WHOLE, pre=pre_tokenizers.Whitespace()), "spaces are not as there"),
}  # fmt: skip


@pytest.mark.parametrize("name", UNFIT)
def test_a_tokenizer_without_a_place_is_refused(name: str, tmp_path: Path) -> None:
    make, words = UNFIT[name]
    if name == "words":
        (tmp_path / "own").mkdir()
    make(tmp_path / "own")
    with pytest.raises(UnsupportedModelError, match=words) as error:
        vocabulary_fields(tmp_path / "own", 400)
    assert "\n" not in str(error.value) and "move the tokenizer's files elsewhere" in str(error.value)
