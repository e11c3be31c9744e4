"""Decode steps in C: a model's layers as tables, so that one token of every prompt is one call and no allocation.

The C side is kernels/csrc/step.c. It computes in float32 throughout; keys, values and all weights are as the model holds
them. What it does not know is decoded by the model itself, operation by operation (`torch_step`).

Shape legend: B prompts, V vocabulary.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from halve.decode.torch_step import TorchStep
from halve.errors import HalveError
from halve.kernels.cpu import KINDS, CpuMatmul, Library, load_library
from halve.kernels.structures import (
    MAX_COUNT,
    CacheStruct,
    LayerStruct,
    LinearStruct,
    ModelStruct,
    NormStruct,
    WeightStruct,
)
from halve.model.decoder import Block, Model, Norm, embed_scale
from halve.model.linear import Linear
from halve.model.rotary import query_growth
from halve.model.wiring import ATTENTION, HEAD_NORMS, MLP, SUBLAYERS, wires

_ACTIVATIONS = {"silu": 0, "swish": 0, "relu": 1, "gelu_new": 2, "gelu_pytorch_tanh": 2, "gelu": 3, "relu2": 4}


class CpuStep(TorchStep):
    """One model and one cache, laid out for C. Addresses point into both, and into buffers made here once."""

    def __init__(self, model: Model, batch: int, capacity: int) -> None:
        super().__init__(model, batch, capacity)
        library = _matmul(model.head).library
        self.kernel = f"{library.isa}-step"
        self._slots_B = torch.zeros(batch, dtype=torch.int64)
        self._logits_BV = torch.empty(batch, model.config.vocab_size)
        self._c_model = self._describe(library)
        self._c_cache = self._describe_cache()
        addresses = ctypes.addressof(self._c_model), ctypes.addressof(self._c_cache)
        if (reason := library.step_check(*addresses)) is not None:
            raise HalveError(f"the layers are not of one model: {reason.decode()}")
        self._scratch = torch.empty(library.step_scratch(*addresses), dtype=torch.uint8)
        self._run = library.step
        buffers = (self._slots_B, self._logits_BV, self._scratch)
        self._arguments = (*addresses, *(t.data_ptr() for t in buffers))

    @classmethod
    def runs_on(cls, device: torch.device) -> bool:
        return device.type == "cpu"

    @classmethod
    def serves(cls, model: Model, batch: int) -> str | None:
        if batch > MAX_COUNT:
            return f"{batch} prompts at once, the C step takes {MAX_COUNT}"
        if isinstance(missing := load_library(), str):
            return missing
        matmuls = [linear.matmul for _, linear in model.linears()]
        if model.table.quantized:
            matmuls.append(model.table.matmul)
        others = {str(getattr(m, "kernel", None)) for m in matmuls if not isinstance(m, CpuMatmul)}
        if others:
            return f"a layer runs on {min(others)}"
        config = model.config
        if config.norm_sum or model.project_in is not None:
            return "norms after the sums, or a projected embedding"
        if any(rope.neighbours for rope in config.ropes):
            return "rotary embeddings that turn neighbouring channels"
        if any(block._forward_pre_hooks or block._forward_hooks for block in model.blocks):
            return "hooks on a layer"
        if config.activation not in _ACTIVATIONS:
            return f"activation {config.activation}"
        libraries = {m.library for m in matmuls if isinstance(m, CpuMatmul)}
        return "layers run on different instruction sets" if len(libraries) > 1 else None

    def logits(self, tokens_B1: Tensor) -> Tensor:
        """Logits float32 [B, V] after tokens int64 [B, 1]; the cache grows by one. Overwritten by the next call."""
        if self.cache.tokens is not None:
            length = self.cache.end + 1
            if any(rotary.long(length) != self.cache.long for rotary in self.model.rotaries):
                return super().logits(tokens_B1).float()  # which makes the whole cache again
            self.cache.outgrown(tokens_B1)
            if self._long != self.cache.long:
                self._turn()
        lengths = self.cache.lengths
        if isinstance(lengths, int):
            assert lengths < self.cache.capacity, (lengths, self.cache.capacity)
            self._slots_B.fill_(lengths)
        else:
            self._slots_B.copy_(lengths)
        model, cache, slots, logits, scratch = self._arguments
        tokens_B1 = tokens_B1.contiguous()
        if self._run(model, cache, tokens_B1.data_ptr(), slots, logits, scratch):
            raise HalveError(
                f"a token of {tokens_B1.flatten().tolist()} is not in the vocabulary of {self._logits_BV.shape[1]}"
            )
        self.cache.lengths = lengths + 1
        return self._logits_BV

    def _describe(self, library: Library) -> ModelStruct:
        model, config = self.model, self.model.config
        self._layers = (LayerStruct * len(config.layers))()
        for block, layer in zip(model.blocks, self._layers, strict=True):
            assert isinstance(block, Block)
            _describe_block(block, layer)
        self._turn()
        linears = [linear for _, linear in model.linears()]
        scale = config.attention_scale
        return ModelStruct(
            kernels=library.kernels,
            layers=ctypes.addressof(self._layers),
            table=self._table(library),
            positions=_address(model.positions),
            final_norm=_norm(model.final_norm),
            head=_linear(model.head),
            layer_count=len(config.layers),
            hidden=config.hidden_size,
            head_size=config.head_dim,
            position_offset=config.position_offset,
            bytes=model.step_bytes(),
            eps=config.norm_eps,
            embed_scale=embed_scale(config, model.dtype),
            attention_scale=config.head_dim**-0.5 if scale is None else scale,
            residual_scale=config.residual_scale,
            logit_divisor=config.logit_divisor,
            attention_cap=config.attention_cap or 0,
            logit_cap=config.logit_cap or 0,
            kind=KINDS[model.dtype],
            rms=config.norm == "rms",
            has_final_norm=model.final_norm is not None,
            norm_input=config.norm_input,
            norm_output=config.norm_output,
            qk_norm=config.qk_norm,
            qk_norm_whole=config.qk_norm_whole,
            gated=config.gated,
            activation=_ACTIVATIONS[config.activation],
            inner=max(linear.in_features for linear in linears),
            outer=max(config.hidden_size, *(_outputs(block) for block in model.blocks)),
            columns=max(_matmul(linear).columns for linear in linears),
            segments=max(_matmul(linear).segments for linear in linears),
        )

    def _table(self, library: Library) -> int:
        """Address of the embedding as a weight_t: that of a packed one's matmul, or of a dense one of which nothing but rows is
        asked."""
        table = self.model.table
        if isinstance(table.matmul, CpuMatmul):
            return table.matmul.address
        weight = table.weight
        assert isinstance(weight, Tensor)
        rows, columns = weight.shape
        self._dense_table = WeightStruct(
            library.kernels, _address(weight), rows=rows, in_features=columns, columns=columns,
            dense_kind=KINDS[weight.dtype],
        )  # fmt: skip
        return ctypes.addressof(self._dense_table)

    def _turn(self) -> None:
        """Point at the rotary tables by which the keys in the cache are turned."""
        capacity, self._long = self.cache.capacity, self.cache.long
        self._turns = [rotary.tables(capacity, torch.float32, self._long) for rotary in self.model.rotaries]
        self._growths = [query_growth(rope, torch.arange(capacity)) for rope in self.model.config.ropes]
        for block, layer in zip(self.model.blocks, self._layers, strict=True):
            assert isinstance(block, Block)
            if block.layer.rope is not None:
                layer.cosine, layer.sine = (t.data_ptr() for t in self._turns[block.layer.rope])
                layer.turned = self.model.rotaries[block.layer.rope].turned
                layer.growth = _address(self._growths[block.layer.rope])

    def _describe_cache(self) -> CacheStruct:
        pairs = self.cache.layers
        assert all(t.is_contiguous() for pair in pairs if pair is not None for t in pair)
        self._pointers = [
            (ctypes.c_void_p * len(pairs))(*(None if pair is None else pair[which].data_ptr() for pair in pairs))
            for which in (0, 1)
        ]
        keys, values = (ctypes.addressof(p) for p in self._pointers)
        return CacheStruct(keys, values, self.cache.batch, self.cache.capacity)


def _describe_block(block: Block, layer: LayerStruct) -> None:
    config = block.layer
    norms = {"attention_norm": ATTENTION.norm, "mlp_norm": MLP.norm}
    norms |= {"attention_output_norm": ATTENTION.output_norm, "mlp_output_norm": MLP.output_norm}
    norms |= dict(zip(("query_norm", "key_norm"), HEAD_NORMS, strict=True))
    for field, role in norms.items():
        setattr(layer, field, _norm(_named(block, role)))
    layer.window = config.sliding_window or 0
    if config.has_attention:
        layer.heads = config.num_heads
        layer.kv_heads = config.num_kv_heads
        _fill(layer.qkv, block, ATTENTION.running_readers(block.linears))
        layer.o = _linear(block.linears[ATTENTION.writer])
    if config.has_mlp:
        layer.width = config.intermediate_size
        _fill(layer.up, block, MLP.running_readers(block.linears))
        layer.down = _linear(block.linears[MLP.writer])


def _fill(array: ctypes.Array[LinearStruct], block: Block, roles: Sequence[str]) -> None:
    for place, role in enumerate(roles):
        array[place] = _linear(block.linears[role])


def _outputs(block: torch.nn.Module) -> int:
    """Numbers that the widest linears side by side write."""
    assert isinstance(block, Block)
    written = {wire.role: wire.outputs(block.config, block.layer) for wire in wires(block.config, block.layer)}
    return max(sum(written.get(role, 0) for role in sublayer.readers) for sublayer in SUBLAYERS.values())


def _named(block: Block, role: str) -> Norm | None:
    if role not in block.norms:
        return None
    norm = block.norms[role]
    assert isinstance(norm, Norm)
    return norm


def _norm(norm: Norm | None) -> NormStruct:
    if norm is None or norm.weight is None:
        return NormStruct()
    return NormStruct(_address(norm.weight), _address(norm.bias), KINDS[norm.weight.dtype])


def _linear(linear: torch.nn.Module) -> LinearStruct:
    assert isinstance(linear, Linear)
    parts = (linear.bias, linear.input_index, linear.output_index)
    return LinearStruct(_matmul(linear).address, *(_address(t) for t in parts), linear.out_features)


def _matmul(linear: Linear) -> CpuMatmul:
    assert isinstance(linear.matmul, CpuMatmul)
    return linear.matmul


def _address(tensor: Tensor | None) -> int | None:
    if tensor is None:
        return None
    assert tensor.is_contiguous()
    return tensor.data_ptr()
