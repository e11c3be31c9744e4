"""Text from a model: one pass over the prompts (prefill), then one token a step (decode), on a cache sized once.

Shape legend: B prompts, T tokens of the longest prompt, D hidden size, v tokens that this rank has of
the vocabulary: on one rank all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from halve.decode.engines import start_engine
from halve.decode.sampling import Sampling, TokenChooser
from halve.decode.text_stream import TextStream, TokenizerLike
from halve.errors import DataError, HalveError
from halve.model.cache import KVCache
from halve.model.decoder import Model
from halve.model.vocabulary import check_finite, check_ids

OnToken = Callable[[int, int], None]  # (row, token id), as soon as the token is known


@dataclass(frozen=True)
class Generation:
    """The new tokens of one prompt and why they ended: "stop" (a stop token, not kept), "length" or "context"."""

    tokens: list[int]
    ended: str


class Decoder:
    """Prompts in a static cache, advanced one token a step. `benchmark` times exactly these two calls.

    `engine` runs the steps, chosen once; `passed_over` says of every better engine for this device why it does not.
    """

    def __init__(self, model: Model, prompts: Sequence[Sequence[int]], capacity: int, sampling: Sampling) -> None:
        self.model = model
        self.prompts = prompts
        self.engine, self.passed_over = start_engine(model, len(prompts), capacity)
        self.cache: KVCache = self.engine.cache
        self._choose = TokenChooser(sampling, len(prompts), model.device, model.vocabulary)

    @property
    def kernel(self) -> str:
        """What runs the steps, as records name it: the engine's kernel, and in brackets why nothing better does."""
        reasons = "; ".join(self.passed_over.values())
        return f"{self.engine.kernel} ({reasons})" if reasons else self.engine.kernel

    def prefill(self) -> Tensor:
        """Run all prompts at once; returns the first new token of each, int64 [B, 1]. HalveError for logits not finite."""
        lengths, device = [len(p) for p in self.prompts], self.model.device
        longest = max(lengths)
        # right padding: no live token attends to what comes after it, and decoding overwrites the padded slots
        tokens_BT = torch.tensor([[*p, *[0] * (longest - len(p))] for p in self.prompts], device=device)
        hidden_BTD = self.model.hidden(tokens_BT, self.cache)
        ends_B = torch.tensor(lengths, device=device)
        if min(lengths) < longest:
            self.cache.lengths = ends_B
        # picked by index, so that the head reads contiguous rows and not a view with the stride of the prompt
        last_BD = hidden_BTD[torch.arange(len(lengths), device=device), ends_B - 1]
        logits_Bv = self.model.own_logits(last_BD)
        check_finite(logits_Bv)
        return self._choose(logits_Bv)

    def step(self, tokens_B1: Tensor) -> Tensor:
        """Feed the tokens chosen last, int64 [B, 1]; returns the next ones."""
        return self.engine.step(tokens_B1, self._choose)


@torch.inference_mode()
def generate(
    model: Model,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int = 128,
    sampling: Sampling | None = None,
    stop_ids: Iterable[int] = (),
    on_token: OnToken | None = None,
) -> list[Generation]:
    """Continue token-id prompts of any lengths, together; greedy unless `sampling` says otherwise.

    A row ends at a token of `stop_ids`, after `max_new_tokens`, or when the model's context is full. Raises DataError
    for an empty prompt, one that is longer than the context, or ids outside the vocabulary.
    """
    check_prompts(model, prompts)
    if max_new_tokens < 1:
        raise HalveError(f"max_new_tokens={max_new_tokens} must be at least 1")
    # the last new token is never fed back, so it needs no position
    limits = [min(max_new_tokens, model.config.max_positions - len(p) + 1) for p in prompts]
    capacity = max(len(p) + limit for p, limit in zip(prompts, limits, strict=True)) - 1
    decoder = Decoder(model, prompts, capacity, sampling or Sampling())
    stops = frozenset(stop_ids)
    watched = stops or on_token is not None
    rows = _watched(decoder, limits, stops, on_token) if watched else _unwatched(decoder, limits)
    return [
        Generation(tokens, "stop" if stopped else "length" if len(tokens) == max_new_tokens else "context")
        for tokens, stopped in rows
    ]


