"""GPTQ: quantize a weight column by column and let the columns still to come absorb the error.

Source: Frantar et al. 2022 (arXiv 2210.17323), in the form of LDLQ (Chee et al. 2023, arXiv 2307.13304, equation 3 and
theorem 6, which shows the two equal): with the damped Hessian H = L L^T, columns taken from the last to the first,
    w'_j = w_j + sum over i > j of (w_i - q_i) L_ij / L_jj,    q_j = nearest code to w'_j.
This needs one Cholesky factor and no inverse, where the paper's form needs the factor of the inverse.

Shape legend: O output features (rows), I input features (columns), G groups, N tokens.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from halve.checkpoint.tensors import all_finite
from halve.compression.methods.rtn import check_fallback, plan_quantization
from halve.compression.plan import ModelState, StepPlan
from halve.compression.second_moment import second_moment, upper_triangle
from halve.compression.walk import BlockView, Stage
from halve.errors import DataError, RecipeError
from halve.model.linear import Linear
from halve.quantization import (
    QuantizedWeight,
    QuantSpec,
    decode,
    encode,
    fitting_group_sizes,
    from_codes,
    nearest,
    scale_and_zero,
)

logger = logging.getLogger(__name__)

HELD_OUT_ROWS = 256  # inputs that the held-out error of a linear is measured on
LOOK_UP_SHARE = 1.0  # of the mean diagonal of H: what an error of a row that is looked up counts in a tied table
MAX_DAMPING = 1.0  # of the mean diagonal; beyond it H is noise and the request is refused
_LEAF = 16  # columns quantized one by one between two matrix products
SCALES = ("minmax", "mse")
_ROWS = 16384  # output rows solved at a time: bounds the float32 copies
SHRINKS = tuple(1 - 0.05 * step for step in range(1, 9))  # shares of the full range that scale="mse" tries
_SEARCH_ELEMENTS = 1 << 18  # weights whose range is searched at a time: the copies stay in the cache


@dataclass(frozen=True)
class Gptq:
    """GPTQ. Options: bits 8|4|3|2, group_size (columns, -1 = per channel), symmetric, act_order, damping (share of the
    mean diagonal of H), scale minmax|mse (see `group_scales`), targets, ignore, fallback error|channel (what to do where
    the group size does not divide a layer's inputs). Sequential inside the block: q/k/v, o, gate/up, down, each
    calibrated on the inputs it gets from what was quantized before it. `embed_tokens` among targets is the embedding, or of
    a tied model the one table of embedding and head, unless untie gives the head a tensor of its own."""

    name: ClassVar[str] = "gptq"
    calibrates: ClassVar[bool] = True

    bits: int = 4
    group_size: int = 128
    symmetric: bool = True
    act_order: bool = True
    damping: float = 0.01
    scale: str = "mse"
    targets: tuple[str, ...] = ("Linear",)
    ignore: tuple[str, ...] = ()
    fallback: str = "error"
    untie: bool = False

    def __post_init__(self) -> None:
        check_fallback(self.fallback)
        check_options(self.damping, self.scale)
        self.spec()

    def spec(self) -> QuantSpec:
        return QuantSpec(self.bits, self.group_size, self.symmetric)

    def plan(self, state: ModelState) -> StepPlan:
        return plan_quantization(self.name, state, self.spec(), self.targets, self.ignore, self.fallback, self.untie)

    def edit(self, view: BlockView, plan: StepPlan) -> list[dict[str, Any]]:
        touched = set(view.touched(plan))
        rows = []
        for stage in view.stages():
            roles = [role for role in stage.roles if role in touched]
            if not roles:
                continue
            started = time.monotonic()
            linear = view.linears[roles[0]]
            assert isinstance(linear.weight, Tensor)
            hessian = _hessian(stage, linear)
            done = []
            for together in _same_scheme(view, plan, roles):
                done += self._quantize(view, plan, together, hessian, stage)
            for row in done:  # what they took together, their inputs and Hessian included, in equal parts
                row["seconds"] = (time.monotonic() - started) / len(done)
            rows += done
        return rows

    def _quantize(
        self, view: BlockView, plan: StepPlan, roles: list[str], hessian: Tensor, stage: Stage
    ) -> list[dict[str, Any]]:
        """Quantize linears of one scheme, dtype and input together; one report row each."""
        linears = [view.linears[role] for role in roles]
        weight = linears[0].weight if len(linears) == 1 else torch.cat([linear.dense_weight() for linear in linears])
        assert isinstance(weight, Tensor)
        index = linears[0].input_index
        quantized, info = gptq(
            weight,
            hessian if index is None else hessian[index][:, index],
            view.spec(plan, roles[0]),
            damping=self.damping,
            act_order=self.act_order,
            scale=self.scale,
            scale_dtype=view.dtype(plan, roles[0]),
            name=" + ".join(view.name(role) for role in roles),
        )
        held_out = _held_out_error(weight, quantized, index, stage.inputs(True)) if stage.multiplied else None
        rows = []
        first = 0
        for role, linear in zip(roles, linears, strict=True):
            part = slice(first, first + linear.weight.shape[0])
            first = part.stop
            view.replace_weight(role, quantized.rows(torch.arange(part.start, part.stop, device=weight.device)))
            errors = {"output_error": info.relative_error(part)}
            if held_out is not None:
                errors["held_out_output_error"] = _relative(held_out, part)
            rows.append({"name": view.name(role), **errors, "damping": info.damping, "dead_inputs": info.dead_columns})
        return rows


def check_options(damping: float, scale: str) -> None:
    """Refuse what no Hessian can make sense of."""
    if not 0 <= damping <= MAX_DAMPING:
        raise RecipeError(
            f"damping={damping:g} must lie between 0 and {MAX_DAMPING:g} (of the mean diagonal; 0.01 is usual)"
        )
    if scale not in SCALES:
        raise RecipeError(f"scale={scale!r} is unknown: use {' or '.join(SCALES)}")


def _hessian(stage: Stage, linear: Linear) -> Tensor:
    """The quadratic form that the error of each row of a weight is measured in.

    H, the second moment of what the weight multiplies. Rows that are looked up (an embedding) enter the model as they are: I.
    Of a tied table both count, H + LOOK_UP_SHARE * mean(diag H) * I: docs/gptq.md derives it.
    """
    size, device = linear.in_features, linear.weight.device
    if not stage.multiplied:
        return torch.eye(size, device=device)
    hessian = second_moment(stage.inputs(False), size, device)
    if stage.looked_up:
        diagonal = hessian.diagonal()
        diagonal += LOOK_UP_SHARE * diagonal.mean()
    return hessian


def _same_scheme(view: BlockView, plan: StepPlan, roles: list[str]) -> list[list[str]]:
    """`roles` (they read one input) in groups that share a scheme, dtype and kept inputs, so that one factor serves each."""
    groups: dict[tuple[QuantSpec, torch.dtype, tuple[int, ...] | None], list[str]] = {}
    for role in roles:
        index = view.linears[role].input_index
        kept = None if index is None else tuple(index.tolist())
        groups.setdefault((view.spec(plan, role), view.dtype(plan, role), kept), []).append(role)
    return list(groups.values())


def _held_out_error(
    weight: Tensor, quantized: QuantizedWeight, index: Tensor | None, inputs: Iterator[Tensor]
) -> tuple[Tensor, Tensor]:
    """Squared error of each output and its square, summed over the first batch of inputs thinned to HELD_OUT_ROWS."""
    x = next(inputs)
    x = x[:: max(1, x.shape[0] // HELD_OUT_ROWS)].float()
    x = x if index is None else x.index_select(-1, index)
    sums: tuple[list[Tensor], list[Tensor]] = ([], [])
    for first in range(0, weight.shape[0], _ROWS):
        rows = torch.arange(first, min(first + _ROWS, weight.shape[0]), device=weight.device)
        exact = weight[first : first + _ROWS].float()
        for total, w in zip(sums, (exact - quantized.look_up(rows, torch.float32), exact), strict=True):
            total.append((x @ w.t()).square_().sum(0).double())
    return torch.cat(sums[0]), torch.cat(sums[1])


@dataclass(frozen=True)
class GPTQInfo:
    """What happened to one weight: `damping` as a share of the mean diagonal, and per output row, float64 [O],
    `loss` = (E H E^T) and `energy` = (W H W^T): twice the mean square of the output's error and of the output itself."""

    damping: float
    dead_columns: int
    loss: Tensor
    energy: Tensor

    def relative_error(self, rows: slice = slice(None)) -> float:
        """||X E^T|| / ||X W^T|| of some rows on the calibration inputs (0 when both are)."""
        return _relative((self.loss, self.energy), rows)


def _relative(loss_and_energy: tuple[Tensor, Tensor], rows: slice) -> float:
    loss, energy = (float(t[rows].sum()) for t in loss_and_energy)
    return (loss / energy) ** 0.5 if energy > 0 else 0.0


def gptq(
    weight: Tensor,
    hessian: Tensor,
    spec: QuantSpec,
    *,
    damping: float = 0.01,
    act_order: bool = True,
    scale: str = "mse",
    scale_dtype: torch.dtype | None = None,
    name: str = "weight",
) -> tuple[QuantizedWeight, GPTQInfo]:
    """Quantize weight [O, I] so that its outputs on inputs of Hessian [I, I] change least.

    Rows are independent: layers that read the same input go in one call with their rows stacked. `act_order` takes
    columns by falling diagonal of H; groups and scales are those of the original order ("static groups"), so nothing is
    paid at run time. `scale`: see `group_scales`. Scales are kept in `scale_dtype` (default: the weight's dtype).
    Damping grows tenfold until H factors. Raises RecipeError (shapes, a group size that does not divide) and DataError
    (H or the weight is not finite, or H does not factor at the greatest damping); both name the layer `name`.
    """
    check_options(damping, scale)
    _check(weight, hessian, spec, name)
    diagonal = hessian.diagonal()
    order = torch.argsort(diagonal) if act_order else torch.arange(weight.shape[1], device=weight.device).flip(0)
    place = torch.argsort(order)  # of each column in that order
    scale_OG, zero_OG = group_scales(weight, spec, scale_dtype or weight.dtype, diagonal, scale)
    factor, ridge, used = _factor(hessian, order, damping, name)
    pivots = factor.diagonal().clone()
    factor /= pivots  # unit lower triangular: column j holds L_ij / L_jj
    codes = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    losses = []
    for first in range(0, weight.shape[0], _ROWS):
        rows = slice(first, first + _ROWS)
        zero = None if zero_OG is None else zero_OG[rows]
        solver = _Solver(weight[rows], order, factor, pivots, scale_OG[rows], zero, spec)
        solver.solve(0, weight.shape[1])
        codes[rows] = solver.codes_IO.index_select(0, place).t()
        losses.append(solver.loss(ridge))
    info = GPTQInfo(used, int((diagonal <= 0).sum()), torch.cat(losses), quadratic(weight, hessian))
    return from_codes(codes, scale_OG, zero_OG, spec), info


def quadratic(weight: Tensor, hessian: Tensor) -> Tensor:
    """w H w^T of every row w of weight [O, I], float64 [O]; half the work of a full product, since H is symmetric."""
    total = torch.zeros(weight.shape[0], dtype=torch.float64, device=weight.device)
    for first in range(0, weight.shape[0], _ROWS):
        some = weight[first : first + _ROWS].float()
        for rows, columns in upper_triangle(0, hessian.shape[0]):
            part = some[:, rows] @ hessian[rows, columns]
            part *= some[:, columns]
            # the tiles on both sides of the diagonal are equal
            total[first : first + _ROWS] += part.sum(1) if rows == columns else 2 * part.sum(1)
    return total


def group_scales(
    weight: Tensor, spec: QuantSpec, scale_dtype: torch.dtype, importance: Tensor, method: str
) -> tuple[Tensor, Tensor | None]:
    """Scale [O, G] and zero [O, G] of weight [O, I] before any code is chosen.

    minmax: the group's full range. mse: of the ranges in SHRINKS times it, per group the one whose nearest codes have
    the least squared error, each column weighted by `importance` [I] (the diagonal of H).
    """
    columns = spec.columns_per_group(weight.shape[1])
    groups = weight.shape[1] // columns
    parts = []
    for rows in weight.split(max(1, _SEARCH_ELEMENTS // weight.shape[1])):
        # columns of a group outermost: what is broadcast below is then contiguous, which is several times faster
        grouped_COG = rows.float().view(-1, groups, columns).permute(2, 0, 1).contiguous()
        ends = torch.stack(torch.aminmax(grouped_COG, dim=0), -1)
        scale, zero = scale_and_zero(ends, spec, scale_dtype)
        if method == "mse":
            importance_CG = importance.float().view(groups, columns).t()
            importance_COG = importance_CG.unsqueeze(1).expand(grouped_COG.shape).contiguous()
            scale, zero = _search(grouped_COG, ends, importance_COG, scale, zero, spec)
        parts.append((scale, zero))
    zeros = [zero for _, zero in parts if zero is not None]
    return torch.cat([scale for scale, _ in parts]), torch.cat(zeros) if zeros else None


def _search(
    grouped_COG: Tensor, ends: Tensor, importance_COG: Tensor, scale: Tensor, zero: Tensor | None, spec: QuantSpec
) -> tuple[Tensor, Tensor | None]:
    """The best of the candidate ranges for groups whose full ranges are `ends` [O, G, 2]."""

    def error(scale: Tensor, zero: Tensor | None) -> Tensor:
        miss = nearest(grouped_COG, scale, zero, spec).sub_(grouped_COG)
        return miss.square_().mul_(importance_COG).sum(0)

    least = error(scale, zero)
    for shrink in SHRINKS:
        tried, tried_zero = scale_and_zero(ends * shrink, spec, scale.dtype)
        tried_error = error(tried, tried_zero)
        better = tried_error < least
        least = torch.where(better, tried_error, least)
        scale = torch.where(better, tried, scale)
        if zero is not None and tried_zero is not None:
            zero = torch.where(better, tried_zero, zero)
    return scale, zero


class _Solver:
    """Some rows, their columns in the order of the factor: least important first, solved from the last to the first."""

    def __init__(
        self,
        weight: Tensor,
        order: Tensor,
        unit_factor: Tensor,
        pivots: Tensor,
        scale_OG: Tensor,
        zero_OG: Tensor | None,
        spec: QuantSpec,
    ) -> None:
        self.weight_IO = weight.t().contiguous().index_select(0, order).float()  # a column is one contiguous row
        self.factor, self.spec = unit_factor, spec
        self.groups = (order // spec.columns_per_group(weight.shape[1])).tolist()
        self.squared_pivots = pivots.double().square().tolist()
        self.scale_GO = scale_OG.float().t().contiguous()
        self.zero_GO = None if zero_OG is None else zero_OG.t().contiguous()
        # before a column is solved: what the solved ones add to it; after: its own error w - q
        self.error_IO = torch.zeros_like(self.weight_IO)
        self.codes_IO = torch.empty(self.weight_IO.shape, dtype=torch.int8, device=weight.device)
        self.damped_loss = torch.zeros(weight.shape[0], device=weight.device)

    def solve(self, low: int, high: int) -> None:
        """Columns low..high, the later half first; its errors reach the earlier half in one product."""
        if high - low <= _LEAF:
            self._solve_leaf(low, high)
            return
        middle = (low + high) // 2
        self.solve(middle, high)
        self.error_IO[low:middle].addmm_(self.factor[middle:high, low:middle].t(), self.error_IO[middle:high])
        self.solve(low, middle)

    def _solve_leaf(self, low: int, high: int) -> None:
        error = self.error_IO
        for j in range(high - 1, low - 1, -1):
            group = self.groups[j]
            scale, zero = self.scale_GO[group], None if self.zero_GO is None else self.zero_GO[group]
            target = error[j] + self.weight_IO[j]
            if j + 1 < high:
                target.addmv_(error[j + 1 : high].t(), self.factor[j + 1 : high, j])
            codes = encode(target, scale, zero, self.spec)
            value = decode(codes, scale, zero)
            self.codes_IO[j] = codes
            target -= value
            self.damped_loss.addcmul_(target, target, value=self.squared_pivots[j])
            torch.sub(self.weight_IO[j], value, out=error[j])

    def loss(self, ridge: Tensor) -> Tensor:
        """E H E^T of each row: the sum of L_jj^2 (w'_j - q_j)^2 is that of the damped H; the damping's part is taken off."""
        return (self.damped_loss - ridge @ self.error_IO.square()).clamp(min=0).double()


def _check(weight: Tensor, hessian: Tensor, spec: QuantSpec, name: str) -> None:
    columns = weight.shape[1]
    if hessian.shape != (columns, columns):
        raise RecipeError(f"{name}: a Hessian {tuple(hessian.shape)} does not fit a weight {tuple(weight.shape)}")
    if not spec.divides(columns):
        raise RecipeError(
            f"{name}: group_size={spec.group_size} does not divide {columns} input columns: "
            f"use -1 (per channel) or one of {fitting_group_sizes(columns)}"
        )
    for what, tensor in (("Hessian", hessian), ("weight", weight)):
        if not all_finite(tensor):
            raise DataError(f"{name}: its {what} holds inf or nan: calibrate in fp32 or check the checkpoint")


def _factor(hessian: Tensor, order: Tensor, damping: float, name: str) -> tuple[Tensor, Tensor, float]:
    """Cholesky factor L [I, I] (float32, lower) of the damped Hessian in `order`, what was added to its diagonal [I],
    and the damping that took."""
    diagonal = hessian.diagonal()[order]
    live = diagonal > 0
    mean = float(diagonal[live].mean()) if live.any() else 1.0
    while damping <= MAX_DAMPING:
        # an input never seen is coupled to nothing: any positive diagonal rounds its column to nearest
        ridge = torch.where(live, damping * mean, mean)
        for dtype in (torch.float32, torch.float64):
            damped = hessian.index_select(0, order).index_select(1, order).to(dtype)
            damped.diagonal().add_(ridge)
            # its transpose, which is the same matrix, lies in memory as LAPACK reads it: the copy is several times faster
            factor, failed = torch.linalg.cholesky_ex(damped.mT)
            if not failed and torch.isfinite(factor.sum()):
                return factor.float(), ridge, damping
        grown = max(10 * damping, 1e-4)
        logger.warning("%s: Hessian is not positive definite at damping %g: trying %g", name, damping, grown)
        damping = grown
    raise DataError(
        f"{name}: Hessian is not positive definite even at damping {MAX_DAMPING:g}: give more calibration windows"
    )
