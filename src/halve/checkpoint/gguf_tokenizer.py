"""The tokenizer that a GGUF file describes, written as the files of a Hugging Face folder."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from halve.checkpoint.gguf_header import GgufHeader
from halve.errors import CheckpointError, UnsupportedModelError, shown

KEY = "tokenizer.ggml."
_KINDS = ("llama", "gpt2")
SPECIAL = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
TEMPLATE = "tokenizer.chat_template"


@dataclass(frozen=True)
class Split:
    """How a byte-level vocabulary divides a text before it merges, in steps of the tokenizers library: ("split",
    expression), ("digits", each by itself), ("bytes", also by GPT-2's expression). ignore_merges: a part that is a token
    is left whole."""

    steps: tuple[tuple[str, Any], ...]
    ignore_merges: bool = False


_GPT2 = Split((("bytes", True),))
_OWN_SPLITS = {"gpt-2": _GPT2, "gpt2": _GPT2, "smollm": Split((("digits", True), *_GPT2.steps))}
_IGNORE_MERGES = ("llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "tekken")
_WRITTEN = ("llama-bpe", "dbrx", "qwen2", "qwen35", "tekken", "gpt-4o", "gpt-2", "smollm")  # of those that are the same


def splits() -> dict[str, Split]:
    """Every `tokenizer.ggml.pre` that is known; those that files are written with come first."""
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    known = {
        name: Split((("split", expression), ("bytes", False)), name in _IGNORE_MERGES)
        for name, expression in GGUF_PRE_TOKENIZER_SPLITS.items()
    } | _OWN_SPLITS
    return {name: known[name] for name in _WRITTEN} | known


# names of splits that are the same, as llama.cpp has them
_SAME = {
    **dict.fromkeys(("olmo", "exaone4", "phi-2", "mellum", "jais", "trillion", "granite-docling", "mpt"), "gpt-2"),
    **dict.fromkeys(("refact", "starcoder", "command-r", "codeshell", "exaone", "minerva-7b"), "smollm"),
    "stablelm2": "qwen2",
}
_BEGINS = ("llama3", "llama-v3", "llama-bpe")  # byte-level vocabularies that begin a text where no field says so


def write_tokenizer(header: GgufHeader, vocab_size: int, folder: Path) -> None:
    """Write tokenizer.json and its config into `folder`, built as transformers builds them; nothing for a file without.

    Raises CheckpointError for lists that contradict each other, UnsupportedModelError for a kind that is not built.
    """
    fields = {key.removeprefix(KEY): value for key, value in header.fields.items() if key.startswith(KEY)}
    if fields.get("model") in (None, "none", "no_vocab"):
        return
    if isinstance(named := fields.get("pre"), str):
        fields["pre"] = _SAME.get(named, named)
    _check(header, fields, vocab_size)
    try:
        _build(header, fields).save_pretrained(str(folder))
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # panics of Rust included
        reason = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
        raise CheckpointError(f"{header.path}: its tokenizer cannot be built ({reason}): get an intact copy") from error


def _check(header: GgufHeader, fields: dict[str, Any], vocab_size: int) -> None:
    def fail(key: str, why: str) -> CheckpointError:
        return CheckpointError(f"{header.path}: {KEY}{key} {why}: get an intact copy")

    tokens, kind = fields.get("tokens"), fields["model"]
    if kind not in _KINDS:
        raise UnsupportedModelError(
            f"{header.path}: {KEY}model={shown(kind)} is a tokenizer that is not built, of {', '.join(_KINDS)}: take the "
            "model's Hugging Face folder"
        )
    if kind == "gpt2" and fields.get("pre") not in splits():
        raise UnsupportedModelError(
            f"{header.path}: {KEY}pre={shown(fields.get('pre'))} splits a text in a way that is not known: take the model's "
            "Hugging Face folder"
        )
    if not isinstance(tokens, tuple) or not 1 <= len(tokens) <= vocab_size:
        raise fail("tokens", f"must list at most as many tokens as the embedding has rows, {vocab_size:,}")
    if len(set(tokens)) < len(tokens):
        raise fail("tokens", "holds a token twice")
    if not all(isinstance(token, str) for token in tokens):
        raise fail("tokens", "must list texts")
    for key, kind_of in (("scores", float), ("token_type", int)):
        numbers = fields.get(key)
        if numbers is not None and not (
            isinstance(numbers, tuple)
            and len(numbers) == len(tokens)
            and all(type(one) is kind_of and math.isfinite(one) for one in numbers)
        ):
            raise fail(key, f"must hold a number for each of {len(tokens):,} tokens")
    merges = fields.get("merges")
    if merges is None and ("scores" not in fields or kind == "gpt2"):
        raise fail("merges", "is missing")
    if merges is not None and not (
        isinstance(merges, tuple) and all(isinstance(pair, str) and pair.count(" ") == 1 for pair in merges)
    ):
        raise fail("merges", "must list pairs of tokens")


def _build(header: GgufHeader, fields: dict[str, Any]) -> Any:
    from transformers import PreTrainedTokenizerFast
    from transformers.integrations.gguf.gguf_tokenizer_mapping import convert_gguf_tokenizer

    named = {"tokenizer_type": "model", "pre_tokenizer_type": "pre"}
    named |= {key: key for key in ("tokens", "scores", "token_type", "merges")}
    given = {ours: fields[theirs] for ours, theirs in named.items() if theirs in fields}
    backend, _ = convert_gguf_tokenizer(str(header.fields["general.architecture"]), given)
    _adjust(backend, fields)
    ids = {name: fields.get(f"{key}_token_id") for name, key in SPECIAL.items()}
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        add_bos_token=bool(fields.get("add_bos_token", fields["model"] == "llama" or fields.get("pre") in _BEGINS)),
        add_eos_token=bool(fields.get("add_eos_token", False)),
        **{name: None if token is None else fields["tokens"][token] for name, token in ids.items()},
        **({"chat_template": template} if isinstance(template := header.fields.get(TEMPLATE), str) else {}),
    )


def _adjust(backend: Any, fields: dict[str, Any]) -> None:
    """What llama.cpp reads of a file and transformers leaves as it is in most."""
    from tokenizers import decoders, pre_tokenizers

    if fields["model"] == "gpt2":
        split = splits()[fields["pre"]]
        backend.model.ignore_merges = split.ignore_merges
        if split is _OWN_SPLITS["smollm"]:
            gpt2 = pre_tokenizers.ByteLevel(add_prefix_space=False)
            backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), gpt2])
    elif fields.get("add_space_prefix") is False and isinstance(backend.pre_tokenizer, pre_tokenizers.Metaspace):
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
        parts = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
        backend.decoder = decoders.Sequence(parts)
