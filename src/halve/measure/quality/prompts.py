"""From a prompt to token sequences: context and option tokenized together, and the cut to the context.

Token sequences are lists of ids; `starts[i]` is where the option's tokens begin in `sequences[i]`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from halve.decode.text_stream import TokenizerLike
from halve.measure.quality.race import LETTERS, Question


@dataclass(frozen=True)
class Prompt:
    """Context = head + article + tail; each continuation is judged after it (none: text is generated).

    one_cut: all continuations see the same article when it must be cut, not each the most that fits before it.
    """

    head: str
    article: str
    tail: str
    continuations: tuple[str, ...] = ()
    one_cut: bool = False

    @property
    def context(self) -> str:
        return self.head + self.article + self.tail


@dataclass(frozen=True)
class EncodedPrompt:
    """Token sequences of context + continuation, or of the context alone when there is nothing to continue with.

    cut: article tokens dropped from its left (the most for any option); overflow: question and options alone do not fit
    (sequences are empty).
    """

    sequences: tuple[tuple[int, ...], ...]
    starts: tuple[int, ...]
    cut: int = 0
    overflow: bool = False


def lettered(question: Question) -> str:
    """The options, a line each: "A) a dog"."""
    return "\n".join(f"{letter}) {option}" for letter, option in zip(LETTERS, question.options, strict=False))


def encode_prompt(tokenizer: TokenizerLike, prompt: Prompt, room: int) -> EncodedPrompt:
    """Tokens of context + continuation together, at most `room` of them; the article loses tokens from its left to fit.

    An option's tokens are those after the longest common prefix with the context alone: a tokenizer may merge
    characters across the border, and one that adds a space at the start of a text does so only once. Options are
    texts of very different lengths: each is cut by what it needs itself, so that a long one takes no context from others.
    """
    context = tokenizer.encode(prompt.context, bos=True)
    if prompt.continuations:
        sequences = [tokenizer.encode(prompt.context + option, bos=True) for option in prompt.continuations]
        # every option keeps a token of its own, even where its text merged into the context's last token
        starts = [min(common_prefix(context, s), len(s) - 1) for s in sequences]
    else:
        sequences, starts = [context], [len(context)]
    excess = [max(0, len(s) - room) for s in sequences]
    if prompt.one_cut:
        excess = [max(excess)] * len(excess)
    if max(excess) > 0:
        first, count = _article_span(tokenizer, prompt, context)
        if max(excess) > count or any(first + e > start for e, start in zip(excess, starts, strict=True)):
            return EncodedPrompt((), (), overflow=True)
        sequences = [s[:first] + s[first + e :] for s, e in zip(sequences, excess, strict=True)]
        starts = [start - e for start, e in zip(starts, excess, strict=True)]
    if min(starts) < 1:  # without BOS and without article nothing predicts the first token
        return EncodedPrompt((), (), overflow=True)
    return EncodedPrompt(tuple(tuple(s) for s in sequences), tuple(starts), max(excess))


def _article_span(tokenizer: TokenizerLike, prompt: Prompt, context: list[int]) -> tuple[int, int]:
    """Where the article's tokens begin in the context's, and how many there are."""
    first = common_prefix(context, tokenizer.encode(prompt.head, bos=True))
    bare = tokenizer.encode(prompt.head + prompt.tail, bos=True)
    shared = min(common_prefix(context[::-1], bare[::-1]), len(bare) - min(first, len(bare)))
    return first, max(0, len(context) - first - shared)


def common_prefix(first: Sequence[int], second: Sequence[int]) -> int:
    """Number of equal leading tokens."""
    for index, (a, b) in enumerate(zip(first, second, strict=False)):
        if a != b:
            return index
    return min(len(first), len(second))
