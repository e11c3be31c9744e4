"""Bytes of a text shared out among its tokens: by hand, and on random text for real and for normalizing vocabularies."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from tokenizers import Tokenizer as Made
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from halve.checkpoint.token_bytes import token_bytes
from halve.checkpoint.tokenizer import Tokenizer
from tests.common import random_text
from tests.vocabularies import save_tokenizer

BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
LETTERS = ["\u2581", *"abcdefghijklmnopqrstuvwxyz"]


@pytest.mark.parametrize(
    ("text", "spans", "spelled", "expected"),
    [
        ("ab c", [(0, 2), (2, 4)], [2, 2], [2, 2]),
        # a space put before the text has no byte of it, whether it stands alone or within a token
        ("鷗é", [(0, 1)] * 4 + [(1, 2)], [1, 1, 1, 1, 2], [0, 1, 1, 1, 2]),
        ("the", [(0, 3)], [4], [3]),
        (" the", [(0, 1), (0, 4)], [1, 4], [0, 4]),
        # white space of no token: the next one's, at the end the last one's
        (" a  b \n", [(1, 2), (4, 5)], [1, 1], [2, 5]),
        # NFKC: of one ligature two tokens, of two characters one token
        ("ﬁe\u0301", [(0, 1), (0, 1), (1, 3)], [1, 1, 2], [2, 1, 3]),
        # a space before the text, and a space of two bytes in it: as many bytes spelled as there are, of others
        ("a\u00a0b", [(0, 1), (1, 3)], [2, 2], [1, 3]),
        # more tokens than bytes
        ("é", [(0, 1)] * 3, [1, 1, 1], [0, 1, 1]),
        # a token that ends inside a character, and the next that begins there
        ("a🙂b", [(0, 2), (1, 3)], [3, 4], [2, 4]),
        ("", [], [], []),
    ],
)
def test_bytes_by_hand(text: str, spans: list[tuple[int, int]], spelled: list[int], expected: list[int]) -> None:
    assert token_bytes(text, spans, spelled) == expected


def test_every_byte_belongs_to_one_token(any_tokenizer: Tokenizer) -> None:
    rng = random.Random(11)
    for _ in range(200):
        text = random_text(rng, 40)
        counts, ids = any_tokenizer.byte_counts(text), any_tokenizer.encode(text, bos=False)
        assert counts is not None and len(counts) == len(ids)
        assert sum(counts) == len(text.encode())
        names = any_tokenizer.inner.convert_ids_to_tokens(ids)
        assert all(count == 1 for name, count in zip(names, counts, strict=True) if name in BYTES)


def test_tokens_of_bytes_stand_for_what_they_spell(any_tokenizer: Tokenizer) -> None:
    """Of a text without a space at its start all tokens but the first decode, behind others, to their own bytes."""
    rng = random.Random(12)
    for _ in range(40):
        text = "x" + random_text(rng).replace("\ufffd", "")
        ids, counts = any_tokenizer.encode(text, bos=False), any_tokenizer.byte_counts(text)
        assert counts is not None
        if any_tokenizer.decode(ids) != text:
            continue  # a character that no token spells
        for cut in range(1, len(ids) + 1):
            spelled = any_tokenizer.decode(ids[:cut])
            if text.startswith(spelled):  # the cut is not within a character
                assert sum(counts[:cut]) == len(spelled.encode())


def _byte_fallback(*normalizer: normalizers.Normalizer, split: pre_tokenizers.PreTokenizer | None = None) -> Made:
    vocabulary = ["<unk>", *BYTES, *LETTERS]
    merges = [] if split is None else [("\u2581", "h")]
    vocabulary += [a + b for a, b in merges]
    made = Made(models.BPE({t: i for i, t in enumerate(vocabulary)}, merges, unk_token="<unk>", byte_fallback=True))
    made.normalizer = normalizers.Sequence(list(normalizer))  # type: ignore[assignment]
    if split is not None:
        made.pre_tokenizer = split  # type: ignore[assignment]
    return made


def _byte_level() -> Made:
    letters = ["<unk>", *pre_tokenizers.ByteLevel.alphabet()]
    made = Made(models.BPE({t: i for i, t in enumerate(letters)}, []))
    made.normalizer = normalizers.NFC()  # type: ignore[assignment]
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)  # type: ignore[assignment]
    made.post_processor = processors.ByteLevel(trim_offsets=True)  # type: ignore[assignment]
    made.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    return made


def _word_pieces() -> Made:
    words = ["<unk>", *LETTERS, *("##" + letter for letter in LETTERS)]
    made = Made(models.WordPiece({t: i for i, t in enumerate(words)}, unk_token="<unk>"))
    made.normalizer = normalizers.BertNormalizer()  # type: ignore[assignment]
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()  # type: ignore[assignment]
    return made


NFKC, LOWERCASE, PREPEND = normalizers.NFKC(), normalizers.Lowercase(), normalizers.Prepend("\u2581")
METASPACE = pre_tokenizers.Metaspace(prepend_scheme="always")
NORMALIZING = {
    "NFKC, lowercase, a space before": lambda: _byte_fallback(NFKC, LOWERCASE, PREPEND),
    "NFD, a space before each part": lambda: _byte_fallback(normalizers.NFD(), split=METASPACE),
    "accents and spaces taken off": lambda: _byte_fallback(NFKC, normalizers.StripAccents(), normalizers.Strip()),
    "spaces left out": lambda: _byte_fallback(normalizers.Replace(" ", "")),
    "bytes, NFC, spaces left out of the spans": _byte_level,
    "words, control characters left out": _word_pieces,
}


@pytest.mark.parametrize("kind", NORMALIZING)
def test_normalized_text_is_counted_as_it_was(kind: str, tmp_path: Path) -> None:
    tokenizer = Tokenizer(save_tokenizer(NORMALIZING[kind](), tmp_path, unk_token="<unk>"))
    rng = random.Random(13)
    for text in ["  \uff28ello WORLD ﷺ ㌀鷗 e\u0301 ﬁ 🙂\nx  ", *(random_text(rng, 40) for _ in range(100))]:
        counts = tokenizer.byte_counts(text)
        assert counts is not None and len(counts) == len(tokenizer.encode(text, bos=False))
        assert not counts or (sum(counts) == len(text.encode()) and min(counts) >= 0)
