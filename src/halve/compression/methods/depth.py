"""Depth pruning: whole layers, or only their attention or their MLP, are left out. The last linear before the first gap and
all behind it can be refitted towards the dense stream (patch.py); the other weights stay as they are.

drop-layers with select=angular is the run of layers of least angular distance (Gromov et al. 2024, arXiv 2403.17887,
equation 8), select=deepest the simple variant of its section 5, which keeps the last layer. What is measured and how:
distances.py.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

from halve.compression.distances import Unit, best_start, drop_by_perplexity, measure_layers
from halve.compression.methods import obs
from halve.compression.methods.patch import refit_to_stream, same_inputs
from halve.compression.plan import Key, ModelState, StepPlan, finish, state_of
from halve.compression.walk import BlockView, Walk
from halve.errors import RecipeError
from halve.model.config import LayerConfig, ModelConfig
from halve.model.wiring import ATTENTION, MLP, SUBLAYERS, Sublayer, wires

SELECTORS = ("angular", "influence", "perplexity", "deepest")


@dataclass(frozen=True)
class Drop:
    """What the three steps share.

    count: how many go, chosen by select: angular (distance of the last token: one run of layers, or the sublayers of
    least distance), influence (1 - cosine of all tokens, each on its own), perplexity (greedy) or deepest (the last
    layer stays). layers: by hand instead, counted from 0, `21..28` with both ends, several separated by |. patch: refit
    what stands around the gaps towards the dense stream; by default where the choice reads text anyway and no layer is
    quantized. damping: added to the Hessian of that, of its mean diagonal.
    """

    name: ClassVar[str]
    kind: ClassVar[str | None] = None  # of sublayer, None for whole layers

    count: int | None = None
    select: str = "angular"
    layers: tuple[str, ...] = ()
    patch: bool | None = None
    damping: float = 0.01

    def __post_init__(self) -> None:
        if (self.count is None) == (not self.layers):
            raise RecipeError(f"step {self.name}: give either count=N or layers=FIRST..LAST")
        if self.count is not None and self.count < 1:
            raise RecipeError(f"step {self.name}: count={self.count} must be at least 1")
        if self.select not in SELECTORS:
            raise RecipeError(f"step {self.name}: select={self.select!r} is not known: use {', '.join(SELECTORS)}")
        if not 0 < self.damping <= obs.MAX_DAMPING:
            raise RecipeError(f"step {self.name}: damping={self.damping} is not in (0, {obs.MAX_DAMPING:g}]")
        parse_layers(self.name, self.layers)

    @property
    def resolved(self) -> bool:
        return bool(self.layers) or self.select == "deepest"

    @property
    def aims(self) -> bool:
        """Whether what stands before a gap is refitted."""
        return not self.resolved if self.patch is None else self.patch

    @property
    def calibrates(self) -> bool:
        return self.aims or not self.resolved

    def plan(self, state: ModelState) -> StepPlan:
        config = state.config
        dropped = self._dropped(config)
        what = "layers" if self.kind is None else f"{self.kind} sublayers"
        asked = self.count or len(dropped)
        present = len(self._candidates(config))
        if asked >= present:
            raise RecipeError(f"step {self.name}: {asked} of {present} {what} would go: keep at least one")
        layers = [self._without(layer) if index in dropped else layer for index, layer in enumerate(config.layers)]
        sources = tuple(i for i, layer in enumerate(layers) if layer.has_attention or layer.has_mlp)
        left = replace(config, layers=tuple(layers[i] for i in sources))
        action = "removed" if self.resolved else f"removed (some {len(dropped)} {what}, by select={self.select})"
        changed = {key: (state.linears[key], "refitted") for key in self._patched(state, layers)}
        skipped = {key: "not dropped" for key in state.linears if key not in changed}
        return finish(self.name, state, changed, skipped, left, sources, action)

    def _patched(self, state: ModelState, layers: list[LayerConfig]) -> list[Key]:
        """The linears that are refitted: the last before the first gap and all behind it."""
        quantized = _quantized(state)
        if quantized is not None and self.patch:
            raise RecipeError(
                f"step {self.name}: patch=true changes weights, and {quantized} is quantized: drop before quantizing, or "
                "use patch=false"
            )
        if quantized is not None or not self.aims:
            return []
        order = [(i, wire) for i, layer in enumerate(state.config.layers) for wire in wires(state.config, layer)]
        stays = [bool(wire.sublayer.units(layers[i])) for i, wire in order]
        first = max(stays.index(False) - 1, 0)
        return [(i, wire.role) for (i, wire), left in zip(order[first:], stays[first:], strict=True) if left]

    def edit(self, view: BlockView, plan: StepPlan) -> list[dict[str, Any]]:
        """Refit what stands around a gap; the plan leaves the rest out."""
        touched, rows = set(view.touched(plan)), []
        if touched:
            for stage in view.stages():
                roles = [role for role in stage.roles if role in touched]
                for together in same_inputs(view, roles):
                    rows += refit_to_stream(view, plan, stage, together, self.damping)
        return rows

    def resolve(self, walk: Walk) -> Self:
        """The same step with the chosen layers named."""
        config = walk.checkpoint.config
        count = self.count
        assert count is not None
        candidates = self._candidates(config)
        if self.select == "perplexity":
            units: list[Unit] = [(layer, self.kind) for layer in candidates]
            chosen = [layer for layer, _ in drop_by_perplexity(walk, units, count)]
        else:
            turns = measure_layers(walk)
            if self.kind is None and self.select == "angular":
                first = best_start(turns.pairs, count)
                chosen = list(range(first, first + count))
            else:
                each = dict(enumerate(turns.layers)) if self.kind is None else turns.sublayers[self.kind]
                score = {i: t.last_token if self.select == "angular" else t.influence for i, t in each.items()}
                chosen = sorted(sorted(candidates, key=lambda i: score[i])[:count])
        patch = self.aims and _quantized(state_of(walk.checkpoint, None)) is None
        return replace(self, count=None, layers=format_layers(chosen), patch=patch)

    def _candidates(self, config: ModelConfig) -> list[int]:
        return [index for index, layer in enumerate(config.layers) if any(part.units(layer) for part in self._parts())]

    def _parts(self) -> list[Sublayer]:
        """The sublayers that go."""
        return list(SUBLAYERS.values()) if self.kind is None else [SUBLAYERS[self.kind]]

    def _dropped(self, config: ModelConfig) -> set[int]:
        """Layers that lose something; where the choice needs data, the deepest stand for it."""
        candidates = self._candidates(config)
        if self.count is not None:
            last = len(config.layers) - 1
            deepest = [i for i in candidates if i != last] if self.count < len(candidates) else candidates
            return set(deepest[max(0, len(deepest) - self.count) :])
        dropped = set(parse_layers(self.name, self.layers))
        for layer in sorted(dropped - set(candidates)):
            missing = "the model has" if layer >= len(config.layers) else f"its {self.kind} is gone already, of"
            raise RecipeError(
                f"step {self.name}: no layer {layer} to drop: {missing} layers 0..{len(config.layers) - 1}"
            )
        return dropped

    def _without(self, layer: LayerConfig) -> LayerConfig:
        for part in self._parts():
            layer = part.resized(layer, 0)
        return layer


def _quantized(state: ModelState) -> str | None:
    """The name of a linear of a layer that is quantized."""
    return next((s.name for key, s in state.linears.items() if key[0] is not None and s.spec is not None), None)


@dataclass(frozen=True)
class DropLayers(Drop):
    """Drop whole layers; the result is a plain, shallower model. Options: count with select
    angular|influence|perplexity|deepest, or layers=21..28; patch, damping: refit what stands around the gaps."""

    name: ClassVar[str] = "drop-layers"


@dataclass(frozen=True)
class DropAttention(Drop):
    """Drop the attention of some layers, its norm included: their MLP stays. Options as for drop-layers."""

    name: ClassVar[str] = "drop-attention"
    kind: ClassVar[str | None] = ATTENTION.name


@dataclass(frozen=True)
class DropMlp(Drop):
    """Drop the MLP of some layers, its norm included: their attention stays. Options as for drop-layers."""

    name: ClassVar[str] = "drop-mlp"
    kind: ClassVar[str | None] = MLP.name


def parse_layers(step: str, parts: tuple[str, ...]) -> list[int]:
    """Layers of a `layers` option, ascending. Raises RecipeError for anything but `7` or `21..28`."""
    layers: list[int] = []
    for part in parts:
        match = re.fullmatch(r"(\d+)(?:\.\.(\d+))?", part.strip())
        if match is None or (match[2] is not None and int(match[2]) < int(match[1])):
            raise RecipeError(
                f"step {step}: layers={part!r} is neither a layer (7) nor a range with both ends (21..28)"
            )
        layers += range(int(match[1]), int(match[2] or match[1]) + 1)
    twice = {layer for layer in layers if layers.count(layer) > 1}
    if twice:
        raise RecipeError(f"step {step}: layers names layer {min(twice)} twice")
    return sorted(layers)


def format_layers(layers: list[int]) -> tuple[str, ...]:
    """The shortest way to write them: runs as ranges."""
    parts: list[list[int]] = []
    for layer in layers:
        if parts and parts[-1][-1] == layer - 1:
            parts[-1].append(layer)
        else:
            parts.append([layer])
    return tuple(str(run[0]) if len(run) == 1 else f"{run[0]}..{run[-1]}" for run in parts)
