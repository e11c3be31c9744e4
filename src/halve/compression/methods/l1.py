"""Width pruning per linear by L1 norm: the columns or rows of least absolute sum go. Needs no data.

The plain magnitude criterion (Han et al. 2015, arXiv 1506.02626, on whole channels as in Li et al. 2016, arXiv
1608.08710), kept as the baseline that better criteria are measured against. Each linear chooses for itself: inputs are
gathered before a smaller product, outputs scattered after one. An input that `down_proj` drops is produced for nobody
else, so the rows of `gate_proj` and `up_proj` that make it go as well and the MLP is simply narrower.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch import Tensor

from halve.checkpoint.stored import StoredLinear
from halve.compression.edits import (
    check_fraction,
    column_norms,
    keep_inputs,
    keep_outputs,
    kept_count,
    largest,
    narrow_inputs,
    narrow_outputs,
    row_norms,
)
from halve.compression.plan import Key, ModelState, StepPlan, finish, select
from halve.compression.walk import BlockView
from halve.errors import RecipeError
from halve.model.config import LayerConfig
from halve.model.wiring import MLP, SUBLAYERS, producers


@dataclass(frozen=True)
class L1Inputs:
    """Drop the input channels of least L1 column norm. Options: fraction in [0, 1) (rounded down to channels),
    targets, ignore, shared (q/k/v and gate/up keep one set, by the sum of their norms)."""

    name: ClassVar[str] = "l1-inputs"
    calibrates: ClassVar[bool] = False

    fraction: float = 0.35
    shared: bool = False
    targets: tuple[str, ...] = ("Linear",)
    ignore: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_fraction(self.name, self.fraction)

    def plan(self, state: ModelState) -> StepPlan:
        chosen, skipped = select(state, self.targets, self.ignore)
        if self.shared:
            self._check_siblings(state, {linear.key for linear in chosen})
        changed: dict[Key, tuple[StoredLinear, str]] = {}
        layers = list(state.config.layers)
        for linear in chosen:  # what writes the stream comes after the linears that feed it
            count = kept_count(linear.kept_in, self.fraction)
            action = f"keeps {count} of {linear.kept_in} inputs"
            if linear.shape.role == MLP.writer and _narrows(state, linear):
                _narrow_mlp(state, linear, count, action, layers, changed, skipped)
            else:
                changed[linear.key] = linear.keeping(inputs=count), action
        return finish(self.name, state, changed, skipped, replace(state.config, layers=tuple(layers)))

    def _check_siblings(self, state: ModelState, chosen: set[Key]) -> None:
        for layer in range(len(state.config.layers)):
            for sublayer in SUBLAYERS.values():
                keys = [(layer, role) for role in sublayer.readers if (layer, role) in state.linears]
                if len(keys) < 2 or not chosen.intersection(keys):
                    continue
                for key in keys:
                    linear = state.linears[key]
                    if key not in chosen:
                        raise RecipeError(f"step {self.name}: shared=true needs {linear.name} among the targets too")
                    if linear.kept_in < linear.shape.in_features:
                        raise RecipeError(
                            f"step {self.name}: shared=true needs siblings that read all their inputs, an earlier step "
                            f"left {linear.name} {linear.kept_in} of {linear.shape.in_features}: use shared=false"
                        )

    def edit(self, view: BlockView, plan: StepPlan) -> list[dict[str, Any]]:
        norms = {role: column_norms(view.linears[role]) for role in view.touched(plan)}
        shares = {role: norm / norm.sum().clamp(min=1e-300) for role, norm in norms.items()}
        if self.shared:
            for sublayer in SUBLAYERS.values():
                together = [norms[role] for role in sublayer.readers if role in norms]
                norms |= {role: sum(together[1:], together[0]) for role in sublayer.readers if role in norms}
        rows = []
        for role in view.touched(plan):
            left, linear = plan.left(view.key(role)), view.linears[role]
            assert left is not None
            if left.kept_in == linear.weight.shape[1]:
                continue  # only its outputs are narrowed
            kept = largest(norms[role], left.kept_in)
            if left.shape.in_features < linear.in_features:
                _narrow(view, role, kept)
            else:
                view.replace(role, keep_inputs(linear, kept))
            rows.append({"name": view.name(role), "l1_share_removed": 1 - float(shares[role][kept].sum())})
        return rows


def _narrows(state: ModelState, down: StoredLinear) -> bool:
    """Whether dropping inputs of an MLP's last linear can narrow all of it: nothing in between is pruned yet."""
    keys = [(down.shape.layer, role) for role in producers(down.shape.role)]
    before = [state.linears[key] for key in keys if key in state.linears]
    return down.kept_in == down.shape.in_features and all(p.kept_out == p.shape.out_features for p in before)


def _narrow_mlp(
    state: ModelState,
    down: StoredLinear,
    count: int,
    action: str,
    layers: list[LayerConfig],
    changed: dict[Key, tuple[StoredLinear, str]],
    skipped: dict[Key, str],
) -> None:
    """Enter an MLP's last linear and its producers, narrower, into `changed` and the layer's new width into `layers`."""
    layer = down.shape.layer
    assert layer is not None
    changed[down.key] = down.narrowed(inputs=count), action
    for role in producers(down.shape.role):
        key = layer, role
        if key in state.linears:
            earlier, told = changed.get(key, (state.linears[key], ""))
            narrowed = f"narrowed with {down.shape.role}"
            changed[key] = earlier.narrowed(outputs=count), f"{told}, {narrowed}" if told else narrowed
            skipped.pop(key, None)
    layers[layer] = MLP.resized(layers[layer], count)


def _narrow(view: BlockView, role: str, kept: Tensor) -> None:
    view.replace(role, narrow_inputs(view.linears[role], kept))
    for producer in producers(role):
        if producer in view.linears:
            view.replace(producer, narrow_outputs(view.linears[producer], kept))


@dataclass(frozen=True)
class L1Outputs:
    """Drop the output channels of least L1 row norm; they become 0, or their bias. Options: fraction in [0, 1)
    (rounded down to channels), targets, ignore."""

    name: ClassVar[str] = "l1-outputs"
    calibrates: ClassVar[bool] = False

    fraction: float = 0.01
    targets: tuple[str, ...] = ("Linear",)
    ignore: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_fraction(self.name, self.fraction)

    def plan(self, state: ModelState) -> StepPlan:
        chosen, skipped = select(state, self.targets, self.ignore)
        changed: dict[Key, tuple[StoredLinear, str]] = {}
        for linear in chosen:
            count = kept_count(linear.kept_out, self.fraction)
            changed[linear.key] = linear.keeping(outputs=count), f"keeps {count} of {linear.kept_out} outputs"
        return finish(self.name, state, changed, skipped)

    def edit(self, view: BlockView, plan: StepPlan) -> list[dict[str, Any]]:
        rows = []
        for role in view.touched(plan):
            left = plan.left(view.key(role))
            assert left is not None
            norms = row_norms(view.linears[role])
            kept = largest(norms, left.kept_out)
            view.replace(role, keep_outputs(view.linears[role], kept))
            share = 1 - float(norms[kept].sum() / norms.sum().clamp(min=1e-300))
            rows.append({"name": view.name(role), "l1_share_removed": share})
        return rows
