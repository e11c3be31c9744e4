"""Which input channels of a layer can go, and how the others make up for them: Optimal Brain Surgeon on whole units.

Source: Hassibi and Stork 1992; for blocks of columns of a layer W [O, I] with inputs of second moment H [I, I] = X^T X,
the least growth of ||X (W' - W)^T||^2 when the columns R are set to 0 and the rest adapt is
    tr(W_R ((H^-1)_RR)^-1 W_R^T)    (Frantar and Alistarh 2022, arXiv 2208.11580, equation 5)
and after it W' = (W H)[:, S] (H_SS)^-1 for the columns S that stay (least squares). Without adapting it is
tr(W_R H_RR W_R^T). Both are taken greedily, units of adjacent columns at a time. Everything is float64.

Shape legend: O outputs, I inputs, U units of u adjacent inputs each (I = U u).
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch
from torch import Tensor

from halve.errors import DataError

logger = logging.getLogger(__name__)

MAX_DAMPING = 1.0  # of the mean diagonal; beyond it H is noise and the request is refused
ROUNDS = 64  # units are taken in at most so many rounds, scores being exact at the start of each


@dataclass(frozen=True)
class Removal:
    """`order` int64 [R]: units in the order they go; `loss` float64 [R]: tr(E H E^T) of the output error once each has
    gone, as the greedy choice estimates it."""

    order: Tensor
    loss: Tensor

    def kept(self, units: int) -> Tensor:
        """Which of `units` stay, int64, ascending."""
        stays = torch.ones(units, dtype=torch.bool, device=self.order.device)
        stays[self.order] = False
        return stays.nonzero().flatten()


def damped(hessian: Tensor, damping: float, name: str) -> tuple[Tensor, Tensor, float]:
    """H + damping * mean diagonal * I (float64), its Cholesky factor, and the damping used, grown tenfold until it factors.

    A channel that is always 0 counts in no mean. Raises DataError when H is not finite or does not factor at all.
    """
    exact = hessian.double()
    diagonal = exact.diagonal()
    if not torch.isfinite(exact).all():
        raise DataError(f"{name}: its inputs hold inf or nan: calibrate in fp32 or check the checkpoint")
    live = diagonal > 0
    mean = float(diagonal[live].mean()) if live.any() else 1.0
    while damping <= MAX_DAMPING:
        raised = exact.clone()
        raised.diagonal().add_(max(damping, 1e-12) * mean)
        factor, failed = torch.linalg.cholesky_ex(raised)
        if not failed and torch.isfinite(factor.diagonal()).all():
            return raised, factor, damping
        grown = max(10 * damping, 1e-6)
        logger.warning("%s: Hessian is not positive definite at damping %g: trying %g", name, damping, grown)
        damping = grown
    raise DataError(
        f"{name}: Hessian is not positive definite even at damping {MAX_DAMPING:g}: give more calibration windows"
    )


def unit_energy(weight: Tensor, hessian: Tensor, unit: int) -> Tensor:
    """tr(W_u H_uu W_u^T) of each unit alone, float64 [U]: the squared output it carries."""
    products = _blocks(weight.double().t() @ weight.double(), unit) * _blocks(hessian.double(), unit)
    return products.sum((1, 2))


def remove_adapting(weight: Tensor, factor: Tensor, unit: int, count: int) -> Removal:
    """Greedy removal of `count` units of weight [O, I], the rest adapting each time; `factor`: of the damped Hessian."""
    inverse = torch.cholesky_inverse(factor)
    gone = torch.zeros(weight.shape[1] // unit, dtype=torch.bool, device=weight.device)
    gram = weight.double().t() @ weight.double()  # W^T W, carried along: its blocks are all that the scores need
    order, loss, total = [], [], 0.0
    for size in _rounds(count):
        scores = _adapting_scores(gram, inverse, gone, unit)
        chosen = torch.argsort(scores, stable=True)[:size]
        columns = _columns(chosen, unit)
        inner = torch.linalg.inv(inverse[columns][:, columns])  # ((H^-1)_RR)^-1
        step = inner @ inverse[columns]  # W' = W - W_R step
        exact = float((gram[columns][:, columns] * inner).sum())
        loss += _spread(scores[chosen], total, exact)
        total += exact
        order.append(chosen)
        inverse -= inverse[:, columns] @ step
        half = gram - gram[:, columns] @ step
        gram = half - step.t() @ half[columns]
        gone[chosen] = True
    return Removal(torch.cat(order), torch.tensor(loss, dtype=torch.float64))


def remove_fixed(weight: Tensor, hessian: Tensor, unit: int, count: int) -> Removal:
    """Greedy removal of `count` units of weight [O, I] while the rest stays as it is: E = W_R, its loss tr(W_R H_RR W_R^T)."""
    products = weight.double().t() @ weight.double() * hessian.double()
    between = _sums(products, unit)  # [U, U]: what two units give together
    alone, shared = between.diagonal().clone(), torch.zeros_like(between[0])
    gone = torch.zeros_like(alone, dtype=torch.bool)
    order, loss, total = [], [], 0.0
    for size in _rounds(count):
        scores = (alone + 2 * shared).masked_fill(gone, float("inf"))
        chosen = torch.argsort(scores, stable=True)[:size]
        exact = float(between[chosen][:, chosen].sum() + 2 * shared[chosen].sum())
        loss += _spread(scores[chosen], total, exact)
        total += exact
        shared += between[:, chosen].sum(1)
        order.append(chosen)
        gone[chosen] = True
    return Removal(torch.cat(order), torch.tensor(loss, dtype=torch.float64))


def refit(weight: Tensor, hessian: Tensor, kept: Tensor, lacking: Tensor | None = None) -> Tensor:
    """W' = (W H)[:, S] (H_SS)^-1 for weight [O, I], damped H [I, I] and columns `kept` S: float64 [O, S].

    `lacking` [I, O]: 2/N Y^T T of what the outputs lack besides (targets.py); W H + its transpose then stands for W H.

    The same damped H in both factors makes W' the minimum of a sum of which zeroing is one point and whose damping
    term grows with every change of W_S, so tr(E H E^T) under the undamped H cannot grow either.
    """
    inner = torch.linalg.cholesky(hessian[kept][:, kept])
    wanted = (weight.double() @ hessian[:, kept]).t()
    return torch.cholesky_solve(wanted if lacking is None else wanted + lacking[kept].double(), inner).t()


def relative_error(change: Tensor, weight: Tensor, hessian: Tensor) -> float:
    """||X E^T|| / ||X W^T|| for a change E [O, I] of W [O, I] on inputs of undamped second moment H (0 when both are)."""
    loss, energy = (float(((part @ hessian.double()) * part).sum()) for part in (change.double(), weight.double()))
    return (max(loss, 0.0) / energy) ** 0.5 if energy > 0 else 0.0


def _rounds(count: int) -> list[int]:
    """`count` units split over at most ROUNDS rounds, as evenly as it goes."""
    rounds = min(count, ROUNDS)
    return [(count * (i + 1)) // rounds - (count * i) // rounds for i in range(rounds)]


def _columns(units: Tensor, unit: int) -> Tensor:
    return (units.unsqueeze(1) * unit + torch.arange(unit, device=units.device)).flatten()


def _blocks(square: Tensor, unit: int) -> Tensor:
    """The blocks on the diagonal of [I, I]: [U, u, u]."""
    units = square.shape[0] // unit
    return square.view(units, unit, units, unit).diagonal(dim1=0, dim2=2).permute(2, 0, 1)


def _sums(square: Tensor, unit: int) -> Tensor:
    units = square.shape[0] // unit
    return square.view(units, unit, units, unit).sum((1, 3))


def _adapting_scores(gram: Tensor, inverse: Tensor, gone: Tensor, unit: int) -> Tensor:
    """tr(W_u ((H^-1)_uu)^-1 W_u^T) of each unit, [U]; infinite for those that are gone."""
    live = _blocks(inverse, unit)
    # what is gone has blocks of 0: any regular matrix does instead
    live = torch.where(gone[:, None, None], torch.eye(unit, dtype=live.dtype, device=live.device), live)
    return (_blocks(gram, unit) * torch.linalg.inv(live)).sum((1, 2)).masked_fill(gone, float("inf"))


def _spread(scores: Tensor, total: float, exact: float) -> list[float]:
    """Running loss over the units of one round, in proportion to their scores and ending at the exact loss."""
    shares = scores.clamp(min=0).cumsum(0)
    last = float(shares[-1])
    shares = shares / last if last > 0 else torch.ones_like(shares)
    return [total + exact * float(share) for share in shares]
