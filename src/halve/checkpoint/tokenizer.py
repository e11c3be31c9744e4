"""Text <-> token ids, through the tokenizer files of the model's folder."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from halve.checkpoint.reader import find_model
from halve.checkpoint.tensors import read_json
from halve.checkpoint.token_bytes import spelled_bytes, token_bytes
from halve.errors import CheckpointError, first_line, reading, shown, unreadable

_JSON_OBJECTS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
)
# what the two kinds of tokenizer.model are read with, by the extra of this package that brings it
_READERS = {"sentencepiece": ("sentencepiece", "google.protobuf"), "tiktoken": ("tiktoken",)}
_TIKTOKEN_RANK = re.compile(rb"[A-Za-z0-9+/]+=* \d+\s")
END_OF_TEXT = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "[EOS]")


class Tokenizer:
    """A Hugging Face tokenizer reduced to what this project needs.

    bos_ids: what the tokenizer itself puts before a text, often the beginning of a sequence, or nothing. eos_ids: tokens
    that end a generation. Raises CheckpointError for files that cannot be used.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        _check_files(folder)
        ends = _eos_ids(folder)
        with self._told("no usable tokenizer"):
            self.inner = _load(folder)
            self.bos_ids = self._added_before()
            own = self.inner.eos_token_id
        self.eos_ids: tuple[int, ...] = ends if ends is not None else () if own is None else (own,)

    def encode(self, text: str, bos: bool) -> list[int]:
        """Token ids; with `bos` what the tokenizer puts before a text first. Nothing is added after it."""
        with self._told("the tokenizer cannot encode the text"):
            ids = self._ids(text, special=False)
        return [*self.bos_ids, *ids] if bos else ids

    def decode(self, ids: list[int]) -> str:
        """Text of the ids, special tokens left out."""
        with self._told("the tokenizer cannot decode its own tokens"):
            return self.inner.decode(ids, skip_special_tokens=True)

    def token(self, token_id: int) -> str:
        """How the tokenizer writes one token."""
        return str(self.inner.convert_ids_to_tokens(token_id))

    def byte_counts(self, text: str) -> list[int] | None:
        """Bytes of `text` that each token of `encode(text, bos=False)` stands for; None if the tokenizer does not tell."""
        if not self.inner.is_fast:
            return None
        made = self.inner(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        byte_level = "ByteLevel" in repr(self.inner.backend_tokenizer.decoder)
        names = self.inner.convert_ids_to_tokens(made["input_ids"])
        return token_bytes(text, made["offset_mapping"], [spelled_bytes(name, byte_level) for name in names])

    @property
    def end_of_text_id(self) -> int | None:
        """The token between two texts of the training, which the EOS of a chat model is not: that ends a turn.

        The first of EOS and special tokens that bears such a name, or the EOS of the tokenizer where none does.
        """
        own = [] if self.inner.eos_token_id is None else [self.inner.eos_token_id]
        candidates = [*own, *self.eos_ids, *self.inner.added_tokens_decoder]
        named = (token for token in candidates if self.inner.convert_ids_to_tokens(token) in END_OF_TEXT)
        return next(named, next(iter([*own, *self.eos_ids]), None))

    def _ids(self, text: str, special: bool) -> list[int]:
        return list(self.inner(text, add_special_tokens=special, verbose=False)["input_ids"])

    def _added_before(self) -> tuple[int, ...]:
        if not self._ids("", special=True):
            return ()
        for text in ("a", *self.inner.get_vocab()):
            with suppress(Exception):  # no token, and none for the unknown: another text will do
                bare, whole = self._ids(text, special=False), self._ids(text, special=True)
                for start in range(len(whole) - len(bare) + 1 if bare else 0):
                    if whole[start : start + len(bare)] == bare:
                        return tuple(whole[:start])
        return ()

    @contextmanager
    def _told(self, what: str) -> Iterator[None]:
        """In one line whatever goes wrong: the libraries of tokenizers raise anything, panics of Rust included."""
        try:
            yield
        except (KeyboardInterrupt, SystemExit, GeneratorExit):
            raise
        except BaseException as error:
            if isinstance(error, OSError) and error.errno:
                raise CheckpointError(unreadable(error, self.folder)) from error
            raise CheckpointError(
                f"{self.folder}: {what} ({first_line(error)}): copy the model's own tokenizer files there, or upgrade "
                "transformers and tokenizers if they are of a newer form"
            ) from error


def _load(folder: Path) -> Any:
    from transformers import AutoTokenizer  # seconds to import: only when text is involved
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # it warns of a model_type it does not know, and `halve` is one
    try:
        return AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
    finally:
        logging.set_verbosity(verbosity)


def _check_files(folder: Path) -> None:
    """What the library would say less of: a file that is not readable, one that is no JSON, a reader that is missing."""
    with reading(folder, CheckpointError):
        for path in (folder / name for name in _JSON_OBJECTS):
            if path.exists():
                read_json(path)
        vocabulary = folder / "tokenizer.model"
        if (folder / "tokenizer.json").exists() or not vocabulary.exists():
            return
        with vocabulary.open("rb") as file:
            kind = "tiktoken" if _TIKTOKEN_RANK.match(file.read(512)) else "sentencepiece"
    if not all(_installed(module) for module in _READERS[kind]):
        raise CheckpointError(
            f"{vocabulary}: the tokenizer is in {kind}'s own form alone, which takes a package more: "
            f"pip install 'halve[{kind}]', or put a tokenizer.json beside it"
        )


def _installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except (ImportError, ValueError):  # a parent that is not there; a module taken out by hand
        return False


def _eos_ids(folder: Path) -> tuple[int, ...] | None:
    """From where transformers takes them: generation_config.json, else config.json; None where neither names any."""
    for path in (folder / "generation_config.json", folder / "config.json"):
        config = read_json(path) if path.exists() else {}
        for part in (config, config.get("text_config")):
            ids = part.get("eos_token_id") if isinstance(part, dict) else None
            if ids is not None:
                listed = ids if isinstance(ids, list) else [ids]
                if not all(type(token) is int and abs(token) < 2**31 for token in listed):
                    raise CheckpointError(
                        f"{path}: eos_token_id={shown(ids)} must be a token id or a list of them: correct it"
                    )
                return tuple(listed)
    return None


def load_tokenizer(model: str | Path) -> Tokenizer:
    """The tokenizer of a model folder or hub id. Raises CheckpointError when there is none."""
    return Tokenizer(find_model(model))
