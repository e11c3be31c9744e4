"""What reproducing the tables takes, from shapes and a few short measurements: memory, disk and hours."""

from __future__ import annotations

import math
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from halve.checkpoint.reader import Checkpoint, compute_dtype
from halve.checkpoint.tokenizer import load_tokenizer
from halve.compression.compress import Request, plan_recipe
from halve.compression.estimate import forward_seconds
from halve.compression.plan import state_of
from halve.errors import HalveError, OutputError
from halve.measure.machine import available_bytes, bandwidth_gb_per_s
from halve.measure.quality.protocols.letter import letter_prompt
from halve.measure.quality.race import Question
from halve.measure.quality.scoring import BATCH_TOKENS
from halve.measure.speed.timed_model import BenchmarkOptions
from halve.studies.system1 import published, variants
from halve.studies.system1.protocol import QUESTIONS, SYSTEM1, System1Timing
from halve.studies.system1.variants import FRACTIONS, Variant

_SAMPLE = 20  # articles tokenized to learn how long a token is
_RUNNING = 1.25  # memory of running a model, over its weights


@dataclass(frozen=True)
class Needs:
    """Upper estimates. `together_bytes`: all timed models at once, which taking turns needs."""

    memory_bytes: int
    together_bytes: int
    disk_bytes: int
    seconds: float

    def check(self, out: Path, device: str) -> None:
        """Refuse what cannot succeed: OutputError for the disk, HalveError for the memory."""
        place = next(p for p in (out.resolve(), *out.resolve().parents) if p.exists())
        free = shutil.disk_usage(place).free
        if self.disk_bytes > free:
            raise OutputError(
                f"{place}: the disk has {free:,} bytes free and the models need {self.disk_bytes:,}: free some space or "
                "choose another disk with --out"
            )
        there = memory_there(device)
        if self.memory_bytes > there:
            raise HalveError(
                f"{device} has {there:,} bytes of memory free and this needs about {self.memory_bytes:,}: use a larger "
                "machine, a smaller model, or fewer calibration windows with --samples"
            )


def memory_there(device: str) -> int:
    """Bytes that can be taken now on the device."""
    kind = torch.device(device)
    return torch.cuda.mem_get_info(kind)[0] if kind.type == "cuda" else available_bytes()


def estimate_needs(
    request: Request, checkpoint: Checkpoint, questions: list[Question], fractions: bool, random_weights: bool
) -> Needs:
    """`request`: model, folder and calibration of the run; `questions`: those of the right way, none without weights."""
    device = request.device
    dtype = compute_dtype(checkpoint, request.dtype, device)
    dense = state_of(checkpoint, dtype)
    embedding = checkpoint.config.vocab_size * checkpoint.config.hidden_size
    dense_bytes = dense.linear_bytes + embedding * dtype.itemsize
    head = dense.linears[None, "head"].parameters if checkpoint.config.tied else 0
    sizes, seconds, working = {}, 0.0, [0]
    for variant in variants.kept():
        state = dense
        for method in (*variant.quantizer(random_weights), *variant.pruner()):
            state = method.plan(state).after
        sizes[variant] = state.linear_bytes + embedding * dtype.itemsize
    memory = [int(dense_bytes * _RUNNING)]
    for bits in {v.bits for v in sizes if v.bits is not None} if not random_weights else ():
        plan = plan_recipe(replace(request, steps=Variant(bits).quantizer(False)))
        memory.append(plan.estimate.memory_bytes)
        working.append(plan.disk_bytes)
        seconds += plan.estimate.seconds
    disk = sum(size for variant, size in sizes.items() if random_weights or variant.bits is not None)
    disk += max(working) + dense_bytes  # a step's folders, and a trial's model
    parameters = dense.parameters + head
    bandwidth = bandwidth_gb_per_s(device) * 1e9
    steps = (BenchmarkOptions().new_tokens + System1Timing.new_tokens) * (BenchmarkOptions().runs + 1)
    seconds += sum(size * steps / bandwidth for size in sizes.values())
    if questions:
        seconds += _exam_seconds(request, questions, parameters, dense_bytes / bandwidth, fractions)
    return Needs(max(memory), int(sum(sizes.values()) * _RUNNING), disk, seconds)


def _exam_seconds(
    request: Request, questions: list[Question], parameters: int, step_seconds: float, fractions: bool
) -> float:
    """All models, and at most all fractions, examined both ways; articles are read once for all their questions."""
    prompts = [letter_prompt(question) for question in questions]
    tokenizer = load_tokenizer(request.model)
    sample = [prompt.context for prompt in prompts[:_SAMPLE]]
    per_character = sum(len(tokenizer.encode(text, bos=True)) for text in sample) / sum(map(len, sample))
    articles = {question.article for question in questions}
    read = sum(map(len, articles)) + sum(len(p.context) - len(p.article) for p in prompts)
    own = sum(len(prompt.context) for prompt in prompts[:QUESTIONS])
    steps = SYSTEM1.max_new_tokens * math.ceil(own * per_character / BATCH_TOKENS)
    once = forward_seconds(parameters, int((read + own) * per_character), request.device) + steps * step_seconds
    tried = len(published.FRACTIONS) * len(FRACTIONS) if fractions else 0
    return once * (len(published.MODELS) + tried)
