"""Token windows of real text, walked through the model block by block. The only walker there is.

Shape legend: N windows, T tokens a window, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from halve.checkpoint.reader import Checkpoint
from halve.compression.dense_stream import Aim, DenseStream, Place, reader_aim, writer_aim
from halve.compression.plan import HEAD, TABLE, Key, StepPlan
from halve.compression.windows import Calibration
from halve.model.decoder import Block, Halt, Norm, Span, make_rotaries, place_embeddings, run_to_end
from halve.model.linear import Linear
from halve.model.wiring import STREAM, SUBLAYERS, WIRES
from halve.quantization import QuantizedWeight, QuantSpec

BATCH_TOKENS = 4096  # tokens sent through a block at once
WAITING_BYTES = 1 << 30  # activations kept between two stages of a block; windows beyond that are sent anew


@dataclass(frozen=True)
class Stage:
    """Linears of a block that read one input; `inputs(held_out)` yields it in batches [rows, in], as often as asked.

    `aims(held_out)` yields them with what the dense stream asks for, where the walk carries that. looked_up: rows of the
    weight are read by token too; multiplied: what is read is multiplied by the weight (all but an embedding that is not
    tied, which has no inputs).
    """

    roles: tuple[str, ...]
    inputs: Callable[[bool], Iterator[Tensor]]
    aims: Callable[[bool], Iterator[Aim]]
    looked_up: bool = False
    multiplied: bool = True


class _HaltedBatch:
    """One batch of windows inside a block, halted before a stage; `stages` of the block is what it goes through."""

    def __init__(self, block: Block, state: Tensor, span: Span) -> None:
        self._block = block
        self._state = state
        self._span = span
        self.restart()

    def restart(self) -> None:
        """Go back to the beginning of the block and free the activations."""
        self._stage = -1
        self._halt = Halt(torch.empty(0), torch.empty(0))
        self._stages = self._block.stages(self._state, self._span)

    def at(self, stage: int) -> Halt:
        """Where the batch halts before a stage, its own or a later one."""
        while self._stage < stage:
            self._halt = next(self._stages)
            self._stage += 1
        return self._halt

    def finish(self) -> Tensor:
        """The output of the block."""
        return run_to_end(self._stages)


class BlockView:
    """One block (or the head, or the embedding) in the hands of a method: its linears, and the inputs that reach them."""

    def __init__(self, walk: Walk, block: Block | None, linears: dict[str, Linear], index: int | None) -> None:
        self._walk = walk
        self.block = block
        self.linears = linears
        self.index = index

    def key(self, role: str) -> Key:
        return self.index, role

    def touched(self, plan: StepPlan) -> list[str]:
        """Roles of this block that the step changes, in the order they run."""
        return [role for role in self.linears if self.key(role) in plan.touched]

    def name(self, role: str) -> str:
        family = self._walk.checkpoint.family
        return family.names[role] if self.index is None else family.block_name(self.index, role)

    def spec(self, plan: StepPlan, role: str) -> QuantSpec:
        """The scheme the plan gives this linear."""
        left = plan.left(self.key(role))
        assert left is not None and left.spec is not None
        return left.spec

    def dtype(self, plan: StepPlan, role: str) -> torch.dtype:
        """What this linear's floating numbers are stored in: that of what they replace."""
        left = plan.left(self.key(role))
        assert left is not None and left.dtype is not None
        return left.dtype

    def replace_weight(self, role: str, weight: Tensor | QuantizedWeight) -> None:
        """Put another weight of the same shape into a linear."""
        self.replace(role, self.linears[role].replaced(weight=weight))

    def replace(self, role: str, linear: Linear) -> None:
        self.linears[role] = linear
        if self.block is not None:
            self.block.linears[role] = self._walk.expanded(linear)

    def finished(self, plan: StepPlan, layer: int) -> Block:
        """The block as the step leaves it, at its place `layer` in the model after; sublayers that go are left out."""
        config = plan.after.config
        block = self.block
        assert block is not None
        if config.layers[layer] == block.layer:
            return block  # the very one: states that wait inside it go on from there
        roles = [role for role in self.linears if (layer, role) in plan.after.linears]
        norms = {role: norm for role, norm in block.norms.items() if isinstance(norm, Norm)}
        return Block(config, config.layers[layer], layer, {role: self.linears[role] for role in roles}, norms)

    def stages(self) -> Iterator[Stage]:
        """The groups of linears that read one input, in the order they run, each seeing what was replaced before it.

        Activations wait between stages (up to WAITING_BYTES), also for `Walk.advance`, so all of it is one pass.
        """
        block = self.block
        if block is None:
            (role,) = self.linears
            looked_up = role == TABLE[1]
            multiplied = not looked_up or self._walk.checkpoint.config.tied
            yield Stage((role,), self._head_inputs, self._head_aims, looked_up, multiplied)
            return
        batches = self._walk.enter(block)

        def halts(number: int, held_out: bool) -> Iterator[Halt]:
            waiting_bytes = 0
            for batch in batches[held_out]:
                halt = batch.at(number)
                waiting_bytes += halt.input.nbytes
                yield halt
                if waiting_bytes > WAITING_BYTES:
                    batch.restart()

        for number, roles in enumerate(block.stage_roles()):
            here = partial(halts, number)
            yield Stage(roles, partial(_inputs, here), partial(self._aims, block, roles, here))

    def _aims(
        self, block: Block, roles: tuple[str, ...], halts: Callable[[bool], Iterator[Halt]], held_out: bool
    ) -> Iterator[Aim]:
        dense, wire = self._walk.dense, WIRES[roles[0]]
        assert dense is not None and self.index is not None
        place = self._walk.place(self.index, wire.sublayer.name)
        if wire.reads == STREAM:
            dense.reach(place)
            for halt, state in zip(halts(held_out), dense.states[held_out], strict=True):
                yield reader_aim(block, wire.sublayer, halt, state)
        else:
            dense.leave(place)
            for halt, state in zip(halts(held_out), dense.states[held_out], strict=True):
                yield writer_aim(block, wire.sublayer, self.linears[roles[0]], halt, state)

    def _head_inputs(self, held_out: bool) -> Iterator[Tensor]:
        return (state.flatten(0, -2) for state in self._walk.states[held_out])

    def _head_aims(self, held_out: bool) -> Iterator[Aim]:
        dense = self._walk.dense
        assert dense is not None
        dense.finish()
        for inputs, state in zip(self._head_inputs(held_out), dense.states[held_out], strict=True):
            yield Aim(inputs.float(), drift=self._walk.finished(state).flatten(0, -2).float() - inputs.float())


