"""The tokenizer of a model folder as the fields of a GGUF file: tokens, merges or scores, types, special ids, template.

What llama.cpp makes of them is by its `src/llama-vocab.cpp`: `gpt2` is byte-level BPE with merges, its text split as
`tokenizer.ggml.pre` says; `llama` is SentencePiece, which joins whatever pair makes the token of the highest score.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any

from halve.checkpoint.gguf_tokenizer import KEY, SPECIAL, TEMPLATE, Split, splits
from halve.checkpoint.tokenizer import Tokenizer
from halve.errors import UnsupportedModelError, shown

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # tokenizer.ggml.token_type
_BYTE = re.compile("<0x[0-9A-F]{2}>")
_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tekken.json")
_SPACE = "\u2581"
_ENDS = ("eos_token_id", "eot_token_id", "eom_token_id")
Json = dict[str, Any]


def vocabulary_fields(folder: Path, vocab_size: int) -> Json:
    """The fields `tokenizer.*` of the tokenizer in a model's folder; for a folder without one, that there is none.

    Every row of the embedding has a token, rows that none belongs to an unused one. Raises CheckpointError for a tokenizer
    that cannot be used, UnsupportedModelError for one of a kind that GGUF has no place for.
    """
    if not any((folder / name).exists() for name in _FILES):
        return {f"{KEY}model": "none"}
    tokenizer = Tokenizer(folder)
    if not tokenizer.inner.is_fast:
        raise _unfit(folder, "it is none of the tokenizers library")
    whole: Json = json.loads(tokenizer.inner.backend_tokenizer.to_str())
    model = whole["model"]
    odd = [key for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix") if model.get(key)]
    if model["type"] != "BPE" or odd:
        raise _unfit(folder, f"its model is {model['type']}{f' with {odd[0]}' if odd else ''} and not plain BPE")
    tokens, types = _tokens(whole, vocab_size)
    build = _sentencepiece if model.get("byte_fallback") else _byte_level
    own = build(folder, whole, tokens)
    fields = own | {"tokens": tuple(tokens), "token_type": tuple(types)} | _special(folder, tokenizer, vocab_size)
    return {f"{KEY}{key}": value for key, value in fields.items()} | _templates(tokenizer.inner.chat_template)


def _unfit(folder: Path, why: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{folder}: its tokenizer has no place in a GGUF file, {why}: move the tokenizer's files elsewhere to write the model "
        "without one"
    )


def _tokens(whole: Json, vocab_size: int) -> tuple[list[str], list[int]]:
    """The token of each row of the embedding, and its type."""
    model, sentencepiece = whole["model"], whole["model"].get("byte_fallback")
    known = {*model["vocab"], *(added["content"] for added in whole["added_tokens"])}
    tokens = [name if (name := f"[PAD{index}]") not in known else f"[{name}]" for index in range(vocab_size)]
    types = [UNUSED] * vocab_size
    for token, index in model["vocab"].items():
        if index < vocab_size:
            tokens[index] = token
            types[index] = BYTE if sentencepiece and _BYTE.fullmatch(token) else NORMAL
    for added in whole["added_tokens"]:
        if added["id"] < vocab_size:
            tokens[added["id"]] = added["content"]
            types[added["id"]] = CONTROL if added["special"] else USER_DEFINED
    unknown = model["vocab"].get(model.get("unk_token"), vocab_size)
    if sentencepiece and unknown < vocab_size:
        types[unknown] = UNKNOWN
    return tokens, types


def _merges(model: Json) -> list[tuple[str, str]]:
    """The pairs, the first joined first; older files have each as one text."""
    pairs = (pair.split(" ", 1) if isinstance(pair, str) else pair for pair in model["merges"])
    return [(left, right) for left, right in pairs]


def _byte_level(folder: Path, whole: Json, tokens: list[str]) -> Json:
    normalizers = [step["type"] for step in _steps(whole.get("normalizer"), "normalizers")]
    if not set(normalizers) <= {"NFC"}:  # which llama.cpp leaves to whoever writes the text
        raise _unfit(folder, f"it changes a text by {normalizers[0]}")
    steps = tuple(map(_split, _steps(whole.get("pre_tokenizer"), "pretokenizers")))
    own = Split(steps, bool(whole["model"].get("ignore_merges")))
    name = next((name for name, split in splits().items() if split == own), None)
    if name is None:
        raise _unfit(folder, f"it splits a text in a way that has no name there, {shown(own)}")
    there = set(tokens)  # not those past the rows of the embedding
    merges = [pair for pair in _merges(whole["model"]) if {*pair, "".join(pair)} <= there]
    if any(" " in part for pair in merges for part in pair):
        raise _unfit(folder, "it merges tokens with spaces in them")
    return {"model": "gpt2", "pre": name, "merges": tuple(map(" ".join, merges))}


def _steps(part: Json | None, key: str) -> list[Json]:
    """The steps of a normalizer or pre-tokenizer, sequences laid open."""
    if part is None:
        return []
    return [inner for step in part[key] for inner in _steps(step, key)] if part["type"] == "Sequence" else [part]


def _split(step: Json) -> tuple[str, Any]:
    """A step of a pre-tokenizer as a Split has them, or as none has."""
    kind = step["type"]
    if kind == "Split" and step["behavior"] == "Isolated" and not step["invert"]:
        return "split", next(iter(step["pattern"].values()))
    if kind == "ByteLevel" and not step["add_prefix_space"]:
        return "bytes", step.get("use_regex", True)
    return ("digits", step["individual_digits"]) if kind == "Digits" else (kind, step)


def _sentencepiece(folder: Path, whole: Json, tokens: list[str]) -> Json:
    merges = _merges(whole["model"])
    special = {added["content"] for added in whole["added_tokens"] if added["special"]}  # a text is cut at them first
    _check_implied(folder, merges, whole["model"]["vocab"], special)
    made = dict.fromkeys(left + right for left, right in merges)
    place = {token: index for index, token in enumerate(dict.fromkeys([*made, *tokens]))}
    return {
        "model": "llama",
        "pre": "default",
        "scores": tuple(-float(place[token]) for token in tokens),
        "add_space_prefix": _prefixed(folder, whole),
    }


def _check_implied(folder: Path, merges: list[tuple[str, str]], vocabulary: Iterable[str], special: set[str]) -> None:
    """The merges have to be all pairs that make a token, those of one token beside each other: that is what scores say."""
    made = [left + right for left, right in merges]
    runs = [made[0], *(after for before, after in pairwise(made) if before != after)] if made else []
    if len(runs) > len(set(runs)):
        raise _unfit(folder, "its merges have an order that scores of tokens cannot give")
    known, listed = set(vocabulary), set(merges)
    for token in known - special:
        for cut in range(1, len(token)):
            pair = token[:cut], token[cut:]
            if pair[0] in known and pair[1] in known and pair not in listed:
                raise _unfit(folder, f"its merges leave out {shown(pair)}, which would be joined there")


def _prefixed(folder: Path, whole: Json) -> bool:
    """Whether a space is put before a text."""
    steps = _steps(whole.get("normalizer"), "normalizers") + _steps(whole.get("pre_tokenizer"), "pretokenizers")
    replaced = any(step["type"] == "Replace" and step["content"] == _SPACE for step in steps)
    spaces = [step for step in steps if step["type"] == "Metaspace"]
    known = {"Replace", "Prepend", "Metaspace", "Split"}  # Gemma's split is at spaces that are replaced by then
    other = [step["type"] for step in steps if step["type"] not in known]
    if other or replaced == bool(spaces) or any(step.get("split", True) for step in spaces):
        raise _unfit(
            folder, f"it is SentencePiece, and spaces are not as there ({', '.join(step['type'] for step in steps)})"
        )
    return any(step["type"] == "Prepend" or step.get("prepend_scheme", "never") != "never" for step in steps)


def _special(folder: Path, tokenizer: Tokenizer, vocab_size: int) -> Json:
    """Ids of special tokens, and whether a text begins with one."""
    inner, begins = tokenizer.inner, tokenizer.bos_ids
    bos = begins[0] if begins else inner.bos_token_id
    if len(begins) > 1:
        raise _unfit(folder, f"it puts {list(begins)} before a text, where one token has a place")
    ids = {f"{theirs}_token_id": getattr(inner, f"{ours}_id") for ours, theirs in SPECIAL.items()} | {
        "bos_token_id": bos
    }
    ids |= dict.fromkeys(_ENDS) | dict(zip(_ENDS, tokenizer.eos_ids, strict=False))
    return {"add_bos_token": bool(begins), "add_eos_token": False} | {
        key: token for key, token in ids.items() if token is not None and 0 <= token < vocab_size
    }


def _templates(template: Any) -> Json:
    """The chat template, where it is a text; of several the one named default, and the others by name."""
    if not isinstance(template, dict):
        return {TEMPLATE: template} if isinstance(template, str) else {}
    template = {name: text for name, text in template.items() if isinstance(text, str)}
    others = {name: text for name, text in template.items() if name != "default"}
    fields: Json = {f"{TEMPLATE}.{name}": text for name, text in others.items()}
    fields |= {f"{TEMPLATE}s": tuple(others)} if others else {}
    return fields | ({TEMPLATE: template["default"]} if "default" in template else {})
