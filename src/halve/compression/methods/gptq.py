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
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from halve.checkpoint.tensors import all_finite
from halve.compression.methods.group_scales import SCALES, group_scales
from halve.compression.methods.problem import Answer, Calibrated, Problem, improvements, ridge_error
from halve.compression.methods.rtn import check_fallback, plan_quantization
from halve.compression.plan import ModelState, StepPlan
from halve.compression.second_moment import upper_triangle
from halve.compression.walk import BlockView
from halve.errors import DataError, RecipeError
from halve.quantization import (
    QuantizedWeight,
    QuantSpec,
    decode,
    encode,
    fitting_group_sizes,
    from_codes,
)

logger = logging.getLogger(__name__)

TARGETS = ("layer", "dense")
MAX_SWEEPS = 20
MAX_DAMPING = 1.0  # of the mean diagonal; beyond it H is noise and the request is refused
_LEAF = 16  # columns quantized one by one between two matrix products
_ROWS = 16384  # output rows solved at a time: bounds the float32 copies


@dataclass(frozen=True)
class Gptq:
    """GPTQ. Options: bits 8|4|3|2, group_size (columns, -1 = per channel), symmetric, act_order, damping (share of the
    mean diagonal of H), scale minmax|mse (see `group_scales`), targets, ignore, fallback error|channel (what to do where
    the group size does not divide a layer's inputs), target layer|dense (what each linear should give: what it gave, or
    what brings the stream back to the dense model's), refit (of the scales, codes fixed), polish (sweeps over the codes).
    Sequential inside the block: q/k/v, o, gate/up, down, each calibrated on the inputs it gets from what was quantized
    before it. `embed_tokens` among targets is the embedding, or of a tied model the one table of embedding and head,
    unless untie gives the head a tensor of its own."""

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
    target: str = "layer"
    refit: bool = False
    polish: int = 0

    def __post_init__(self) -> None:
        check_fallback(self.fallback)
        check_options(self.damping, self.scale)
        if self.target not in TARGETS:
            raise RecipeError(f"target={self.target!r} is unknown: use {' or '.join(TARGETS)}")
        if not 0 <= self.polish <= MAX_SWEEPS:
            raise RecipeError(f"polish={self.polish} must lie between 0 and {MAX_SWEEPS} sweeps")
        self.spec()

    @property
    def aims(self) -> bool:
        """Whether `edit` needs the dense stream."""
        return self.target == "dense"

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
            calibrated = Calibrated.of(stage, linear, self.aims, self.refit or self.polish > 0)
            done = []
            for together in _same_scheme(view, plan, roles):
                done += self._quantize(view, plan, together, calibrated)
            for row in done:  # what they took together, their inputs and Hessian included, in equal parts
                row["seconds"] = (time.monotonic() - started) / len(done)
            rows += done
        return rows

    def _quantize(
        self, view: BlockView, plan: StepPlan, roles: list[str], calibrated: Calibrated
    ) -> list[dict[str, Any]]:
        """Quantize linears of one scheme, dtype and input together; one report row each."""
        linears = [view.linears[role] for role in roles]
        spec = view.spec(plan, roles[0])
        name = " + ".join(view.name(role) for role in roles)
        problem = Problem(calibrated, linears)
        _check(problem.weight, problem.hessian, spec, name)
        factor = factorize(problem.hessian, self.damping, self.act_order, name)
        rows: list[dict[str, Any]] = [
            {"name": view.name(role)} | ({"alpha": 0.0} if self.aims else {}) for role in roles
        ]
        if problem.cross is not None:
            for row, alpha in zip(rows, problem.aim(factor.solve(problem.cross).t()), strict=True):
                row["alpha"] = alpha
        quantized, info = gptq(
            problem.target,
            problem.hessian,
            spec,
            damping=self.damping,
            act_order=self.act_order,
            scale=self.scale,
            scale_dtype=view.dtype(plan, roles[0]),
            name=name,
            factor=factor,
        )
        answers = self._answers(problem, factor, quantized, info)
        for role, row, part in zip(roles, rows, problem.parts, strict=True):
            errors = {which: _relative(answer.held_out, part) for which, answer in answers.items()}
            which = min(errors, key=lambda each: errors[each])
            index = torch.arange(part.start, part.stop, device=problem.weight.device)
            view.replace_weight(role, answers[which].quantized.rows(index))
            row["output_error"] = _relative((answers[which].loss, info.energy), part)
            if problem.judged:
                row["held_out_output_error"] = errors[which]
            row |= {"damping": info.damping, "dead_inputs": info.dead_columns}
            if len(answers) > 1:
                row |= {"accepted": which, "held_out_output_errors": errors}
        return rows

    def _answers(
        self, problem: Problem, factor: Factor, quantized: QuantizedWeight, info: GPTQInfo
    ) -> dict[str, Answer]:
        """By name, what GPTQ gave and what the steps after it made of that."""
        answers = {"gptq": Answer(quantized, info.loss, problem.error(quantized))}
        if (self.refit or self.polish) and not problem.starved:
            ridge = factor.ridge[factor.place]
            damped = info.loss + ridge_error(problem, quantized, ridge)
            for which, better, loss in improvements(problem, quantized, ridge, damped, self.refit, self.polish):
                loss = (loss - ridge_error(problem, better, ridge)).clamp(min=0)
                answers[which] = Answer(better, loss, problem.error(better))
        return answers


