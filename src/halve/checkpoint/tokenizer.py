"""Text <-> token ids, through the tokenizer files of the model's folder."""

from __future__ import annotations

from pathlib import Path

from halve.checkpoint.reader import find_model, read_json
from halve.checkpoint.token_bytes import spelled_bytes, token_bytes
from halve.errors import CheckpointError

END_OF_TEXT = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "[EOS]")


class Tokenizer:
    """A Hugging Face tokenizer reduced to what this project needs."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoTokenizer  # seconds to import: only when text is involved
        from transformers.utils import logging

        verbosity = logging.get_verbosity()
        logging.set_verbosity_error()  # it warns of a model_type it does not know, and `halve` is one
        try:
            self.inner = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
        except (OSError, ValueError, KeyError, TypeError) as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise CheckpointError(
                f"{folder}: no usable tokenizer ({reason}): copy the model's tokenizer files there"
            ) from error
        finally:
            logging.set_verbosity(verbosity)
        self.folder = folder
        self.bos_id: int | None = self.inner.bos_token_id
        self.eos_ids = self._eos_ids()

    def _eos_ids(self) -> tuple[int, ...]:
        path = self.folder / "generation_config.json"
        ids = read_json(path).get("eos_token_id") if path.exists() else None
        if ids is None:
            ids = self.inner.eos_token_id
        return () if ids is None else tuple(ids) if isinstance(ids, list) else (ids,)

    def encode(self, text: str, bos: bool) -> list[int]:
        """Token ids; with `bos` the beginning-of-sequence id first, where the model has one. Nothing else is added."""
        ids = self.inner(text, add_special_tokens=False, verbose=False)["input_ids"]
        return [self.bos_id, *ids] if bos and self.bos_id is not None else list(ids)

    def decode(self, ids: list[int]) -> str:
        """Text of the ids, special tokens left out."""
        return self.inner.decode(ids, skip_special_tokens=True)

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


def load_tokenizer(model: str | Path) -> Tokenizer:
    """The tokenizer of a model folder or hub id. Raises CheckpointError when there is none."""
    return Tokenizer(find_model(model))