def _inputs(halts: Callable[[bool], Iterator[Halt]], held_out: bool) -> Iterator[Tensor]:
    return (halt.input.flatten(0, -2) for halt in halts(held_out))


class Walk:
    """The hidden states of all windows, taken through a model one block at a time.

    Memory: the states [N, T, D] of calibration and held-out windows and one block. Without windows only blocks are read.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        calibration: Calibration | None,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        self.checkpoint = checkpoint
        self.dtype = dtype
        self.device = device
        self.rotaries = make_rotaries(checkpoint.config, device)
        self.calibration = calibration
        # indexed by held_out: False (0) calibration, True (1) held out
        self.states: list[list[Tensor]] = [[], []]
        self._entered: Block | None = None  # the block that the states are inside of
        self._halted: list[list[_HaltedBatch]] = []
        self.dense: DenseStream | None = None
        self._layers: list[int] = []
        if calibration is not None:
            self._embed(calibration)

    def aim_at(self, checkpoint: Checkpoint, layers: Sequence[int], kept: Sequence[tuple[int, str]]) -> None:
        """Carry the stream of a dense model beside this one's, from the embeddings that both share.

        `layers`: the layer there that each layer here was; `kept`: the sublayers here (layer, name) that stay, in order.
        """
        self._layers = list(layers)
        read = partial(self._block_of, checkpoint)
        places = [self.place(*each) for each in kept]
        self.dense = DenseStream(checkpoint.config, read, self.states, self.span, places)

    def place(self, layer: int, sublayer: str) -> Place:
        """Where the dense model has a sublayer of this one."""
        return self._layers[layer], sublayer

    @property
    def calibrated(self) -> bool:
        return bool(self.states[0])

    def span(self, tokens: int) -> Span:
        return Span(self.rotaries, tokens, self.dtype, self.device)

    @torch.inference_mode()
    def _embed(self, calibration: Calibration) -> None:
        checkpoint = self.checkpoint
        table = checkpoint.table(self.dtype, self.device)
        positions = checkpoint.positions(self.dtype, self.device)
        project_in = checkpoint.projections(self.dtype, self.device).get("project_in")
        for states, windows in zip(self.states, (calibration.windows, calibration.held_out), strict=True):
            rows = max(1, BATCH_TOKENS // windows.shape[1])
            for batch in windows.split(rows):
                span = self.span(batch.shape[1])
                x = table.look_up(batch.to(self.device), self.dtype)
                states.append(place_embeddings(checkpoint.config, x, span, positions, project_in))

    def block(self, index: int, sublayers: Collection[str] = tuple(SUBLAYERS)) -> BlockView:
        """Layer `index` of the model being compressed, with those of its sublayers that are named."""
        block = self.checkpoint.block(index, self.dtype, self.device)
        linears = {role: linear for role, linear in block.linears.items() if isinstance(linear, Linear)}
        for role, linear in linears.items():
            block.linears[role] = self.expanded(linear)
        return BlockView(self, block.only(sublayers), linears, index)

    def _block_of(self, checkpoint: Checkpoint, index: int) -> Block:
        """A block of another model, to run."""
        block = checkpoint.block(index, self.dtype, self.device)
        for role, linear in block.linears.items():
            assert isinstance(linear, Linear)
            block.linears[role] = self.expanded(linear)
        return block

    def expanded(self, linear: Linear) -> Linear:
        """The linear for running many windows: a packed weight is expanded once, not at every batch."""
        if not self.calibrated or not linear.quantized:
            return linear
        return linear.replaced(weight=linear.dense_weight(self.dtype))

    def head(self) -> BlockView:
        """The output head; its inputs are the states after the final norm."""
        return BlockView(self, None, {HEAD[1]: self.checkpoint.head(self.dtype, self.device)}, None)

    def table(self) -> BlockView:
        """The embedding; where it is tied, its inputs are those of the head."""
        return BlockView(self, None, {TABLE[1]: self.checkpoint.table(self.dtype, self.device)}, None)

    def enter(self, block: Block) -> list[list[_HaltedBatch]]:
        """Send all states into a block to halt at its stages; `advance` brings them out. Indexed like `states`."""
        self._entered = block
        self._halted = [[_HaltedBatch(block, s, self.span(s.shape[1])) for s in states] for states in self.states]
        return self._halted

    @torch.inference_mode()
    def advance(self, block: Block) -> None:
        """Send all states through a finished block, from where they halted if they are inside it."""
        batches = self._halted if self._entered is block else self.enter(block)
        self._entered = None
        self._halted = []
        for states, halted in zip(self.states, batches, strict=True):
            for i in range(len(states)):
                states[i] = halted.pop(0).finish()

    @torch.inference_mode()
    def finish_states(self) -> None:
        """Send all states through the final norm and projection, to the input of the head."""
        if not self.calibrated:
            return
        for states in self.states:
            for i, state in enumerate(states):
                states[i] = self.finished(state)

    def finished(self, state: Tensor) -> Tensor:
        """What the head reads of the stream behind the last block."""
        norm: Norm | None = self.checkpoint.final_norm(self.dtype, self.device)
        project_out = self.checkpoint.projections(self.dtype, self.device).get("project_out")
        state = state if norm is None else norm(state)
        return state if project_out is None else project_out(state)
