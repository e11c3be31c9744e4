"""Short answers generated for many prompts at once, and how an answer is read out of them."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from halve.evaluate.race import LETTERS
from halve.model import Model

MAX_NEW_TOKENS = 20

# The whole answer, or its first part, is one capital letter of its own: "B", "B.", "(B)", "B) the dog"; not "A dog".
STRICT = re.compile(r"\s*\(?([A-Z])(?:[).:,]|\s*(?:\n|$))")

# What the first system accepts anywhere in the text: "answer: b", "answer is b", "b)", in either case and with no
# border after the letter, so that "answer is because" counts as B.
SYSTEM1 = re.compile(r"answer(?::\s*|\s+is\s+)([abcd])|([abcd])\)", re.IGNORECASE)


def strict_answer(text: str, options: int) -> int | None:
    """Index of the option a generated text names at its very start, None when it names none of the options."""
    found = STRICT.match(text)
    index = LETTERS.index(found[1]) if found else options
    return index if index < options else None


def system1_answer(text: str, options: int) -> int | None:
    """Index of the first letter the loose pattern finds, None when it finds none."""
    found = SYSTEM1.search(text)
    index = LETTERS.index((found[1] or found[2]).upper()) if found else options
    return index if index < options else None


def generate(
    model: Model,
    prompts: Sequence[Sequence[int]],
    choose: Callable[[Tensor, int], int],
    stop: tuple[int, ...],
    max_new_tokens: int = MAX_NEW_TOKENS,
) -> list[list[int]]:
    """Up to `max_new_tokens` ids after each prompt; a row ends before a token of `stop`.

    choose(logits [V] float32 on the CPU, row) gives the next id of a row.
    """
    lengths = [len(prompt) for prompt in prompts]
    tokens = torch.zeros(len(prompts), max(lengths), dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        tokens[row, : lengths[row]] = torch.tensor(prompt)
    answers: list[list[int]] = [[] for _ in prompts]
    running = set(range(len(prompts)))
    with torch.inference_mode():
        cache = model.new_cache(len(prompts), max(lengths) + max_new_tokens)
        hidden = model.hidden(tokens.to(model.device), cache)
        ends = torch.tensor(lengths, device=model.device)
        cache.lengths = ends
        hidden = hidden[torch.arange(len(prompts), device=model.device), ends - 1]
        for step in range(max_new_tokens):
            logits = model.head(hidden).float().cpu()
            chosen = torch.zeros(len(prompts), 1, dtype=torch.int64)
            for row in sorted(running):
                token = choose(logits[row], row)
                chosen[row] = token
                if token in stop:
                    running.remove(row)
                else:
                    answers[row].append(token)
            if not running or step == max_new_tokens - 1:
                break
            hidden = model.hidden(chosen.to(model.device), cache)[:, 0]
    return answers


def greedy(logits_V: Tensor, row: int) -> int:
    """The most probable token."""
    return int(logits_V.argmax())


def sampler(seeds: Sequence[int], temperature: float, top_k: int, top_p: float) -> Callable[[Tensor, int], int]:
    """Seeded sampling, one stream per row, so that a row's text does not depend on the batch it is in.

    Temperature, then the `top_k` most probable tokens, then the fewest of them whose probabilities sum to `top_p`.
    """
    streams = [torch.Generator().manual_seed(seed) for seed in seeds]

    def choose(logits_V: Tensor, row: int) -> int:
        values, ids = (logits_V / temperature).topk(min(top_k, len(logits_V)))
        probabilities = values.softmax(dim=0)
        before = probabilities.cumsum(0) - probabilities
        probabilities = probabilities * (before < top_p)
        return int(ids[torch.multinomial(probabilities, 1, generator=streams[row])])

    return choose
