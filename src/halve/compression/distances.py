"""How much every layer, and every run of layers, turns the residual stream: the distances depth pruning goes by.

Source: Gromov et al. 2024 (arXiv 2403.17887), equation 7: d(x, y) = arccos(x . y / (|x| |y|)) / pi between the stream
before layer l and before layer l + n; a run with a small distance does little. The stream is taken before the final
norm. Shape legend: B windows, T tokens, D hidden size, P points of the stream (layers + 1).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from halve.compression.walk import Walk
from halve.model.decoder import Block, Span, finish_logits
from halve.model.wiring import SUBLAYERS
from halve.progress import track


def angular_distances(x_TPD: Tensor) -> Tensor:
    """arccos(cosine)/pi between any two of P vectors, float32 [T, P, P], for each of T tokens.

    Computed as 2 asin(|a - b| / 2) of the unit vectors, in float32: a cosine near 1 keeps none of the digits that
    tell a small angle (in bfloat16 every angle below 3.6 degrees is 0), the difference keeps them all.
    """
    unit = functional.normalize(x_TPD.float(), dim=-1)
    chord = torch.cdist(unit, unit, compute_mode="donot_use_mm_for_euclid_dist")
    return (chord / 2).clamp(max=1).asin() * (2 / math.pi)


def angular_distance(a: Tensor, b: Tensor) -> Tensor:
    """The same between a and b [..., D]: float32 [...]."""
    chord = (functional.normalize(a.float(), dim=-1) - functional.normalize(b.float(), dim=-1)).norm(dim=-1)
    return (chord / 2).clamp(max=1).asin() * (2 / math.pi)


def influence(distance: Tensor) -> Tensor:
    """1 - cosine for angular distances: the block influence of Men et al. 2024 (arXiv 2403.03853), equation 1."""
    return 2 * (distance * (math.pi / 2)).sin().square()


@dataclass(frozen=True)
class Distances:
    """How far a layer or sublayer turns the stream, mean over windows: angular distance of the last token and of all
    tokens, and influence (1 - cosine) of all tokens."""

    last_token: float
    all_tokens: float
    influence: float


@dataclass(frozen=True)
class LayerDistances:
    """What one pass measures: `pairs` float64 [P, P], d(start, end) of the last token, mean over windows; the
    distances of every layer; those of every sublayer, by kind and layer."""

    pairs: Tensor
    layers: list[Distances]
    sublayers: dict[str, dict[int, Distances]]


class _RunningMean:
    """Running mean of the distances of one layer or sublayer."""

    def __init__(self) -> None:
        self.last = 0.0
        self.all = 0.0
        self.influence = 0.0
        self.windows = 0
        self.tokens = 0

    def add(self, before: Tensor, after: Tensor) -> None:
        distance = angular_distance(before, after)  # [B, T]
        self.last += float(distance[:, -1].sum(dtype=torch.float64))
        self.all += float(distance.sum(dtype=torch.float64))
        self.influence += float(influence(distance).sum(dtype=torch.float64))
        self.windows += distance.shape[0]
        self.tokens += distance.numel()

    def value(self) -> Distances:
        return Distances(self.last / self.windows, self.all / self.tokens, self.influence / self.tokens)


class _BlockMeter:
    """Runs one block, sublayer by sublayer, and keeps what it and each of them do to the stream."""

    def __init__(self) -> None:
        self.whole = _RunningMean()
        self.parts = {kind: _RunningMean() for kind in SUBLAYERS}

    def run(self, block: Block, state: Tensor, span: Span) -> Tensor:
        x = state
        for kind, mean in self.parts.items():
            if SUBLAYERS[kind].units(block.layer):
                part = block.only((kind,))
                y = part(x, span)
                mean.add(x, y)
                x = y
        self.whole.add(state, x)
        return x


def _layer_distances(pairs: Tensor, meters: list[_BlockMeter]) -> LayerDistances:
    parts: dict[str, dict[int, Distances]] = {
        kind: {i: meter.parts[kind].value() for i, meter in enumerate(meters) if meter.parts[kind].tokens}
        for kind in SUBLAYERS
    }
    return LayerDistances(pairs, [meter.whole.value() for meter in meters], parts)


@torch.inference_mode()
def measure_layers(walk: Walk) -> LayerDistances:
    """Walk through a model block by block: one block in memory, and the last tokens [windows, P, D] at every point."""
    meters = [_BlockMeter() for _ in walk.checkpoint.config.layers]
    last = [torch.cat([state[:, -1].float() for state in walk.states[0]])]
    for index, meter in enumerate(meters):
        block = walk.block(index).block
        assert block is not None
        for i, state in enumerate(walk.states[0]):
            walk.states[0][i] = meter.run(block, state, walk.span(state.shape[1]))
        last.append(torch.cat([state[:, -1].float() for state in walk.states[0]]))
    pairs = angular_distances(torch.stack(last, 1)).mean(0, dtype=torch.float64)
    return _layer_distances(pairs.cpu(), meters)


@torch.inference_mode()
def measure_every_run(walk: Walk) -> tuple[LayerDistances, Tensor]:
    """The same and d(start, end) float64 [P, P] as the mean over all tokens, in one pass, a batch of windows at a time.

    The whole model is in memory, and the stream at every point for one batch.
    """
    blocks = [walk.block(index).block for index in range(len(walk.checkpoint.config.layers))]
    meters = [_BlockMeter() for _ in blocks]
    points = len(blocks) + 1
    last_token = torch.zeros(points, points, dtype=torch.float64)
    all_tokens = torch.zeros(points, points, dtype=torch.float64)
    windows = 0
    tokens = 0
    for state in walk.states[0]:
        span = walk.span(state.shape[1])
        stream = [state.float()]
        for block, meter in zip(blocks, meters, strict=True):
            assert block is not None
            state = meter.run(block, state, span)
            stream.append(state.float())
        for window in zip(*stream, strict=True):  # the points of one window, each [T, D]
            pairs = angular_distances(torch.stack(window, 1))
            last_token += pairs[-1].double().cpu()
            all_tokens += pairs.sum(0, dtype=torch.float64).cpu()
            windows += 1
            tokens += pairs.shape[0]
    return _layer_distances(last_token / windows, meters), all_tokens / tokens


def best_start(pairs: Tensor, count: int) -> int:
    """First layer of the run of `count` layers with the least distance (equation 8 of the source)."""
    starts = pairs.shape[0] - count
    return int(torch.stack([pairs[start, start + count] for start in range(starts)]).argmin())


Unit = tuple[int, str | None]  # (layer, kind of sublayer; None for the whole layer)


@torch.inference_mode()
def drop_by_perplexity(walk: Walk, candidates: list[Unit], count: int) -> list[Unit]:
    """The `count` units whose going costs least, chosen one after another.

    In each round every unit left is tried and the one without which the negative log-likelihood of the calibration
    windows is least goes (the greedy search of Song et al. 2024, arXiv 2402.09025). The whole model is in memory.
    """
    scorer = _Scorer(walk)
    dropped = set[Unit]()
    left = list(candidates)
    for _ in track(range(count), description="layers by perplexity"):
        losses = scorer.losses(dropped, left)
        dropped.add(left.pop(losses.index(min(losses))))
    return sorted(dropped, key=candidates.index)


def _sublayers(block: Block) -> dict[str, Block]:
    """Each of a block's sublayers as a block."""
    return {kind: block.only((kind,)) for kind, part in SUBLAYERS.items() if part.units(block.layer)}


