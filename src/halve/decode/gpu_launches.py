"""The launches of one decode step of a model on a GPU, and the buffers that they hand on.

Linears that read the same vector have it written for them by whoever makes it: the kept inputs of each in the order in
which its weight stores columns, filled up with zeros (see `triton_matmul`). So a layer is five launches, and linears
whose siblings could not be merged take one each.

Shape legend: B prompts, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from halve.kernels import triton_backend
from halve.kernels.triton_backend import (
    Fusion,
    NormedInput,
    Scratch,
    Tiling,
    TritonMatmul,
    launch_options,
    look_up,
    multiply,
    tiles_of,
    tiling,
    write_normed_input,
)
from halve.kernels.triton_layout import Operand
from halve.model.cache import KVCache
from halve.model.config import LayerConfig
from halve.model.decoder import Block, Model, Norm
from halve.model.linear import Linear
from halve.model.rotary import RopeConfig
from halve.model.wiring import ATTENTION, HEAD_NORMS, MLP, SUBLAYERS

STORE, ADD, GATE, TIMES = 0, 1, 2, 3  # epilogues of triton_matmul
ACTIVATIONS = {"silu": 0, "swish": 0, "gelu_new": 1, "gelu_pytorch_tanh": 1, "gelu": 2, "relu": 3}
# of attention: slots of a block, most programs of a head, slots worth a program
_SLOTS, _SPLITS, _SHORTEST = 64, 16, 64

# linears whose outputs are added to something or multiplied with it where they are made
_FUSED = (ATTENTION.writer, MLP.readers[-1], MLP.writer)

Launch = Callable[[], None]


def unsupported(model: Model) -> str | None:
    """Why these kernels cannot run a model, None when they can."""
    config = model.config
    if not config.ropes or model.project_in is not None or model.project_out is not None:
        return "learned positions or projections"
    if config.norm != "rms" or not config.norm_input or not config.gated or config.activation not in ACTIVATIONS:
        return "not a Llama-like block"
    if config.norm_output or config.norm_offset:
        return "norms of what sublayers write, or weights of norms in float32"
    if len(config.ropes) > 1 or any(layer.has_attention and layer.rope is None for layer in config.layers):
        return "rotary embeddings that differ between layers"
    if any(replace(rope, kind="default", options={}) != RopeConfig(rope.theta) for rope in config.ropes):
        return "rotary embeddings of a part of each head, of neighbours, or with queries that grow"
    if config.length_limit is not None:
        return "rotary embeddings that a text's length changes"
    if config.attention_cap is not None or config.logit_cap is not None:
        return "scores or logits with a cap"
    if model.table.quantized and not isinstance(model.table.matmul, TritonMatmul):
        return f"the embedding runs {model.table.kernel}"
    scales = (config.embed_scale, config.residual_scale, config.logit_divisor)
    if config.attention_scale is not None or any(scale != 1 for scale in scales):
        return "scaled embeddings, scores, sums or logits"
    if model.final_norm is None or model.final_norm.weight is None:
        return "no final norm"
    for name, linear in model.linears():
        if not isinstance(linear._matmul, TritonMatmul):
            return f"{name} runs {linear.kernel}"
        fused = name.rpartition(".")[2] in _FUSED
        if fused and linear.output_index is not None and linear.bias is not None:
            return f"{name} has removed outputs and a bias"
    return None


@dataclass(frozen=True)
class _Product:
    """One product of a step, everything decided."""

    operand: Operand
    x: Tensor
    out: Tensor
    fusion: Fusion
    scratch: Scratch
    sizes: Tiling

    def __call__(self) -> None:
        multiply(self.operand, self.x, self.out, self.fusion, self.scratch, self.sizes)


@dataclass(frozen=True)
class _Readers:
    """A vector as it is written for its readers: the buffer [B, ...], the view of each, and the vector's places in the
    buffer int32 [readers, width], None where it lies there as it is."""

    buffer: Tensor
    views: list[Tensor]
    places: Tensor | None


@dataclass(frozen=True)
class _Sublayer:
    """A norm, the linears that read it, and the one that ends in the residual stream (None: the head)."""

    block: Block | None
    norm: Norm
    linears: list[Linear]
    last: Linear | None


@dataclass(frozen=True)
class _Normed(_Readers):
    """The residual stream behind a norm."""

    input: NormedInput


class StepLaunches:
    """One model's decode step for B rows: from `token` int64 [B] at the slots `position` int32 [B] of a cache to `logits`
    [B, V] and the largest of each tile, `best` float32 and `best_row` int32 [B, tiles].

    `launches`, one after another, are the step; everything they use stays where it is.
    """

    def __init__(self, model: Model, cache: KVCache, token: Tensor, position: Tensor) -> None:
        self.config, self.device, self.dtype = model.config, model.device, model.dtype
        self.batch, self.cache, self.position = token.shape[0], cache, position
        self.logits = self._buffer(self.config.vocab_size)
        self._scratch = Scratch(torch.device(self.device))
        self._x = self._buffer(self.config.hidden_size)
        self._cos_sin = model.rotaries[0].tables(cache.capacity, self.dtype)
        self._shared: dict[tuple[str, int], Tensor] = {}
        self._attention_scratch = self._make_attention_scratch()

        sublayers = list(_sublayers(model))
        makers = [None, *(sublayer.last for sublayer in sublayers)]
        normed = [self._normed(each, maker) for each, maker in zip(sublayers, makers, strict=False)]
        # launches hold no reference to this object, so that its memory goes when it does
        x = self._x
        first = normed[0].input
        self.launches: list[Launch] = _embedding(model.table, token, x, first)
        for sublayer, source, following in zip(sublayers, normed, normed[1:], strict=False):
            self.launches += self._sublayer(sublayer, source, following.input)
        self.launches.append(self._head(sublayers[-1], normed[-1]))

    def _buffer(self, width: int) -> Tensor:
        return torch.zeros(self.batch, width, dtype=self.dtype, device=self.device)

    def _shared_buffer(self, name: str, width: int) -> Tensor:
        """A buffer for all layers in which it is as wide: each fills it before reading it."""
        if (name, width) not in self._shared:
            self._shared[name, width] = self._buffer(width)
        return self._shared[name, width]

    def _for_readers(self, name: str, linears: list[Linear], width: int, filled: bool = True) -> _Readers:
        """Room for a vector of `width` that these linears read. Where the step does not fill all of the room, for padding
        or because the vector is not `filled`, it is no other layer's, so that gaps stay 0."""
        operands = [_operand(linear) for linear in linears]
        places = [o.places(linear.input_index, width) for o, linear in zip(operands, linears, strict=True)]
        widths = [o.stored_columns for o in operands]
        if all(p is None for p in places) and len(set(widths)) == 1:
            shared = filled and widths[0] == width
            buffer = self._shared_buffer(name, width) if shared else self._buffer(widths[0])
            return _Readers(buffer, [buffer] * len(linears), None)
        buffer, first, table = self._buffer(sum(widths)), 0, []
        for place, stored in zip(places, widths, strict=True):
            if place is None:
                place = torch.arange(width, dtype=torch.int32, device=self.device)
            table.append(torch.where(place >= 0, place + first, place))
            first += stored
        return _Readers(buffer, list(buffer.split(widths, dim=1)), torch.stack(table))

    def _normed(self, sublayer: _Sublayer, maker: Linear | None) -> _Normed:
        """Room behind a norm, which `maker` fills, or else `write_normed_input` (None, or outputs were removed)."""
        assert sublayer.norm.weight is not None
        readers = self._for_readers("normed", sublayer.linears, self.config.hidden_size)
        tiles = _tiles(maker) if maker is not None and maker.output_index is None else 1
        squares = torch.zeros(self.batch, tiles, dtype=torch.float32, device=self.device)
        normed = NormedInput(readers.buffer, readers.places, sublayer.norm.weight, squares, sublayer.norm.eps)
        return _Normed(readers.buffer, readers.views, readers.places, normed)

    def _product(self, linear: Linear, x: Tensor, out: Tensor, **fusion: Any) -> _Product:
        """A product; its outputs go to their own places in `out` unless told otherwise."""
        if linear.output_index is not None:
            fusion.setdefault("place", linear.output_index.to(torch.int32))
        bias = linear.bias
        if bias is not None and linear.output_index is not None:
            bias = bias[linear.output_index]
        operand = _operand(linear)
        sizes = tiling(operand)
        self._scratch.reserve(operand, self.batch, sizes)
        return _Product(operand, x, out, Fusion(bias=bias, **fusion), self._scratch, sizes)

    def _into_stream(self, linear: Linear, x: Tensor, following: NormedInput) -> list[Launch]:
        """Outputs added to the residual stream, which then goes to its next readers."""
        if linear.output_index is None:
            return [self._product(linear, x, self._x, epilogue=ADD, next_input=following)]
        # entries of the stream that get no output have to reach the readers too
        stream = self._x
        return [
            self._product(linear, x, stream, epilogue=ADD),
            lambda: write_normed_input(stream, None, stream, following),
        ]

    def _sublayer(self, sublayer: _Sublayer, source: _Normed, following: NormedInput) -> list[Launch]:
        block, last = sublayer.block, sublayer.last
        assert block is not None and last is not None
        if block.layer.has_attention and last is block.linears[ATTENTION.writer]:
            launches, x = self._attention(block, sublayer.linears, source, last)
        else:
            launches, x = self._mlp(block.layer, sublayer.linears, source, last)
        return [*launches, *self._into_stream(last, x, following)]

    def _attention(
        self, block: Block, linears: list[Linear], source: _Normed, writer: Linear
    ) -> tuple[list[Launch], Tensor]:
        """Launches up to what `writer` reads, and that."""
        widths = [linear.out_features for linear in linears]
        if all(linear.output_index is None for linear in linears):
            qkv = self._shared_buffer("qkv", sum(widths))
        else:  # where outputs were removed there is the bias, or 0
            qkv = self._buffer(sum(widths)) + torch.cat([_bias(linear) for linear in linears]).to(self.dtype)
        launches: list[Launch] = []
        for linear, x, out in zip(linears, source.views, qkv.split(widths, dim=1), strict=True):
            launches.append(self._product(linear, x, out, norm=source.input))
        heads = self._for_readers("heads", [writer], block.layer.num_heads * self.config.head_dim)
        return [*launches, self._attend(block, qkv, heads)], heads.views[0]

    def _mlp(
        self, layer: LayerConfig, linears: list[Linear], source: _Normed, down: Linear
    ) -> tuple[list[Launch], Tensor]:
        """Launches up to what down reads, and that."""
        activation, width = ACTIVATIONS[self.config.activation], layer.intermediate_size
        filled = all(linear.output_index is None for linear in linears)
        hidden = self._for_readers("hidden", [down], width, filled)
        places = None if hidden.places is None else hidden.places[0]
        if len(linears) == 1:
            both = self._product(
                linears[0], source.views[0], hidden.buffer, norm=source.input, epilogue=GATE, activation=activation,
                place=places,
            )  # fmt: skip
            return [both], hidden.buffer
        # the gate first, in the order of what down reads; where its outputs were removed there is the bias, or 0
        gate, up = linears
        gates = self._for_readers("gate", [down], width, filled).buffer
        if gate.output_index is not None:
            everywhere = torch.arange(width, device=self.device) if places is None else places.long()
            gates[:, everywhere[everywhere >= 0]] = _bias(gate)[everywhere >= 0].to(self.dtype)
        first, second = (_of_kept(places, linear) for linear in (gate, up))
        gated = self._product(gate, source.views[0], gates, norm=source.input, place=first)
        times = self._product(
            up, source.views[1], hidden.buffer, norm=source.input, epilogue=TIMES, activation=activation, gate=gates,
            place=second,
        )  # fmt: skip
        return [gated, times], hidden.buffer

    def _head(self, sublayer: _Sublayer, source: _Normed) -> _Product:
        (linear,) = sublayer.linears
        # logits without a row of the head are its bias, or 0, and not among the tiles' best
        self.whole_head = linear.output_index is None
        if not self.whole_head:
            self.logits += _bias(linear)
        self.best = torch.empty(self.batch, _tiles(linear), dtype=torch.float32, device=self.device)
        self.best_row = torch.empty(self.batch, _tiles(linear), dtype=torch.int32, device=self.device)
        return self._product(
            linear, source.views[0], self.logits, norm=source.input, best=self.best, best_row=self.best_row
        )  # fmt: skip

    def _make_attention_scratch(self) -> tuple[Tensor, Tensor, Tensor]:
        """Partial sums, their maxima and totals, and counters for the largest layer (see `triton_attention.attend`)."""
        layers = [layer for layer in self.config.layers if layer.has_attention]
        cells = max((layer.num_kv_heads * self._padded(layer)[0] for layer in layers), default=0)
        pairs = max((layer.num_kv_heads for layer in layers), default=0)
        width = max(16, 1 << (self.config.head_dim - 1).bit_length())
        partial = torch.empty(self.batch * cells * _SPLITS * width, dtype=torch.float32, device=self.device)
        stats = torch.empty(self.batch * cells * _SPLITS * 2, dtype=torch.float32, device=self.device)
        return partial, stats, torch.zeros(self.batch * pairs, dtype=torch.int32, device=self.device)

    def _padded(self, layer: LayerConfig) -> tuple[int, int]:
        """Query heads of a group and the head size, as the tensor cores take them."""
        group = layer.num_heads // layer.num_kv_heads
        return tuple(max(16, 1 << (n - 1).bit_length()) for n in (group, self.config.head_dim))  # type: ignore[return-value]

    def _attend(self, block: Block, qkv: Tensor, heads: _Readers) -> Launch:
        layer, size, out, places = block.layer, self.config.head_dim, heads.buffer, heads.places
        pair = self.cache.layers[block.index]
        assert pair is not None
        (keys, values), (cos, sin) = pair, self._cos_sin
        gains, eps = [qkv, qkv], 0.0
        if self.config.qk_norm:
            norms = [norm for n in HEAD_NORMS if isinstance(norm := block.norms[n], Norm)]
            gains, eps = [norm.weight for norm in norms], norms[0].eps
        rows, width = self._padded(layer)
        slots = _SLOTS if width * self.dtype.itemsize < 1024 else _SLOTS // 2  # as much as shared memory holds
        batch, capacity, position, scratch = self.batch, self.cache.capacity, self.position, self._attention_scratch
        qk_norm, kernels = self.config.qk_norm, triton_backend.load_kernels("triton_attention")

        def launch() -> None:
            kernels.attend[(batch * layer.num_kv_heads, _SPLITS)](
                qkv, *gains, cos, sin, keys, values, position, out, out if places is None else places, *scratch,
                layer.num_heads, layer.num_kv_heads, size, capacity, layer.sliding_window or 0, qkv.stride(0),
                out.stride(0), eps, size**-0.5, QK_NORM=qk_norm, PLACED=places is not None,
                HEADS_A_GROUP=layer.num_heads // layer.num_kv_heads, R=rows, D=width, S=slots, SPLITS=_SPLITS,
                SHORTEST=_SHORTEST, PLAIN=triton_backend.plain(), **launch_options(4),
            )  # fmt: skip

        return launch


