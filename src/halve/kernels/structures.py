"""What Python and the C library have in common: structures, functions and constants, compared when the library is loaded.

The C side is csrc/cpu.h and csrc/step.c, which say what a field means. It exports where each of its fields lies
(`declaration_t`), so that a library built from other sources is told by name and never reads a wrong address.
"""

from __future__ import annotations

import ctypes
from ctypes import c_char_p, c_float, c_int32, c_int64, c_void_p
from typing import Any

from halve.errors import StaleKernelsError

ROWS = 16  # output rows in a block
MAX_SEGMENT = 128  # columns under one scale of x
MAX_COUNT = 64  # rows of x, or prompts of a decode step, at a time
CONSTANTS = {"ROWS": ROWS, "MAX_SEGMENT": MAX_SEGMENT, "MAX_COUNT": MAX_COUNT}


class WeightStruct(ctypes.Structure):
    """weight_t: one weight as the kernels read it."""

    _fields_ = (
        *((name, c_void_p) for name in ("kernels", "codes", "scale", "zero", "order")),
        *((name, c_void_p) for name in ("segment_end", "segment_group")),
        *((name, c_int64) for name in ("rows", "in_features", "columns", "words", "groups", "segments")),
        *((name, c_int32) for name in ("bits", "offset", "scale_kind", "dense_kind", "exact")),
    )


class LinearStruct(ctypes.Structure):
    """linear_t: a weight, its bias, and the inputs and outputs it kept."""

    _fields_ = (
        *((name, c_void_p) for name in ("weight", "bias", "input_index", "output_index")),
        ("outputs", c_int64),
    )


class NormStruct(ctypes.Structure):
    """norm_t"""

    _fields_ = (("weight", c_void_p), ("bias", c_void_p), ("kind", c_int64))


class LayerStruct(ctypes.Structure):
    """layer_t: one block of a model."""

    _fields_ = (
        *((name, NormStruct) for name in ("attention_norm", "mlp_norm", "query_norm", "key_norm")),
        *((name, NormStruct) for name in ("attention_output_norm", "mlp_output_norm")),
        *((name, c_void_p) for name in ("cosine", "sine")),
        ("qkv", LinearStruct * 3),
        ("o", LinearStruct),
        ("up", LinearStruct * 2),
        ("down", LinearStruct),
        *((name, c_int64) for name in ("heads", "kv_heads", "width", "window")),
        ("growth", c_void_p),
        ("turned", c_int64),
    )


class ModelStruct(ctypes.Structure):
    """model_t: all that a decode step reads but the cache."""

    _fields_ = (
        *((name, c_void_p) for name in ("kernels", "layers", "table", "positions")),
        ("final_norm", NormStruct),
        ("head", LinearStruct),
        *((name, c_int64) for name in ("layer_count", "hidden", "head_size", "position_offset", "bytes")),
        *((name, c_float) for name in ("eps", "embed_scale", "attention_scale", "residual_scale", "logit_divisor")),
        *((name, c_float) for name in ("attention_cap", "logit_cap")),
        *((name, c_int32) for name in ("kind", "rms", "has_final_norm", "norm_input", "norm_output")),
        *((name, c_int32) for name in ("qk_norm", "qk_norm_whole", "gated", "activation")),
        *((name, c_int32) for name in ("inner", "outer", "columns", "segments")),
    )


class CacheStruct(ctypes.Structure):
    """cache_t"""

    _fields_ = (("keys", c_void_p), ("values", c_void_p), ("batch", c_int64), ("capacity", c_int64))


STRUCTURES: dict[str, type[ctypes.Structure]] = {
    "weight_t": WeightStruct,
    "linear_t": LinearStruct,
    "norm_t": NormStruct,
    "layer_t": LayerStruct,
    "model_t": ModelStruct,
    "cache_t": CacheStruct,
}

