"""Folders of Hugging Face tokenizers made from the vocabularies of real models, without the libraries they come from."""

from __future__ import annotations

import base64
import json
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE

SPACE = "▁"
# how Llama 3 divides a text before it merges
LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
NORMAL, UNKNOWN, CONTROL, BYTE = 1, 2, 3, 6  # types of a SentencePiece piece


def sentencepiece_folder(model: Path, folder: Path) -> Path:
    """A tokenizer.json in `folder` of a SentencePiece BPE vocabulary with byte fallback."""
    return _byte_fallback(list(_pieces(model.read_bytes())), folder)


def small_folder(folder: Path) -> Path:
    """The same with a vocabulary of bytes, a few letters and a few words: what tests without real ones have."""
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    kinds = [UNKNOWN, CONTROL, CONTROL, *[BYTE] * 256]
    words = [SPACE, *"abcdefghijklmnopqrstuvwxyzOTé日本のक", SPACE + "a", SPACE + "t", "he", SPACE + "the", SPACE * 2]
    pieces = [(name, 0.0, kind) for name, kind in zip(names, kinds, strict=True)]
    return _byte_fallback(pieces + [(word, -float(rank), NORMAL) for rank, word in enumerate(words)], folder)


def _byte_fallback(pieces: list[tuple[str, float, int]], folder: Path) -> Path:
    vocabulary = {piece: index for index, (piece, _, _) in enumerate(pieces)}
    scores = {piece: score for piece, score, kind in pieces if kind == NORMAL}
    merges = [
        (-score, piece[:cut], piece[cut:])
        for piece, score in scores.items()
        for cut in range(1, len(piece))
        if piece[:cut] in scores and piece[cut:] in scores
    ]
    made = BPE(
        vocab=vocabulary,
        merges=[(left, right) for _, left, right in sorted(merges, key=lambda m: m[0])],
        unk_token="<unk>",
        fuse_unk=True,
        byte_fallback=True,
    )
    tokenizer = Tokenizer(made)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])  # type: ignore[assignment]
    tokenizer.decoder = decoders.Sequence(  # type: ignore[assignment]
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = [piece for piece, _, kind in pieces if kind in (UNKNOWN, CONTROL)]
    return save_tokenizer(tokenizer, folder, special, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def tiktoken_folder(ranks: Path, folder: Path) -> Path:
    """A tokenizer.json in `folder` of a file of tiktoken ranks, with Llama 3's special tokens."""
    tokens = {base64.b64decode(line.split()[0]): rank for rank, line in enumerate(ranks.read_bytes().splitlines())}
    letters = _byte_letters()

    def spelled(token: bytes) -> str:
        return "".join(letters[byte] for byte in token)

    merges = []
    for token, rank in tokens.items():
        halves = ((token[:cut], token[cut:]) for cut in range(1, len(token)))
        pairs = [(tokens[a], tokens[b], a, b) for a, b in halves if a in tokens and b in tokens]
        merges += [(rank, spelled(a), spelled(b)) for _, _, a, b in sorted(pairs)]
    made = BPE(
        vocab={spelled(t): r for t, r in tokens.items()},
        merges=[(a, b) for _, a, b in sorted(merges, key=lambda m: m[0])],
        ignore_merges=True,
    )
    tokenizer = Tokenizer(made)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(  # type: ignore[assignment]
        [
            pre_tokenizers.Split(Regex(LLAMA3_WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    special = ["<|begin_of_text|>", "<|end_of_text|>"]
    return save_tokenizer(tokenizer, folder, special, bos_token=special[0], eos_token=special[1])


def save_tokenizer(tokenizer: Tokenizer, folder: Path, special: Iterable[str] = (), **names: str) -> Path:
    """Files in `folder` that transformers loads; `names`: which of the special tokens are BOS (put first), EOS and unknown."""
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    if bos := names.get("bos_token"):
        before = [(bos, tokenizer.token_to_id(bos))]
        tokenizer.post_processor = processors.TemplateProcessing(f"{bos} $A", special_tokens=before)  # type: ignore[assignment]
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **names}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def _byte_letters() -> dict[int, str]:
    """The printable character a byte-level vocabulary writes for each byte."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}


def _pieces(content: bytes) -> Iterator[tuple[str, float, int]]:
    """Text, score and type of every piece: field 1 of the message, with the fields 1, 2 and 3."""
    for field, value in _fields(content):
        if field == 1:
            inner = dict(_fields(value))
            yield inner[1].decode(), struct.unpack("<f", inner[2])[0], inner.get(3, NORMAL)


def _fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """Number and value of every field of a protocol-buffers message."""
    at = 0

    def number() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = message[at]
            at += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    while at < len(message):
        key = number()
        kind = key & 7
        if kind == 0:
            yield key >> 3, number()
            continue
        size = {1: 8, 5: 4}.get(kind) or number()
        yield key >> 3, message[at : at + size]
        at += size
