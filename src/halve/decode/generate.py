"""Text from a model: one pass over the prompts (prefill), then one token a step (decode), on a cache sized once.

Shape legend: B prompts, T tokens of the longest prompt, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from halve.decode import gpu_step as cuda_decode
from halve.decode.cpu_step import StepPlan, step_kernel
from halve.decode.text_stream import TextStream, TokenizerLike
from halve.errors import DataError, HalveError
from halve.kernels import triton_backend
from halve.model.decoder import KVCache, Model

OnToken = Callable[[int, int], None]  # (row, token id), as soon as the token is known


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. Temperature 0 is greedy; top_k 0 and top_p 1 cut nothing.

    Row i of a batch draws from its own stream, seeded `seed + i`, so it gets the tokens it would get alone.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise HalveError(f"temperature={self.temperature} must be 0 (greedy) or a positive number")
        if self.top_k < 0:
            raise HalveError(f"top_k={self.top_k} must be 0 (off) or a positive number of tokens")
        if not 0 < self.top_p <= 1:
            raise HalveError(f"top_p={self.top_p} must be above 0 and at most 1 (off)")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0


@dataclass(frozen=True)
class Generation:
    """The new tokens of one prompt and why they ended: "stop" (a stop token, not kept), "length" or "context"."""

    tokens: list[int]
    ended: str


class Decoder:
    """Prompts in a static cache, advanced one token a step. `benchmark` times exactly these two calls."""

    def __init__(self, model: Model, prompts: Sequence[Sequence[int]], capacity: int, sampling: Sampling) -> None:
        self.model, self.prompts, self.sampling = model, prompts, sampling
        self._captured = cuda_decode.acquire(model, len(prompts), capacity)
        if self._captured is None:
            self.cache: KVCache = model.new_cache(len(prompts), capacity)
        else:
            self.cache = self._captured.cache
            self._captured.hold(self)
        self._step = StepPlan.make(model, self.cache) if self._captured is None else None
        self._generators: list[torch.Generator] = []
        if not sampling.greedy:
            for row in range(len(prompts)):
                generator = torch.Generator(device=model.device)
                self._generators.append(generator.manual_seed(sampling.seed + row))

    def prefill(self) -> Tensor:
        """Run all prompts at once; returns the first new token of each, int64 [B, 1]."""
        lengths = [len(p) for p in self.prompts]
        longest, device = max(lengths), self.model.device
        # right padding: no live token attends to what comes after it, and decoding overwrites the padded slots
        tokens_BT = torch.tensor([[*p, *[0] * (longest - len(p))] for p in self.prompts], device=device)
        hidden_BTD = self.model.hidden(tokens_BT, self.cache)
        ends_B = torch.tensor(lengths, device=device)
        if min(lengths) < longest:
            self.cache.lengths = ends_B
        # picked by index, so that the head reads contiguous rows and not a view with the stride of the prompt
        last_BD = hidden_BTD[torch.arange(len(lengths), device=device), ends_B - 1]
        return self._choose(self.model.head(last_BD))

    def step(self, tokens_B1: Tensor) -> Tensor:
        """Feed the tokens chosen last, int64 [B, 1]; returns the next ones."""
        if self._captured is not None:
            return self._captured.step(tokens_B1, None if self.sampling.greedy else self._choose)
        lengths = self.cache.lengths
        if not isinstance(lengths, int):
            # only a finished row can stand at the end: it keeps rewriting the last slot until the others are done
            lengths.clamp_(max=self.cache.capacity - 1)
        logits_BV = self.model(tokens_B1, self.cache)[:, 0] if self._step is None else self._step(tokens_B1)
        return self._choose(logits_BV)

    def _choose(self, logits_BV: Tensor) -> Tensor:
        if self.sampling.greedy:
            return logits_BV.argmax(-1, keepdim=True)
        return sample(logits_BV.float(), self.sampling, self._generators).unsqueeze(1)


def decode_kernel(model: Model) -> str:
    """What runs the decode steps of this model: one call into C, fused GPU kernels, or its own operations and why."""
    on_gpu = model.device.type == "cuda" or triton_backend.ON_CPU
    return cuda_decode.describe(model) if on_gpu else step_kernel(model)


def sample(logits_BV: Tensor, sampling: Sampling, generators: Sequence[torch.Generator]) -> Tensor:
    """One token per row, int64 [B], from float32 logits [B, V] cut by top-k, then by top-p (nucleus, arXiv 1904.09751).

    The draw is argmax(p / e) with e from Exp(1), which has the distribution of p and one stream per row.
    """
    probabilities = torch.softmax(kept_logits(logits_BV / sampling.temperature, sampling), dim=-1)
    noise = torch.empty_like(probabilities)
    for row, generator in zip(noise, generators, strict=True):
        row.exponential_(generator=generator)
    return (probabilities / noise).argmax(-1)


def kept_logits(logits_BV: Tensor, sampling: Sampling) -> Tensor:
    """The logits with everything outside the top k, then outside the smallest set of probability >= top_p, at -inf."""
    if 0 < sampling.top_k < logits_BV.shape[-1]:
        smallest = logits_BV.topk(sampling.top_k, dim=-1).values[:, -1:]
        logits_BV = logits_BV.masked_fill(logits_BV < smallest, float("-inf"))
    if sampling.top_p < 1:
        ordered, order = logits_BV.sort(dim=-1, descending=True)
        before = torch.softmax(ordered, dim=-1).cumsum(-1) - torch.softmax(ordered, dim=-1)
        dropped = torch.zeros_like(before, dtype=torch.bool).scatter_(-1, order, before >= sampling.top_p)
        logits_BV = logits_BV.masked_fill(dropped, float("-inf"))
    return logits_BV


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
    context, vocabulary = model.config.max_positions, model.config.vocab_size
    if not prompts:
        raise DataError("no prompt was given: pass at least one")
    for number, prompt in enumerate(prompts, 1):
        if not prompt:
            raise DataError(f"prompt {number} is empty: a prompt needs at least one token")
        if len(prompt) > context:
            raise DataError(
                f"prompt {number} has {len(prompt)} tokens, the model's context holds {context}: shorten the prompt"
            )
        if min(prompt) < 0 or max(prompt) >= vocabulary:
            outside = next(t for t in prompt if not 0 <= t < vocabulary)
            raise DataError(
                f"prompt {number} holds token id {outside}, the vocabulary has {vocabulary} entries: "
                f"use the tokenizer that belongs to the model"
            )


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
