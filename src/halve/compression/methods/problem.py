"""What is asked of linears that are quantized together: their target on calibration inputs, and the held-out error of answers.

Shape legend: N tokens, I input features, O output features of all of them, R held-out tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from halve.compression.dense_stream import Aim
from halve.compression.methods.polish import sweep
from halve.compression.methods.refit import refit_scales
from halve.compression.methods.targets import best_alpha, lacking_moment, lacking_outputs, thinned
from halve.compression.second_moment import moments, second_moment
from halve.compression.walk import Stage
from halve.model.linear import Linear
from halve.quantization import QuantizedWeight, from_codes

HELD_OUT_ROWS = 256  # inputs that the held-out error of a linear is measured on
JUDGE_ROWS = 1024  # and those where something is chosen by it
TOKENS_PER_CHANNEL = 4  # with fewer, only codes are chosen by them
LOOK_UP_SHARE = 1.0  # of the mean diagonal of H: what an error of a row that is looked up counts in a tied table
_LEAST_GAIN = 1e-3  # share of the error that a round of polishing must take away for another one
_ROWS = 16384  # output rows whose error is measured at a time: bounds the float32 copies


@dataclass(frozen=True)
class Calibrated:
    """The inputs of a stage: the Hessian [I, I] that the error of each row of a weight is measured in, 2/N Y^T of what the
    dense stream asks for (see `lacking_moment`), how many they were (None: a table, to which nothing but codes is fitted),
    and some of the held-out ones (none where nothing is multiplied)."""

    hessian: Tensor
    cross: Tensor | None
    tokens: int | None
    held_out: Aim

    @classmethod
    def of(cls, stage: Stage, linear: Linear, aims: bool, chooses: bool = True) -> Calibrated:
        """`aims`: at the dense stream; `chooses`: something is chosen by the held-out error, as aiming always does."""
        size, device = linear.in_features, linear.weight.device
        if stage.looked_up:
            return cls._of_table(stage, size, device)
        if aims:
            pairs = ((aim.inputs, aim.goal if aim.drift is None else aim.drift) for aim in stage.aims(False))
            return cls(*moments(pairs, size, device), thinned(stage.aims(True), JUDGE_ROWS))
        found = moments(((x, None) for x in stage.inputs(False)), size, device)
        if chooses:
            return cls(*found, thinned((Aim(x.float()) for x in stage.inputs(True)), JUDGE_ROWS))
        return cls(*found, _some(stage))

    @classmethod
    def _of_table(cls, stage: Stage, size: int, device: torch.device) -> Calibrated:
        """Of rows that are looked up (an embedding), which enter the model as they are: I. Of a tied table both count,
        H + LOOK_UP_SHARE * mean(diag H) * I: docs/gptq.md derives it."""
        if not stage.multiplied:
            return cls(torch.eye(size, device=device), None, None, Aim(torch.empty(0, size, device=device)))
        hessian = second_moment(stage.inputs(False), size, device)
        diagonal = hessian.diagonal()
        diagonal += LOOK_UP_SHARE * diagonal.mean()
        return cls(hessian, None, None, _some(stage))


def _some(stage: Stage) -> Aim:
    """The first batch of held-out inputs, thinned to HELD_OUT_ROWS."""
    x = next(stage.inputs(True))
    return Aim(x[:: max(1, x.shape[0] // HELD_OUT_ROWS)].float())


class Problem:
    """Linears that share inputs, kept inputs and a scheme, their rows stacked."""

    def __init__(self, calibrated: Calibrated, linears: Sequence[Linear]) -> None:
        ends = torch.tensor([0, *(linear.weight.shape[0] for linear in linears)]).cumsum(0).tolist()
        index, hessian = linears[0].input_index, calibrated.hessian
        inputs = calibrated.held_out.inputs
        self.parts = [slice(low, high) for low, high in pairwise(ends)]  # the rows of each
        weight = linears[0].weight if len(linears) == 1 else torch.cat([linear.dense_weight() for linear in linears])
        assert isinstance(weight, Tensor)
        self.weight = self.target = weight
        # too few tokens tell the text they are of more than the language: nothing is then fitted to them but codes
        tokens = calibrated.tokens
        self.starved = tokens is None or tokens < TOKENS_PER_CHANNEL * self.weight.shape[1]
        self.hessian = hessian if index is None else hessian[index][:, index]
        self.inputs = inputs if index is None else inputs[:, index]
        # where the dense stream is aimed at: 2/N Y^T T [I, O] (see targets.py), and T [R, O] on held-out tokens
        self.cross: Tensor | None = None
        self.lacking: Tensor | None = None
        self.alpha = torch.zeros(self.weight.shape[0], device=self.weight.device)  # the share of T aimed at, by row
        if calibrated.cross is not None and not self.starved:
            drifts = calibrated.held_out.drift is not None
            self.weight = self.target = self.weight.float()
            each = [(linear, self.weight[part]) for linear, part in zip(linears, self.parts, strict=True)]
            cross = [lacking_moment(*pair, self.hessian, calibrated.cross, drifts) for pair in each]
            self.cross = torch.cat(cross, 1)
            self.lacking = torch.cat([lacking_outputs(*pair, calibrated.held_out) for pair in each], 1)

    @property
    def judged(self) -> bool:
        """Whether there are held-out tokens."""
        return self.inputs.shape[0] > 0

    def aim(self, change: Tensor) -> list[float]:
        """Move the target along a change of the weight [O, I], for each linear as far as it helps on held-out tokens;
        returns how far."""
        assert self.lacking is not None
        moved = self.inputs @ change.t()
        alphas = [best_alpha(self.lacking[:, part], moved[:, part]) for part in self.parts]
        for part, alpha in zip(self.parts, alphas, strict=True):
            self.alpha[part] = alpha
        self.target = self.weight + self.alpha.unsqueeze(1) * change
        return alphas

    def error(self, quantized: QuantizedWeight) -> tuple[Tensor, Tensor]:
        """On held-out tokens, summed, float64 [O]: the squared error of each output, and its own square."""
        sums: tuple[list[Tensor], list[Tensor]] = ([], [])
        for rows in torch.arange(self.weight.shape[0], device=self.weight.device).split(_ROWS):
            exact = self.weight[rows].float()
            error = self.inputs @ (exact - quantized.look_up(rows, torch.float32)).t()
            if self.lacking is not None:
                error += self.alpha[rows] * self.lacking[:, rows]
            for total, outputs in zip(sums, (error, self.inputs @ exact.t()), strict=True):
                total.append(outputs.square_().sum(0).double())
        return torch.cat(sums[0]), torch.cat(sums[1])


@dataclass(frozen=True)
class Answer:
    """A quantized weight, its loss E H E^T per row, and on held-out tokens its squared error and energy."""

    quantized: QuantizedWeight
    loss: Tensor
    held_out: tuple[Tensor, Tensor]


def ridge_error(problem: Problem, quantized: QuantizedWeight, ridge: Tensor) -> Tensor:
    """E diag(ridge) E^T of every row, float64 [O]."""
    return ((problem.target - quantized.dequantize()).square_() @ ridge).double()


def improvements(
    problem: Problem, quantized: QuantizedWeight, ridge: Tensor, loss: Tensor, refit: bool, sweeps: int
) -> Iterator[tuple[str, QuantizedWeight, Tensor]]:
    """What refitted scales, then polished codes (scales refitted after every sweep) make of a quantized weight, each with
    the error of every row under H + diag(ridge), float64 [O], which begins as `loss`."""
    spec, target, hessian = quantized.spec, problem.target, problem.hessian
    codes, scale, zero = quantized.codes(), quantized.scale, quantized.zero
    loss = loss.clone()
    if refit:
        scale, gain = refit_scales(codes, scale, zero, target, hessian, ridge, spec)
        loss -= gain
        yield "refit", from_codes(codes, scale, zero, spec), loss.clone()
    for number in range(sweeps):
        before = float(loss.sum())
        codes, gain = sweep(codes, scale, zero, target, hessian, ridge, spec)
        loss -= gain
        if refit:
            scale, gain = refit_scales(codes, scale, zero, target, hessian, ridge, spec)
            loss -= gain
        if number == sweeps - 1 or before - float(loss.sum()) <= _LEAST_GAIN * before:
            yield "polish", from_codes(codes, scale, zero, spec), loss
            return