def check_options(damping: float, scale: str) -> None:
    """Refuse what no Hessian can make sense of."""
    if not 0 <= damping <= MAX_DAMPING:
        raise RecipeError(
            f"damping={damping:g} must lie between 0 and {MAX_DAMPING:g} (of the mean diagonal; 0.01 is usual)"
        )
    if scale not in SCALES:
        raise RecipeError(f"scale={scale!r} is unknown: use {' or '.join(SCALES)}")


def _same_scheme(view: BlockView, plan: StepPlan, roles: list[str]) -> list[list[str]]:
    """`roles` (they read one input) in groups that share a scheme, dtype and kept inputs, so that one factor serves each."""
    groups: dict[tuple[QuantSpec, torch.dtype, tuple[int, ...] | None], list[str]] = {}
    for role in roles:
        index = view.linears[role].input_index
        kept = None if index is None else tuple(index.tolist())
        groups.setdefault((view.spec(plan, role), view.dtype(plan, role), kept), []).append(role)
    return list(groups.values())


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
    factor: Factor | None = None,
) -> tuple[QuantizedWeight, GPTQInfo]:
    """Quantize weight [O, I] so that its outputs on inputs of Hessian [I, I] change least.

    Rows are independent: layers that read the same input go in one call with their rows stacked. `act_order` takes
    columns by falling diagonal of H; groups and scales are those of the original order ("static groups"), so nothing is
    paid at run time. `scale`: see `group_scales`. Scales are kept in `scale_dtype` (default: the weight's dtype).
    Damping grows tenfold until H factors; `factor`: that of H, where it is there already. Raises RecipeError (shapes, a
    group size that does not divide) and DataError (H or the weight is not finite, or H does not factor at the greatest
    damping); both name the layer `name`.
    """
    check_options(damping, scale)
    _check(weight, hessian, spec, name)
    factor = factor or factorize(hessian, damping, act_order, name)
    scale_OG, zero_OG = group_scales(weight, spec, scale_dtype or weight.dtype, hessian.diagonal(), scale)
    place = factor.place
    codes = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    losses = []
    for first in range(0, weight.shape[0], _ROWS):
        rows = slice(first, first + _ROWS)
        zero = None if zero_OG is None else zero_OG[rows]
        solver = _Solver(weight[rows], factor, scale_OG[rows], zero, spec)
        solver.solve(0, weight.shape[1])
        codes[rows] = solver.codes_IO.index_select(0, place).t()
        losses.append(solver.loss(factor.ridge))
    dead = int((hessian.diagonal() <= 0).sum())
    info = GPTQInfo(factor.damping, dead, torch.cat(losses), quadratic(weight, hessian))
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


class _Solver:
    """Some rows, their columns in the order of the factor: least important first, solved from the last to the first."""

    def __init__(
        self,
        weight: Tensor,
        factor: Factor,
        scale_OG: Tensor,
        zero_OG: Tensor | None,
        spec: QuantSpec,
    ) -> None:
        self.weight_IO = weight.t().contiguous().index_select(0, factor.order).float()  # a column is one contiguous row
        self.factor, self.spec = factor.unit, spec
        self.groups = (factor.order // spec.columns_per_group(weight.shape[1])).tolist()
        self.squared_pivots = factor.pivots.double().square().tolist()
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


@dataclass(frozen=True)
class Factor:
    """The damped Hessian as U diag(pivots^2) U^T, U [I, I] unit lower triangular (float32), its rows and columns in
    `order`; `ridge` [I] is what was added to the diagonal, in that order, and `damping` its share of the mean."""

    order: Tensor
    unit: Tensor
    pivots: Tensor
    ridge: Tensor
    damping: float

    @property
    def place(self) -> Tensor:
        """Of each column, where it stands in the order."""
        return torch.argsort(self.order)

    def solve(self, right: Tensor) -> Tensor:
        """X [I, O] with (H + damping) X = right."""
        x = torch.linalg.solve_triangular(self.unit, right[self.order], upper=False, unitriangular=True)
        x /= self.pivots.square().unsqueeze(1)
        return torch.linalg.solve_triangular(self.unit.mT, x, upper=True, unitriangular=True)[self.place]


def factorize(hessian: Tensor, damping: float, act_order: bool, name: str) -> Factor:
    """Factor a Hessian [I, I], columns by rising diagonal (`act_order`) or from the last to the first.

    Damping grows tenfold until it factors. Raises DataError when it does not at the greatest.
    """
    diagonal = hessian.diagonal()
    order = torch.argsort(diagonal) if act_order else torch.arange(hessian.shape[0], device=hessian.device).flip(0)
    factor, ridge, used = _cholesky(hessian, order, damping, name)
    pivots = factor.diagonal().clone()
    factor /= pivots  # unit lower triangular: column j holds L_ij / L_jj
    return Factor(order, factor, pivots, ridge, used)


def _cholesky(hessian: Tensor, order: Tensor, damping: float, name: str) -> tuple[Tensor, Tensor, float]:
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