def _unwatched(decoder: Decoder, limits: list[int]) -> list[tuple[list[int], bool]]:
    """Nobody looks at the tokens on the way, so the device is never waited for until the end."""
    chosen = [decoder.prefill()]
    for _ in range(max(limits) - 1):
        chosen.append(decoder.step(chosen[-1]))
    table = torch.cat(chosen, dim=1).tolist()
    return [(row[:limit], False) for row, limit in zip(table, limits, strict=True)]


def _watched(
    decoder: Decoder, limits: list[int], stops: frozenset[int], on_token: OnToken | None
) -> list[tuple[list[int], bool]]:
    rows: list[list[int]] = [[] for _ in limits]
    stopped = [False] * len(limits)
    tokens = decoder.prefill()
    while True:
        for row, (token,) in enumerate(tokens.tolist()):
            if stopped[row] or len(rows[row]) == limits[row]:
                continue
            if token in stops:
                stopped[row] = True
                continue
            rows[row].append(token)
            if on_token is not None:
                on_token(row, token)
        if all(s or len(r) == limit for s, r, limit in zip(stopped, rows, limits, strict=True)):
            return list(zip(rows, stopped, strict=True))
        tokens = decoder.step(tokens)


def check_prompts(model: Model, prompts: Sequence[Sequence[int]]) -> None:
    """Raise DataError unless every prompt has 1 to max_positions ids, all inside the vocabulary."""
    context = model.config.max_positions
    if not prompts:
        raise DataError("no prompt was given: pass at least one")
    for number, prompt in enumerate(prompts, 1):
        if not prompt:
            raise DataError(f"prompt {number} is empty: a prompt needs at least one token")
        if len(prompt) > context:
            raise DataError(
                f"prompt {number} has {len(prompt)} tokens, the model's context holds {context}: shorten the prompt"
            )
    check_ids(model.config.vocab_size, prompts)


@dataclass(frozen=True)
class TextGeneration:
    """One prompt's continuation as text (without the prompt), its tokens, and why it ended (see `Generation`)."""

    text: str
    tokens: list[int]
    ended: str


def generate_text(
    model: Model,
    tokenizer: TokenizerLike,
    prompts: str | Sequence[str],
    *,
    max_new_tokens: int = 128,
    sampling: Sampling | None = None,
    on_text: Callable[[str], None] | None = None,
) -> list[TextGeneration]:
    """Continue one text or several, each until the model's end-of-sequence token, `max_new_tokens`, or a full context.

    `on_text` receives one prompt's continuation piece by piece, as it is made; the pieces together are its text.
    Raises DataError as `generate` does, and HalveError when `on_text` is given with several prompts.
    """
    texts = [prompts] if isinstance(prompts, str) else list(prompts)
    if on_text is not None and len(texts) != 1:
        raise HalveError(f"streaming needs a single prompt, {len(texts)} were given: call it once for each")
    ids = [tokenizer.encode(text, bos=True) for text in texts]
    check_ids(model.config.vocab_size, ids, tokenizer)
    streams = [TextStream(tokenizer, row) for row in ids]

    def on_token(row: int, token: int) -> None:
        piece = streams[row].push(token)
        if piece and on_text is not None:
            on_text(piece)

    generations = generate(
        model, ids, max_new_tokens=max_new_tokens, sampling=sampling, stop_ids=tokenizer.eos_ids, on_token=on_token
    )
    for stream in streams:
        piece = stream.close()
        if piece and on_text is not None:
            on_text(piece)
    return [TextGeneration(s.text, g.tokens, g.ended) for s, g in zip(streams, generations, strict=True)]
