"""Text <-> token ids, through the tokenizer files of the model's folder."""

from __future__ import annotations

from pathlib import Path

from halve.checkpoint.reader import find_model, read_json
from halve.errors import CheckpointError


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


def load_tokenizer(model: str | Path) -> Tokenizer:
    """The tokenizer of a model folder or hub id. Raises CheckpointError when there is none."""
    return Tokenizer(find_model(model))
