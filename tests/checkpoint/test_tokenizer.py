"""Tokenizers of model folders: what they put before a text, what ends a text, and files that cannot be used."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from halve.checkpoint.tokenizer import load_tokenizer
from halve.errors import CheckpointError
from tests.common import write_word_tokenizer


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_word_tokenizer(tmp_path, ["a", "cat", "sat"])
    return tmp_path


def change(path: Path, **entries: Any) -> None:
    content = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(content | entries))


def template(before: list[str], after: list[str]) -> dict[str, Any]:
    """A post-processor that puts special tokens around a text."""
    ids = {"<unk>": 0, "<s>": 1, "</s>": 2}
    special = [{"SpecialToken": {"id": name, "type_id": 0}} for name in [*before, *after]]
    single = [*special[: len(before)], {"Sequence": {"id": "A", "type_id": 0}}, *special[len(before) :]]
    tokens = {name: {"id": name, "ids": [ids[name]], "tokens": [name]} for name in {*before, *after}}
    return {"type": "TemplateProcessing", "single": single, "pair": single, "special_tokens": tokens}


@pytest.mark.parametrize("after", [[], ["</s>"], ["<s>"]])
@pytest.mark.parametrize("before", [[], ["<s>"], ["<unk>", "<s>"], ["</s>"]])
def test_a_text_begins_as_the_tokenizer_begins_it(folder: Path, before: list[str], after: list[str]) -> None:
    change(folder / "tokenizer.json", post_processor=template(before, after) if before or after else None)
    tokenizer = load_tokenizer(folder)
    whole = tokenizer.inner("cat sat")["input_ids"]
    assert tokenizer.encode("cat sat", bos=True) == whole[: len(whole) - len(after)]
    assert tokenizer.encode("cat sat", bos=False) == [4, 5]
    assert list(tokenizer.bos_ids) == tokenizer.encode("", bos=True) == whole[: len(before)]


@pytest.mark.parametrize("kind", ["LlamaTokenizer", "PreTrainedTokenizerFast", "GPT2Tokenizer"])
@pytest.mark.parametrize("asked", [False, True])
def test_what_the_library_makes_of_the_switch_is_followed(folder: Path, kind: str, asked: bool) -> None:
    for processor in (None, template(["<s>"], [])):
        change(folder / "tokenizer.json", post_processor=processor)
        change(folder / "tokenizer_config.json", add_bos_token=asked, tokenizer_class=kind)
        tokenizer = load_tokenizer(folder)
        assert [*tokenizer.bos_ids] == tokenizer.inner("cat")["input_ids"][:-1]


def test_what_begins_a_text_is_found_where_unknown_words_have_no_token(folder: Path) -> None:
    content = json.loads((folder / "tokenizer.json").read_text())
    content["model"] = {"type": "WordLevel", "vocab": {"<s>": 1, "</s>": 2, "cat": 4}, "unk_token": "<none>"}
    (folder / "tokenizer.json").write_text(json.dumps(content))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    tokenizer = load_tokenizer(folder)
    assert tokenizer.encode("cat", bos=True) == [1, 4]
    with pytest.raises(CheckpointError, match="cannot encode the text"):
        tokenizer.encode("dog", bos=True)


@pytest.mark.parametrize("model", ["stories260K", "babyllama-tok361"])
def test_real_models_begin_with_their_bos(assets: Path, model: str) -> None:
    tokenizer = load_tokenizer(assets / "models" / model)
    assert tokenizer.bos_ids == (1,) and tokenizer.eos_ids == (2,)


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [
        ({"eos_token_id": 5}, {"eos_token_id": 4}, (5,)),
        ({"eos_token_id": [5, 3]}, {}, (5, 3)),
        (None, {"eos_token_id": 4}, (4,)),
        (None, {"eos_token_id": [4, 3]}, (4, 3)),
        ({"max_length": 9}, {"eos_token_id": 4}, (4,)),
        (None, {"text_config": {"eos_token_id": [4]}}, (4,)),
        (None, {"eos_token_id": None}, (2,)),  # the tokenizer's own
        (None, {"eos_token_id": 0}, (0,)),
        (None, None, (2,)),
    ],
)
def test_what_ends_a_text(folder: Path, generation: dict | None, config: dict | None, expected: tuple) -> None:
    for name, content in (("generation_config.json", generation), ("config.json", config)):
        if content is not None:
            change(folder / name, **content)
    assert load_tokenizer(folder).eos_ids == expected


@pytest.mark.parametrize("wrong", ["2", True, 2.0, [2, None], {"id": 2}])
@pytest.mark.parametrize("name", ["generation_config.json", "config.json"])
def test_an_end_that_is_no_token_id_is_refused(folder: Path, name: str, wrong: object) -> None:
    change(folder / name, eos_token_id=wrong)
    with pytest.raises(CheckpointError, match=f"{name}: eos_token_id=.* must be a token id"):
        load_tokenizer(folder)


JSON_FILES = ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json"]


@pytest.mark.parametrize("content", [b"{", b"", b"[1]", b'"text"', b"\xff\xfe{}", b"[" * 100_000])
@pytest.mark.parametrize("name", JSON_FILES)
def test_a_file_that_is_no_json_object_is_named(folder: Path, name: str, content: bytes) -> None:
    (folder / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"{re.escape(name)}(: | is )") as caught:
        load_tokenizer(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "entries"),
    [
        ("tokenizer.json", {"model": {"type": "Newer", "vocab": {}}}),
        ("tokenizer.json", {"model": None}),
        ("tokenizer.json", {"model": {"type": "BPE", "vocab": {"a": 0}, "merges": [7]}}),
        ("tokenizer.json", {"model": {"type": "BPE", "vocab": {"a": 0}, "merges": ["a b"]}}),
        ("tokenizer.json", {"pre_tokenizer": {"type": "Newer"}}),
        ("tokenizer.json", {"added_tokens": 3}),
        ("tokenizer.json", {"post_processor": {"type": "TemplateProcessing"}}),
        ("tokenizer.json", {"post_processor": template(["<s>"], []) | {"special_tokens": {}}}),
        ("tokenizer_config.json", {"tokenizer_class": 3}),
        ("tokenizer_config.json", {"bos_token": 3}),
        ("tokenizer_config.json", {"added_tokens_decoder": {"x": {}}}),
        ("tokenizer_config.json", {"added_tokens_decoder": [1]}),
        ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["own.Own", None]}, "tokenizer_class": "Own"}),
        ("tokenizer_config.json", {"chat_template": "{% for"}),
        ("tokenizer_config.json", {"chat_template": 3}),
        ("tokenizer_config.json", {"chat_template": [{"name": "default"}]}),
        ("special_tokens_map.json", {"bos_token": {"content": 3}}),
        ("special_tokens_map.json", {"bos_token": [1]}),
    ],
)
def test_a_form_that_is_not_known_is_one_line(folder: Path, name: str, entries: dict[str, Any]) -> None:
    change(folder / name, **entries)
    try:
        tokenizer = load_tokenizer(folder)
    except CheckpointError as error:
        assert str(folder) in str(error) and "upgrade transformers" in str(error) and "\n" not in str(error)
    else:  # what the library lets pass has to work
        assert tokenizer.decode(tokenizer.encode("cat", bos=True))


@pytest.mark.parametrize("merges", ["#version: 0.2\na b\n", "a b c\n", "a\n", "", "x y\n", "\xff"])
def test_merges_in_a_file_of_their_own(tmp_path: Path, merges: str) -> None:
    vocabulary = {"a": 0, "b": 1, "ab": 2, "<s>": 3}
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary))
    (tmp_path / "merges.txt").write_bytes(merges.encode("latin-1"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer"}))
    try:
        tokenizer = load_tokenizer(tmp_path)
    except CheckpointError as error:
        assert str(tmp_path) in str(error) and "\n" not in str(error)
    else:
        assert tokenizer.decode(tokenizer.encode("ab", bos=False)) == "ab"


def test_a_folder_without_a_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(
        CheckpointError, match=f"{tmp_path}: no usable tokenizer .*copy the model's own tokenizer files"
    ):
        load_tokenizer(tmp_path)


SENTENCEPIECE, TIKTOKEN = b"\x0a\x0e\x0a\x05<unk>", b"IQ== 0\nIg== 1\n"


@pytest.mark.parametrize(("content", "kind"), [(SENTENCEPIECE, "sentencepiece"), (TIKTOKEN, "tiktoken")])
def test_a_tokenizer_model_alone_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes, kind: str
) -> None:
    (tmp_path / "tokenizer.model").write_bytes(content)
    monkeypatch.setitem(sys.modules, kind, None)  # as if it were not installed
    with pytest.raises(CheckpointError, match=rf"tokenizer.model: .*pip install 'halve\[{kind}\]'"):
        load_tokenizer(tmp_path)
    write_word_tokenizer(tmp_path, ["cat"])
    assert load_tokenizer(tmp_path).encode("cat", bos=True) == [1, 3]


@pytest.mark.parametrize(
    ("name", "kind", "package", "ids"),
    [
        ("llama2", "sentencepiece", "sentencepiece", [12199, 3186]),
        ("mistral-v3", "sentencepiece", "sentencepiece", [22326, 2294]),
        ("llama3-tiktoken", "tiktoken", "tiktoken", [15339, 1917]),
    ],
)
def test_real_tokenizer_models(
    assets: Path, tmp_path: Path, name: str, kind: str, package: str, ids: list[int]
) -> None:
    shutil.copy(assets / "tokenizers" / name / "tokenizer.model", tmp_path)
    try:
        __import__(package)
    except ImportError:
        with pytest.raises(CheckpointError, match=rf"halve\[{kind}\]"):
            load_tokenizer(tmp_path)
    else:
        tokenizer = load_tokenizer(tmp_path)
        assert tokenizer.encode("hello world", bos=False) == ids and tokenizer.decode(ids) == "hello world"


def test_a_file_that_cannot_be_opened_says_why(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.json").mkdir()
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: cannot be read: Is a directory"):
        load_tokenizer(folder)


def test_a_reason_of_the_system_is_kept_where_the_library_meets_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object, **options: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(folder / "chat_template.jinja"))

    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", fail)
    with pytest.raises(CheckpointError, match=r"chat_template\.jinja: cannot be read: Input/output error; check"):
        load_tokenizer(folder)