class _Scorer:
    """The negative log-likelihood of the calibration windows by the model without some of its units."""

    def __init__(self, walk: Walk) -> None:
        assert walk.calibration is not None
        checkpoint = walk.checkpoint
        self.walk = walk
        self.tokens = walk.calibration.windows.split([state.shape[0] for state in walk.states[0]])
        blocks = [walk.block(index).block for index in range(len(checkpoint.config.layers))]
        self.parts = [_sublayers(block) for block in blocks if block is not None]
        self.norm = checkpoint.final_norm(walk.dtype, walk.device)
        self.project_out = checkpoint.projections(walk.dtype, walk.device).get("project_out")
        self.head = checkpoint.head(walk.dtype, walk.device)

    def losses(self, dropped: set[Unit], candidates: list[Unit]) -> list[float]:
        """For each candidate the summed loss without it and without `dropped`; what comes before it is computed once."""
        total = [0.0] * len(candidates)
        for state, tokens in zip(self.walk.states[0], self.tokens, strict=True):
            span = self.walk.span(state.shape[1])
            x = state
            for index in range(len(self.parts)):
                for number, unit in enumerate(candidates):
                    if unit[0] == index:
                        total[number] += self._loss(x, index, dropped | {unit}, tokens, span)
                x = self._layer(x, index, dropped, span)
        return total

    def _layer(self, x: Tensor, index: int, dropped: set[Unit], span: Span) -> Tensor:
        if (index, None) in dropped:
            return x
        for kind, part in self.parts[index].items():
            if (index, kind) not in dropped:
                x = part(x, span)
        return x

    def _loss(self, x: Tensor, first: int, dropped: set[Unit], tokens: Tensor, span: Span) -> float:
        for index in range(first, len(self.parts)):
            x = self._layer(x, index, dropped, span)
        x = x if self.norm is None else self.norm(x)
        x = x if self.project_out is None else self.project_out(x)
        total = 0.0
        for row, target in zip(x, tokens.to(x.device), strict=True):  # the logits of one window at a time
            logits = finish_logits(self.walk.checkpoint.config, self.head(row[:-1]))
            total += float(functional.cross_entropy(logits.float(), target[1:], reduction="sum"))
        return total