# the types as C writes them; `bind` makes ctypes' of them
FUNCTIONS = {
    "halve_cpu_kernels": "const kernels_t *(const char *)",
    "halve_cpu_name": "const char *(const kernels_t *)",
    "halve_cpu_set_threads": "void(start_t, count_t)",
    "halve_cpu_has_bf16": "int(void)",
    "halve_cpu_has_tiles": "int(void)",
    "halve_cpu_large_pages": "void(void *, int64_t, int)",
    "halve_cpu_multiply": "int(const weight_t *, const void *, void *, int64_t, int)",
    "halve_cpu_expand": "void(const weight_t *, int64_t, int64_t, int, void *, int64_t)",
    "halve_cpu_check": "const char *(const weight_t *)",
    "halve_cpu_pack": "int(const weight_t *, const void *, int64_t, int, void *)",
    "halve_cpu_look_up": "int(const weight_t *, const int64_t *, int64_t, float *)",
    "halve_step_scratch": "int64_t(const model_t *, const cache_t *)",
    "halve_step_check": "const char *(const model_t *, const cache_t *)",
    "halve_step": "int(const model_t *, const cache_t *, const int64_t *, const int64_t *, float *, void *)",
}
_TABLES = ("halve_cpu_declarations", "halve_step_declarations")
_TYPES = {
    "void": None, "int": ctypes.c_int, "int64_t": c_int64, "const char *": c_char_p, "start_t": c_void_p,
    "count_t": c_void_p,
}  # fmt: skip

# a field, the type of a function, or ""; offset in bytes; size, or a constant's value
Declaration = tuple[str, int, int]


class _DeclarationStruct(ctypes.Structure):
    """declaration_t"""

    _fields_ = (("owner", c_char_p), ("member", c_char_p), ("offset", c_int64), ("size", c_int64))


def bind(library: ctypes.CDLL) -> None:
    """Check that the library is of these structures, functions and constants, and give its functions their types.

    Raises StaleKernelsError where it is not.
    """
    ours, theirs = _declared_here(), _declared_by(library)
    for owner in {**ours, **theirs}:
        if ours.get(owner) != theirs.get(owner):
            raise StaleKernelsError(_different(owner, ours.get(owner, []), theirs.get(owner, [])))
    for name, signature in FUNCTIONS.items():
        result, arguments = signature.rstrip(")").split("(")
        function = getattr(library, name)
        function.restype = _ctype(result)
        function.argtypes = [] if arguments == "void" else [_ctype(argument) for argument in arguments.split(", ")]


def _ctype(name: str) -> Any:
    return _TYPES[name] if name in _TYPES or not name.endswith("*") else c_void_p


def _declared_here() -> dict[str, list[Declaration]]:
    declared = {name: [("", 0, value)] for name, value in CONSTANTS.items()}
    for name, structure in STRUCTURES.items():
        fields = [(field[0], getattr(structure, field[0])) for field in structure._fields_]
        declared[name] = [("", 0, ctypes.sizeof(structure)), *((field, at.offset, at.size) for field, at in fields)]
    return declared | {name: [(signature, 0, 0)] for name, signature in FUNCTIONS.items()}


def _declared_by(library: ctypes.CDLL) -> dict[str, list[Declaration]]:
    declared: dict[str, list[Declaration]] = {}
    for table in _TABLES:
        if not hasattr(library, table):
            raise StaleKernelsError(_stale(f"no {table}"))
        function = getattr(library, table)
        function.restype = ctypes.POINTER(_DeclarationStruct)
        rows, index = function(), 0
        while rows[index].owner is not None:
            row = rows[index]
            declared.setdefault(row.owner.decode(), []).append((row.member.decode(), row.offset, row.size))
            index += 1
    return declared


def _different(owner: str, ours: list[Declaration], theirs: list[Declaration]) -> str:
    """The message for what first differs."""
    for index in range(max(len(ours), len(theirs))):
        here, there = (rows[index] if index < len(rows) else None for rows in (ours, theirs))
        if here != there:
            return _stale(f"{owner}: {there} there, {here} here")
    raise AssertionError(owner)


def _stale(difference: str) -> str:
    return (
        f"the compiled kernels are of another version than this package ({difference}): run pip install again in its "
        "folder"
    )
