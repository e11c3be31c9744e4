"""Decode steps in C: a model's layers as tables, so that one token of every prompt is one call and no allocation.

The C side is kernels/csrc/step.c. It computes in float32 throughout; keys, values and all weights are as the model holds
them. What it does not know is decoded by the model itself, operation by operation; `step_kernel` says which runs.

Shape legend: B prompts, V vocabulary.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from halve.kernels.cpu import KINDS, CpuMatmul, Library
from halve.model.decoder import Block, KVCache, Model, Norm
from halve.model.linear import Linear

MAX_BATCH = 64  # MAX_COUNT of csrc/cpu.h
_ACTIVATIONS = {"silu": 0, "swish": 0, "relu": 1, "gelu_new": 2, "gelu_pytorch_tanh": 2, "gelu": 3}
_pointer, _int64, _int32 = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32


class _Linear(ctypes.Structure):
    _fields_ = (*((name, _pointer) for name in ("weight", "bias", "input_index", "output_index")), ("outputs", _int64))


class _Norm(ctypes.Structure):
    _fields_ = (("weight", _pointer), ("bias", _pointer))


class _Layer(ctypes.Structure):
    _fields_ = (
        *((name, _Norm) for name in ("attention_norm", "mlp_norm", "query_norm", "key_norm")),
        ("qkv", _Linear * 3),
        ("o", _Linear),
        ("up", _Linear * 2),
        ("down", _Linear),
        *((name, _int64) for name in ("heads", "kv_heads", "width", "window")),
    )


class _Model(ctypes.Structure):
    _fields_ = (
        *((name, _pointer) for name in ("kernels", "layers", "embed", "positions", "cosine", "sine")),
        ("final_norm", _Norm),
        ("head", _Linear),
        *((name, _int64) for name in ("layer_count", "hidden", "head_size", "position_offset", "bytes")),
        ("eps", ctypes.c_float),
        *((name, _int32) for name in ("kind", "rms", "has_final_norm", "qk_norm", "gated", "activation")),
        *((name, _int32) for name in ("inner", "outer", "columns", "segments")),
    )


class _Cache(ctypes.Structure):
    _fields_ = (("keys", _pointer), ("values", _pointer), ("batch", _int64), ("capacity", _int64))


_STRUCTURES = (_Linear, _Norm, _Layer, _Model, _Cache)


def step_kernel(model: Model) -> str:
    """What decodes one token: "NAME-step" of the C library, or "torch" and the reason in brackets."""
    library = _serves(model)
    return f"torch ({library})" if isinstance(library, str) else f"{library.isa}-step"


def _serves(model: Model) -> Library | str:
    """The library whose step runs the model, or why none does."""
    config = model.config
    matmuls = [linear.matmul for _, linear in model.linears()]
    others = {str(getattr(m, "kernel", None)) for m in matmuls if not isinstance(m, CpuMatmul)}
    if others:
        return f"a layer runs on {min(others)}"
    if not config.norm_first or model.project_in is not None:
        return "norms after the sums, or a projected embedding"
    if any(block._forward_pre_hooks or block._forward_hooks for block in model.blocks):
        return "hooks on a layer"
    if config.activation not in _ACTIVATIONS:
        return f"activation {config.activation}"
    (library, *more) = {m.library for m in matmuls if isinstance(m, CpuMatmul)}
    return "layers run on different instruction sets" if more else library


class StepPlan:
    """One model and one cache, laid out for C. Addresses point into both, and into buffers made here once."""

    def __init__(self, model: Model, cache: KVCache, library: Library) -> None:
        self._model, self._cache = model, cache
        functions = library.functions
        functions.halve_step_sizes.restype = _int64
        for which, structure in enumerate(_STRUCTURES):
            assert functions.halve_step_sizes(which) == ctypes.sizeof(structure), structure.__name__
        batch = cache.batch
        self._slots_B = torch.zeros(batch, dtype=torch.int64)
        self._logits_BV = torch.empty(batch, model.config.vocab_size)
        self._c_model = self._describe(library)
        self._c_cache = self._describe_cache()
        functions.halve_step_scratch.restype = _int64
        functions.halve_step_scratch.argtypes = [_pointer, _pointer]
        addresses = ctypes.addressof(self._c_model), ctypes.addressof(self._c_cache)
        self._scratch = torch.empty(functions.halve_step_scratch(*addresses), dtype=torch.uint8)
        self._run = functions.halve_step
        self._run.argtypes = [_pointer] * 6
        self._run.restype = None
        buffers = (self._slots_B, self._logits_BV, self._scratch)
        self._arguments = (*addresses, *(t.data_ptr() for t in buffers))

    @classmethod
    def make(cls, model: Model, cache: KVCache) -> StepPlan | None:
        """The plan, or None where the model decodes operation by operation."""
        library = _serves(model)
        if isinstance(library, str) or not 0 < cache.batch <= MAX_BATCH:
            return None
        return cls(model, cache, library)

    def __call__(self, tokens_B1: Tensor) -> Tensor:
        """Logits float32 [B, V] after tokens int64 [B, 1]; the cache grows by one. Overwritten by the next call."""
        lengths = self._cache.lengths
        if isinstance(lengths, int):
            assert lengths < self._cache.capacity, (lengths, self._cache.capacity)
            self._slots_B.fill_(lengths)
        else:
            self._slots_B.copy_(lengths)
        model, cache, slots, logits, scratch = self._arguments
        tokens_B1 = tokens_B1.contiguous()
        self._run(model, cache, tokens_B1.data_ptr(), slots, logits, scratch)
        self._cache.lengths = lengths + 1
        return self._logits_BV

    def _describe(self, library: Library) -> _Model:
        model, config = self._model, self._model.config
        self._layers = (_Layer * len(config.layers))()
        for block, layer in zip(model.blocks, self._layers, strict=True):
            assert isinstance(block, Block)
            _describe_block(block, layer)
        linears = [linear for _, linear in model.linears()]
        described = _Model(
            kernels=library.kernels,
            layers=ctypes.addressof(self._layers),
            embed=model.embed.data_ptr(),
            positions=_address(model.positions),
            final_norm=_norm(model.final_norm),
            head=_linear(model.head),
            layer_count=len(config.layers),
            hidden=config.hidden_size,
            head_size=config.head_dim,
            position_offset=config.position_offset,
            bytes=model.step_bytes(),
            eps=config.norm_eps,
            kind=KINDS[model.dtype],
            rms=config.norm == "rms",
            has_final_norm=model.final_norm is not None,
            qk_norm=config.qk_norm,
            gated=config.gated,
            activation=_ACTIVATIONS[config.activation],
            inner=max(linear.in_features for linear in linears),
            outer=max(_outputs(block) for block in model.blocks),
            columns=max(_matmul(linear).columns for linear in linears),
            segments=max(_matmul(linear).segments for linear in linears),
        )
        if model.rotary is not None:
            self._rotary = model.rotary.tables(self._cache.capacity, torch.float32)
            described.cosine, described.sine = (t.data_ptr() for t in self._rotary)
        return described

    def _describe_cache(self) -> _Cache:
        pairs = self._cache.layers
        assert all(t.is_contiguous() for pair in pairs if pair is not None for t in pair)
        self._pointers = [
            (_pointer * len(pairs))(*(None if pair is None else pair[which].data_ptr() for pair in pairs))
            for which in (0, 1)
        ]
        keys, values = (ctypes.addressof(p) for p in self._pointers)
        return _Cache(keys, values, self._cache.batch, self._cache.capacity)


def _describe_block(block: Block, layer: _Layer) -> None:
    config, linears = block.layer, block.linears
    for field, role in (("attention_norm", "attn_norm"), ("mlp_norm", "mlp_norm")):
        setattr(layer, field, _norm(_named(block, role)))
    for field, role in (("query_norm", "q_norm"), ("key_norm", "k_norm")):
        setattr(layer, field, _norm(_named(block, role)))
    layer.window = config.sliding_window or 0
    if config.has_attention:
        layer.heads, layer.kv_heads = config.num_heads, config.num_kv_heads
        _fill(layer.qkv, block, ["qkv_proj"] if "qkv_proj" in linears else ["q_proj", "k_proj", "v_proj"])
        layer.o = _linear(linears["o_proj"])
    if config.has_mlp:
        layer.width = config.intermediate_size
        separate = ["gate_proj", "up_proj"] if block.config.gated else ["up_proj"]
        _fill(layer.up, block, ["gate_up_proj"] if "gate_up_proj" in linears else separate)
        layer.down = _linear(linears["down_proj"])


def _fill(array: ctypes.Array[_Linear], block: Block, roles: Sequence[str]) -> None:
    for place, role in enumerate(roles):
        array[place] = _linear(block.linears[role])


def _outputs(block: torch.nn.Module) -> int:
    """Numbers that the widest linears side by side write."""
    assert isinstance(block, Block)
    layer, size = block.layer, block.config.head_dim
    return max((layer.num_heads + 2 * layer.num_kv_heads) * size, layer.intermediate_size * (1 + block.config.gated))


def _named(block: Block, role: str) -> Norm | None:
    if role not in block.norms:
        return None
    norm = block.norms[role]
    assert isinstance(norm, Norm)
    return norm


def _norm(norm: Norm | None) -> _Norm:
    return _Norm() if norm is None else _Norm(_address(norm.weight), _address(norm.bias))


def _linear(linear: torch.nn.Module) -> _Linear:
    assert isinstance(linear, Linear)
    parts = (linear.bias, linear.input_index, linear.output_index)
    return _Linear(_matmul(linear).address, *(_address(t) for t in parts), linear.out_features)


def _matmul(linear: Linear) -> CpuMatmul:
    assert isinstance(linear.matmul, CpuMatmul)
    return linear.matmul


def _address(tensor: Tensor | None) -> int | None:
    if tensor is None:
        return None
    assert tensor.is_contiguous()
    return tensor.data_ptr()
