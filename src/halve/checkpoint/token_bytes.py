"""Which bytes of a text each of its tokens stands for, from the characters that a tokenizer names for it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import accumulate, pairwise

_BYTE = re.compile("<0x[0-9A-F]{2}>")


def token_bytes(text: str, spans: Sequence[tuple[int, int]], spelled: Sequence[int]) -> list[int]:
    """Bytes (UTF-8) of `text` that belong to each token, none of them to two: their sum is the bytes of the text.

    spans: the characters [begin, end) that each token stands for, in the order of the text; spelled: the bytes it spells.
    Characters of no token (white space a tokenizer only divides at) are the next token's, those at the end the last one's.
    A character of several tokens is divided from its end: each of them has what it spells, the first has the rest, which
    is nothing where it is a space that the tokenizer itself has put before the text.
    """
    if not spans:
        return []
    place = [0, *accumulate(len(character.encode()) for character in text)]
    ends = [place[end] for end in accumulate((end for _, end in spans), max)]
    bounds = [0] * len(spans) + [place[-1]]
    for token in range(len(spans) - 1, 0, -1):
        behind, before = min(bounds[token + 1], ends[token]), ends[token - 1]
        begin = min(place[spans[token][0]], before)
        bounds[token] = min(behind, max(begin, min(before, behind - spelled[token])))
    return [end - begin for begin, end in pairwise(bounds)]


def spelled_bytes(token: str, byte_level: bool) -> int:
    """How many bytes a token of a vocabulary spells; `byte_level`: the vocabulary writes every byte as one character."""
    if byte_level:
        return len(token)
    return 1 if _BYTE.fullmatch(token) else len(token.replace("\u2581", " ").encode())
