"""Round-to-nearest weight quantization: every weight to the nearest code of its group. Needs no data.

8 bit per channel is the int8 weight-only form; the error it leaves is what GPTQ is measured against.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from halve.checkpoint.stored import StoredLinear
from halve.compression.plan import HEAD, TABLE, Key, ModelState, StepPlan, describe, finish, select
from halve.compression.walk import BlockView
from halve.errors import RecipeError
from halve.model.linear import Linear
from halve.model.wiring import siblings
from halve.quantization import QuantizedWeight, QuantSpec, fitting_group_sizes, quantize

_ROWS = 16384  # rows whose error is measured at a time: bounds the float32 copies


@dataclass(frozen=True)
class Rtn:
    """Round to nearest. Options: bits 8|4|3|2, group_size (columns, -1 = per channel), symmetric, targets, ignore,
    fallback error|channel (what to do where the group size does not divide a layer's inputs), untie (a tied head becomes
    a tensor of its own, instead of one table with the embedding). `embed_tokens` or `Embedding` among targets is the table."""

    name: ClassVar[str] = "rtn"
    calibrates: ClassVar[bool] = False

    bits: int = 8
    group_size: int = -1
    symmetric: bool = True
    targets: tuple[str, ...] = ("Linear",)
    ignore: tuple[str, ...] = ()
    fallback: str = "error"
    untie: bool = False

    def __post_init__(self) -> None:
        check_fallback(self.fallback)
        self.spec()

    def spec(self) -> QuantSpec:
        return QuantSpec(self.bits, self.group_size, self.symmetric)

    def plan(self, state: ModelState) -> StepPlan:
        return plan_quantization(self.name, state, self.spec(), self.targets, self.ignore, self.fallback, self.untie)

    def edit(self, view: BlockView, plan: StepPlan) -> list[dict[str, Any]]:
        rows = []
        for role in view.touched(plan):
            linear, spec = view.linears[role], view.spec(plan, role)
            assert not isinstance(linear.weight, QuantizedWeight)
            quantized = quantize(linear.weight, spec, view.dtype(plan, role))
            rows.append({"name": view.name(role), **weight_error(linear, quantized)})
            view.replace_weight(role, quantized)
        return rows


def check_fallback(fallback: str) -> None:
    if fallback not in ("error", "channel"):
        raise RecipeError(f"fallback={fallback!r} is not known: use error or channel")


def weight_error(linear: Linear, quantized: QuantizedWeight) -> dict[str, float]:
    """Relative error of the weight itself, ||W - Q|| / ||W|| (Frobenius)."""
    assert isinstance(linear.weight, Tensor)
    squares = torch.zeros(2, dtype=torch.float64)
    for rows in torch.arange(linear.weight.shape[0], device=linear.weight.device).split(_ROWS):
        weight = linear.weight[rows].float()
        for place, part in enumerate((weight - quantized.look_up(rows, torch.float32), weight)):
            squares[place] += float(part.norm()) ** 2
    error, norm = squares.sqrt().tolist()
    return {"weight_error": error / norm if norm else 0.0}


def plan_quantization(
    method: str,
    state: ModelState,
    spec: QuantSpec,
    targets: tuple[str, ...],
    ignore: tuple[str, ...],
    fallback: str,
    untie: bool,
) -> StepPlan:
    """The plan every quantizer shares: which linears, under which spec.

    A tied head and the embedding are one table, whichever is named, unless `untie` gives the head a tensor of its own. A
    layer whose inputs the group size does not divide is quantized per channel, and its siblings with it, since they
    share a scheme; RecipeError when `fallback` is "error".
    """
    chosen, skipped = select(state, targets, ignore, table=True)
    tied = state.config.tied
    if untie and HEAD not in {linear.key for linear in chosen}:
        raise RecipeError(
            f"step {method}: untie=true gives the head a tensor of its own: name lm_head among the targets"
        )
    if tied and not untie:
        chosen = _as_one_table(state, chosen, skipped)
    changed: dict[Key, tuple[StoredLinear, str]] = {}
    for linear in chosen:
        if linear.spec is not None:
            skipped[linear.key] = f"already quantized ({describe(linear.spec)})"
    chosen = [linear for linear in chosen if linear.spec is None]
    unfit = [linear for linear in chosen if not spec.divides(linear.kept_in)]
    if unfit and fallback == "error":
        sizes = ", ".join(map(str, fitting_group_sizes(unfit[0].kept_in)[:8]))
        raise RecipeError(
            f"step {method}: group_size={spec.group_size} does not divide the {unfit[0].kept_in} inputs of "
            f"{unfit[0].name}: use a size that fits ({sizes}), -1 (per channel), or fallback=channel"
        )
    fallen = {(linear.shape.layer, sibling) for linear in unfit for sibling in siblings(linear.shape.role)}
    for linear in chosen:
        chosen_spec = QuantSpec(spec.bits, -1, spec.symmetric) if linear.key in fallen else spec
        note = describe(chosen_spec) + ("" if chosen_spec == spec else " (fallback)")
        note += ", embedding and head in one" if linear.key == TABLE and tied and not untie else ""
        changed[linear.key] = (linear.quantized(chosen_spec), note)
    return finish(method, state, changed, skipped)


def _as_one_table(state: ModelState, chosen: list[StoredLinear], skipped: dict[Key, str]) -> list[StoredLinear]:
    """`chosen` with the embedding where it or its tied head is named and neither ignored, and the head never by itself."""
    both = {HEAD, TABLE}
    named = {linear.key for linear in chosen} & both
    rest = [linear for linear in chosen if linear.key not in both]
    if not named or any(skipped.get(key) == "ignored" for key in both):
        return rest
    skipped[HEAD] = f"tied: it is {state.table.name}, and goes with it (untie=true gives it a tensor of its own)"
    skipped.pop(TABLE, None)
    return [*rest, state.table]
