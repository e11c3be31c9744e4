"""Width pruning of whole units: channels of the MLP, or key/value groups with their query heads.

What reads a unit is one block of columns of the sublayer's last linear; what produces it are rows of those before.
Units are chosen by what their going costs that one layer, the rows go with them, and the columns that stay are refitted
by least squares on the calibration inputs (obs.py). The result is an ordinary narrower model: where every layer keeps
the same width it loads anywhere.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from halve.checkpoint.stored import StoredLinear
from halve.compression.edits import check_fraction, column_norms, narrow_inputs, narrow_outputs, row_norms
from halve.compression.methods import obs
from halve.compression.methods.allocation import SMALLEST_SHARE, allocate, parse_widths, rounded_width
from halve.compression.methods.problem import Calibrated, Problem
from halve.compression.methods.targets import best_alpha
from halve.compression.plan import Key, ModelState, StepPlan, finish
from halve.compression.second_moment import second_moment
from halve.compression.walk import BlockView, Walk
from halve.errors import RecipeError
from halve.model import wiring
from halve.model.config import LayerConfig, ModelConfig
from halve.model.linear import Linear
from halve.model.wiring import ATTENTION, MLP, WIRES, Sublayer

SCORES = ("l1", "activation", "obs")
ALLOCATIONS = ("uniform", "global")
TARGETS = ("layer", "dense")


@dataclass(frozen=True)
class PruneUnits:
    """What prune-mlp and prune-heads share.

    score: l1 (absolute sum of all weights that go), activation (squared output the unit carries alone) or obs (least
    growth of the layer's squared output error, units taken greedily, with what the refit gives back when it is on).
    refit: least squares on the calibration inputs. allocation: the same share in every layer, or the same total
    distributed by score. widths: one number per layer, by hand. damping: added to the Hessian, of its mean diagonal.
    target: what the refit aims at, the layer's own output or the dense model's stream, as far as that helps on held-out
    tokens.
    """

    name: ClassVar[str]
    sublayer: ClassVar[Sublayer]
    part: ClassVar[str]  # what messages call the sublayer
    unit: ClassVar[str]  # and what its units

    fraction: float = 0.2
    score: str = "obs"
    refit: bool = True
    allocation: str = "uniform"
    multiple_of: int = 1
    widths: tuple[str, ...] = ()
    damping: float = 0.01
    target: str = "layer"

    def __post_init__(self) -> None:
        check_fraction(self.name, self.fraction)
        for option, known in (("score", SCORES), ("allocation", ALLOCATIONS), ("target", TARGETS)):
            value = getattr(self, option)
            if value not in known:
                raise RecipeError(f"step {self.name}: {option}={value!r} is not known: use one of {', '.join(known)}")
        if self.multiple_of < 1:
            raise RecipeError(f"step {self.name}: multiple_of={self.multiple_of} must be at least 1")
        if not 0 < self.damping <= obs.MAX_DAMPING:
            raise RecipeError(f"step {self.name}: damping={self.damping} is not in (0, {obs.MAX_DAMPING:g}]")
        parse_widths(self.name, self.widths)
        if not self.resolved and self.fraction > 1 - SMALLEST_SHARE:
            raise RecipeError(
                f"step {self.name}: allocation=global leaves every layer {SMALLEST_SHARE:.0%}: fraction={self.fraction} "
                f"is above {1 - SMALLEST_SHARE:g}, lower it or use allocation=uniform"
            )

    @property
    def calibrates(self) -> bool:
        return self.refit or self.score != "l1"

    @property
    def aims(self) -> bool:
        """Whether the refit needs the dense stream."""
        return self.refit and self.target == "dense"

    @property
    def resolved(self) -> bool:
        return self.allocation == "uniform" or bool(self.widths)

    @property
    def reader(self) -> str:
        """Role of the linear that reads the units."""
        return self.sublayer.writer

    def columns(self, config: ModelConfig, layer: LayerConfig) -> int:
        """Columns of the reader that belong to one unit."""
        return WIRES[self.reader].inputs(config, layer) // self.sublayer.units(layer)

    def producers(self, config: ModelConfig, layer: LayerConfig) -> dict[str, int]:
        """The linears whose rows go with a unit, and how many rows each."""
        units = self.sublayer.units(layer)
        roles = wiring.producers(self.reader)
        return {w.role: w.outputs(config, layer) // units for w in wiring.wires(config, layer) if w.role in roles}

    def plan(self, state: ModelState) -> StepPlan:
        kept = self._kept(state)
        changed: dict[Key, tuple[StoredLinear, str]] = {}
        layers = list(state.config.layers)
        skipped = {key: f"not part of the {self.part}" for key in state.linears}
        for index, layer in enumerate(layers):
            if not self.sublayer.units(layer):
                continue
            self._check(state, index)
            count = kept[index]
            total = self.sublayer.units(layer)
            about = "" if self.resolved else "about "
            action = f"keeps {about}{count} of {total} {self.unit}s"
            per_unit = self.columns(state.config, layer)
            reader = state.linears[index, self.reader]
            fitted = ", refitted" if self.refit and count < total else ""
            changed[reader.key] = reader.narrowed(inputs=count * per_unit), action + fitted
            for role, rows in self.producers(state.config, layer).items():
                changed[index, role] = state.linears[index, role].narrowed(outputs=count * rows), action
            layers[index] = self.sublayer.resized(layer, count)
        for key in changed:
            del skipped[key]
        return finish(self.name, state, changed, skipped, replace(state.config, layers=tuple(layers)))

    def _kept(self, state: ModelState) -> list[int]:
        """Units that stay in each layer."""
        sizes = [self.sublayer.units(layer) for layer in state.config.layers]
        if not self.widths:
            return self._uniform(sizes)
        widths = parse_widths(self.name, self.widths)
        if len(widths) != len(sizes):
            raise RecipeError(f"step {self.name}: widths names {len(widths)} layers, the model has {len(sizes)}")
        for index, (width, size) in enumerate(zip(widths, sizes, strict=True)):
            if width > size or (width == 0) != (size == 0):
                raise RecipeError(f"step {self.name}: widths asks for {width} of {size} {self.unit}s in layer {index}")
        return widths

    def _uniform(self, sizes: list[int]) -> list[int]:
        return [rounded_width(self.name, s, self.fraction, self.multiple_of, self.unit) if s else 0 for s in sizes]

    def _check(self, state: ModelState, index: int) -> None:
        if state.config.qk_norm_whole and self.sublayer is ATTENTION:
            raise RecipeError(
                f"step {self.name}: this model normalises queries and keys over all heads together, so that without some "
                "the others would change: prune-mlp and drop-attention leave them as they are"
            )
        reader = state.linears[index, self.reader]
        between = [(reader.name, reader.kept_in, reader.shape.in_features)]
        for role in self.producers(state.config, state.config.layers[index]):
            linear = state.linears[index, role]
            between.append((linear.name, linear.kept_out, linear.shape.out_features))
        for name, kept, full in between:
            if kept < full:
                raise RecipeError(
                    f"step {self.name}: an earlier step left {name} {kept} of {full} channels: "
                    "put this step before pruning per linear"
                )
        if self.refit and reader.spec is not None:
            raise RecipeError(
                f"step {self.name}: refit=true changes the weight of {reader.name}, which is quantized: "
                "prune before quantizing, or use refit=false"
            )

    def resolve(self, walk: Walk) -> Self:
        """The same total, distributed over the layers by score."""
        config = walk.checkpoint.config
        sizes = [self.sublayer.units(layer) for layer in config.layers]
        curves = []
        for index, layer in enumerate(config.layers):
            view = walk.block(index)
            loss = torch.zeros(0, dtype=torch.float64)
            if sizes[index] > 1:
                with torch.inference_mode():
                    loss = self._removal(view, layer, config, sizes[index] - 1).loss
            if walk.calibrated and view.block is not None:
                walk.advance(view.block)
            if sizes[index] > 1:
                # a share of the stream the layer adds to, so that layers compare; the typical token's, since a few
                # tokens carry values a thousand times larger
                scale = _typical_energy(walk.states[0]) if self.score != "l1" else float(loss[-1])
                loss = loss / max(scale, 1e-300)
            curves.append(loss)
        widths = allocate(sizes, curves, sum(self._uniform(sizes)), self.multiple_of)
        return replace(self, widths=tuple(map(str, widths)))

    def _removal(self, view: BlockView, layer: LayerConfig, config: ModelConfig, count: int) -> obs.Removal:
        reader = view.linears[self.reader]
        per_unit = self.columns(config, layer)
        moment = second_moments(view, self.reader, held_out=False)[0] if self.score != "l1" else None
        return self._rank(view, reader, moment, per_unit, self.producers(config, layer), count)

    def _rank(
        self,
        view: BlockView,
        reader: Linear,
        moment: Tensor | None,
        per_unit: int,
        producers: dict[str, int],
        count: int,
    ) -> obs.Removal:
        """The `count` units that go first, and what that costs."""
        if self.score == "l1":
            score = _unit_sums(column_norms(reader), per_unit)
            for role, rows in producers.items():
                score = score + _unit_sums(row_norms(view.linears[role]), rows)
        else:
            assert moment is not None
            weight = view.linears[self.reader].dense_weight(torch.float64)
            if self.score == "obs" and not self.refit:
                return obs.remove_fixed(weight, moment, per_unit, count)
            if self.score == "obs":
                _, factor, _ = obs.damped(moment, self.damping, view.name(self.reader))
                return obs.remove_adapting(weight, factor, per_unit, count)
            score = obs.unit_energy(weight, moment, per_unit)
        order = torch.argsort(score, stable=True)[:count]
        return obs.Removal(order, score[order].cumsum(0))

    def edit(self, view: BlockView, plan: StepPlan) -> list[dict[str, Any]]:
        assert view.index is not None
        left = plan.left(view.key(self.reader))
        if left is None or self.reader not in view.linears:
            return []
        config = plan.before.config
        layer = config.layers[view.index]
        reader = view.linears[self.reader]
        per_unit = self.columns(config, layer)
        units = self.sublayer.units(layer)
        count = left.shape.in_features // per_unit
        if count == units:
            return []
        moments = second_moments(view, self.reader) if self.calibrates else []
        aimed = calibrated_aims(view, self.reader) if self.aims else None
        producers = self.producers(config, layer)
        moment = moments[0] if moments else None
        kept = self._rank(view, reader, moment, per_unit, producers, units - count).kept(units)
        columns = _expand(kept, per_unit)
        narrow = narrow_inputs(reader, columns)
        row: dict[str, Any] = {"name": view.name(self.reader)}
        if moments:
            narrow, measured = self._fit(view, plan, narrow, moments, columns)
            row |= measured
        if aimed is not None:
            narrow, measured = self._aim(view, plan, narrow, aimed, columns)
            row |= measured
        view.replace(self.reader, narrow)
        for role, rows in producers.items():
            view.replace(role, narrow_outputs(view.linears[role], _expand(kept, rows)))
        return [row]

    def _fit(
        self, view: BlockView, plan: StepPlan, narrow: Linear, moments: list[Tensor], columns: Tensor
    ) -> tuple[Linear, dict[str, float]]:
        """The narrower reader, refitted if asked; relative output errors on calibration and held-out inputs."""
        weight = view.linears[self.reader].dense_weight(torch.float64)
        judges = dict(zip(("output_error", "held_out_output_error"), moments, strict=True))
        change = -weight
        change[:, columns] = 0
        row = {name: obs.relative_error(change, weight, judge) for name, judge in judges.items()}
        if not self.refit:
            return narrow, row
        raised, _, used = obs.damped(moments[0], self.damping, view.name(self.reader))
        fitted = obs.refit(weight, raised, columns).to(view.dtype(plan, self.reader))
        change[:, columns] = fitted.double() - weight[:, columns]
        before = {f"{name}_before_refit": value for name, value in row.items()}
        after = {name: obs.relative_error(change, weight, judge) for name, judge in judges.items()}
        if after["output_error"] > row["output_error"]:
            # next to nothing goes: rounding the other columns anew would cost more than their refit gives
            return narrow, before | row
        assert isinstance(narrow.weight, Tensor)
        weight = fitted.to(narrow.weight.dtype).contiguous()
        return narrow.replaced(weight=weight), before | after | {"damping": used}

    def _aim(
        self, view: BlockView, plan: StepPlan, narrow: Linear, aimed: Calibrated, columns: Tensor
    ) -> tuple[Linear, dict[str, float]]:
        """The narrower reader moved towards the dense stream, and how far: as helps on held-out tokens."""
        problem = Problem(aimed, [view.linears[self.reader]])
        assert isinstance(narrow.weight, Tensor)
        if problem.cross is None or problem.lacking is None:
            return narrow, {"alpha": 0.0}
        raised, _, _ = obs.damped(aimed.hessian, self.damping, view.name(self.reader))
        plain = obs.refit(problem.weight, raised, columns)
        change = obs.refit(problem.weight, raised, columns, problem.cross) - plain
        inputs = problem.inputs[:, columns]
        goal = problem.lacking + problem.inputs @ problem.weight.t()
        alpha = best_alpha(goal - inputs @ plain.float().t(), inputs @ change.float().t())
        if not alpha:
            return narrow, {"alpha": alpha}
        fitted = (plain + alpha * change).to(view.dtype(plan, self.reader)).to(narrow.weight.dtype)
        return narrow.replaced(weight=fitted.contiguous()), {"alpha": alpha}


@dataclass(frozen=True)
class PruneMlp(PruneUnits):
    """Drop intermediate channels of every MLP. Options: fraction, score l1|activation|obs, refit, allocation
    uniform|global, multiple_of (128 times the ranks that will serve it), widths, damping, target layer|dense (of the refit)."""

    name: ClassVar[str] = "prune-mlp"
    sublayer: ClassVar[Sublayer] = MLP
    part: ClassVar[str] = "MLP"
    unit: ClassVar[str] = "channel"

    multiple_of: int = 128


@dataclass(frozen=True)
class PruneHeads(PruneUnits):
    """Drop key/value heads, each with the query heads that read it. Options: fraction, score l1|activation|obs, refit,
    allocation uniform|global, multiple_of (the ranks that will serve it), widths (key/value heads), damping, target
    layer|dense (of the refit)."""

    name: ClassVar[str] = "prune-heads"
    sublayer: ClassVar[Sublayer] = ATTENTION
    part: ClassVar[str] = "attention"
    unit: ClassVar[str] = "key/value group"

    fraction: float = 0.25


def second_moments(view: BlockView, role: str, held_out: bool = True) -> list[Tensor]:
    """2/N X^T X over the inputs X [N, I] of one linear, float32 [I, I]: on calibration, and if asked held-out windows."""
    linear = view.linears[role]
    stage = next(stage for stage in view.stages() if role in stage.roles)
    splits = (False, True) if held_out else (False,)
    return [second_moment(stage.inputs(split), linear.in_features, linear.weight.device) for split in splits]


def calibrated_aims(view: BlockView, role: str) -> Calibrated:
    """What the dense stream asks of one linear."""
    stage = next(stage for stage in view.stages() if role in stage.roles)
    return Calibrated.of(stage, view.linears[role], aims=True)


def _typical_energy(states: list[Tensor]) -> float:
    """Squared norm of the median token."""
    return float(torch.cat([s.float().square().sum(-1).flatten() for s in states]).median())


def _unit_sums(values: Tensor, unit: int) -> Tensor:
    return values.view(-1, unit).sum(1)


def _expand(units: Tensor, unit: int) -> Tensor:
    """Channels of the given units, ascending."""
    return (units.unsqueeze(1) * unit + torch.arange(unit, device=units.device)).flatten()