def _sublayers(model: Model) -> Iterator[_Sublayer]:
    """All of a model in the order they run; the last one is the head."""
    for block in model.blocks:
        assert isinstance(block, Block)
        for sublayer in SUBLAYERS.values():
            if sublayer.units(block.layer):
                readers = [block.linears[role] for role in sublayer.running_readers(block.linears)]
                norm, writer = block.norms[sublayer.norm], block.linears[sublayer.writer]
                yield _Sublayer(block, norm, readers, writer)  # type: ignore[arg-type]
    assert model.final_norm is not None
    yield _Sublayer(None, model.final_norm, [model.head], None)


def _embedding(table: Linear, token: Tensor, x: Tensor, first: NormedInput) -> list[Launch]:
    """Launches that fill the residual stream with the rows of the tokens and hand it to its first readers."""
    if not table.quantized:
        weight = table.weight
        return [lambda: write_normed_input(weight, token, x, first)]  # type: ignore[arg-type]
    operand = _operand(table)
    return [lambda: look_up(operand, token, x), lambda: write_normed_input(x, None, x, first)]


def _operand(linear: Linear) -> Operand:
    assert isinstance(linear._matmul, TritonMatmul)
    return linear._matmul.operand


def _tiles(linear: Linear) -> int:
    return tiles_of(_operand(linear), tiling(_operand(linear)))


def _bias(linear: Linear) -> Tensor:
    """Of all outputs, 0 where there is none."""
    if linear.bias is None:
        return torch.zeros(linear.out_features, device=_operand(linear).data.device)
    return linear.bias


def _of_kept(places: Tensor | None, linear: Linear) -> Tensor | None:
    """The places of the outputs that a linear still has."""
    if linear.output_index is None:
        return places
    kept = linear.output_index.to(torch.int32)
    return kept if places is None else places[kept.long()]
