"""The stream of the dense model, carried beside the compressed one: what a step may aim at so that errors do not add up.

A linear that reads the stream should give what the dense model's gives, though it reads another stream: it lacks (x - y) W^T
of dense inputs x and compressed inputs y (Li et al. 2025, GPTAQ, arXiv 2504.02692, equation 8). One that writes the stream
should besides make up for what the stream lacks already: what it adds to the compressed stream should lead to the dense one
(as Qronos, arXiv 2505.11695, and QEP, arXiv 2504.09629, have it for a layer alone).

Shape legend: N rows (tokens of a batch), I inputs and O outputs of a linear, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

from torch import Tensor

from halve.model.config import ModelConfig
from halve.model.decoder import Block, Halt, Norm, Span
from halve.model.linear import Linear
from halve.model.wiring import SUBLAYERS, Sublayer

Place = tuple[int, str]  # a sublayer of the dense model: its layer and its name
_FLAT_NORM = 0.1  # a norm's weights below this share of their typical size are not divided by as they are


class Aim(NamedTuple):
    """One batch: the inputs of a linear [N, I] float32 in the compressed stream, and either `drift` [N, I], the dense
    inputs less these, or `goal` [N, O], what the linear would have to give (its bias aside) for the stream to be dense."""

    inputs: Tensor
    drift: Tensor | None = None
    goal: Tensor | None = None


class DenseStream:
    """The states of the dense model, taken from sublayer to sublayer; one block of it in memory.

    `kept`: the sublayers that stay, as places of the dense model; those that go lie between them.
    """

    def __init__(
        self,
        config: ModelConfig,
        block: Callable[[int], Block],
        states: Iterable[list[Tensor]],
        span: Callable[[int], Span],
        kept: list[Place],
    ) -> None:
        self.states = [list(each) for each in states]
        self._read, self._span = block, span
        self._places = [
            (index, name)
            for index, layer in enumerate(config.layers)
            for name, sublayer in SUBLAYERS.items()
            if sublayer.units(layer)
        ]
        ends = [self._places.index(place) for place in kept[1:]] + [len(self._places)]
        self._ends = dict(zip(kept, ends, strict=True))  # of each place that is kept: where the next one begins
        self._passed = 0
        self._block: Block | None = None

    def reach(self, place: Place) -> None:
        """Take all states to the point before a sublayer that is kept."""
        self._run(self._places.index(place))

    def leave(self, place: Place) -> None:
        """Take all states behind a sublayer that is kept, and behind those that go after it."""
        self._run(self._ends[place])

    def finish(self) -> None:
        """Take all states behind the last sublayer."""
        self._run(len(self._places))

    def _run(self, end: int) -> None:
        assert end >= self._passed, "the dense stream has gone past this point"
        for layer, name in self._places[self._passed : end]:
            if self._block is None or self._block.index != layer:
                self._block = None  # one at a time
                self._block = self._read(layer)
            part = self._block.only((name,))
            for states in self.states:
                for i, state in enumerate(states):
                    states[i] = part(state, self._span(state.shape[1]))
        self._passed = end


def reader_aim(block: Block, sublayer: Sublayer, halt: Halt, dense: Tensor) -> Aim:
    """For linears that read the stream: `dense` is the dense stream [B, T, D] before the sublayer."""
    inputs = halt.input.flatten(0, -2).float()
    return Aim(inputs, drift=block.read(sublayer, dense).flatten(0, -2).float() - inputs)


def writer_aim(block: Block, sublayer: Sublayer, linear: Linear, halt: Halt, dense: Tensor) -> Aim:
    """For the linear that writes the stream: `dense` is the dense stream [B, T, D] behind it.

    Where a norm stands between the output y and the stream, the stream's error is taken back through it: to first order
    the norm multiplies by g / rms, so y lacks rms / g of the error, and a token's squared error counts 1 / rms^2.
    """
    config = block.config
    inputs, stream, after = (t.flatten(0, -2).float() for t in (halt.input, halt.stream, dense))
    bias = 0 if linear.bias is None else linear.bias.float()
    if not (config.norm_output or config.norm_sum):
        return Aim(inputs, goal=(after - stream) / config.residual_scale - bias)
    given = linear(halt.input)
    lacking = after - block.written(sublayer, halt.stream, given).flatten(0, -2).float()
    output = given.flatten(0, -2).float()
    norm = block.norms[sublayer.norm if config.norm_sum else sublayer.output_norm]
    assert isinstance(norm, Norm)
    normed = stream + config.residual_scale * output if config.norm_sum else output
    size = _size(norm, normed)
    lacking *= size / config.residual_scale
    if norm.weight is not None:
        g = norm.weight.float()
        lacking *= g / (g.square() + _FLAT_NORM**2 * g.square().mean())
    return Aim(inputs / size, goal=(output - bias + lacking) / size)


def _size(norm: Norm, x: Tensor) -> Tensor:
    """What a norm divides each token by, [N, 1]."""
    if norm.kind != "rms":
        x = x - x.mean(-1, keepdim=True)
    return (x.square().mean(-1, keepdim=True) + norm.eps).sqrt()
