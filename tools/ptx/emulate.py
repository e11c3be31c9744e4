"""Run compiled Triton kernels on the CPU, on tensors of the CPU, from the PTX that a GPU would get.

`emulate` makes every launch do that. Triton's interpreter runs the kernels as they are written; this runs what the compiler
made of them: layouts, assembly, asynchronous copies, tensor cores. All threads of a block go in lockstep, blocks one after
another, so races are not found; an access outside of the tensors given to a launch is, and a copy lands only once it is waited
for. It knows the instructions that these kernels are made of (PTX ISA 8.x) and says which one it does not know.

Registers are uint64 [threads], predicates bool [threads].
"""

from __future__ import annotations

import ctypes
import re
import struct
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from triton.runtime import driver  # pyright: ignore[reportMissingImports]
from triton.runtime.jit import JITFunction  # pyright: ignore[reportMissingImports]

from tools.ptx.compile import NoDevice

Array = npt.NDArray[Any]
U64 = np.uint64
SHARED = 1 << 20  # where shared memory begins: any address that is no tensor's
WARP = np.arange(32)
QUAD, IN_QUAD = WARP >> 2, WARP & 3  # a lane's row and pair of columns in the tensor cores' tiles
BACKWARDS = False  # True: the last block of a launch first
NO_EFFECT = ("bar", "fence", "membar", "griddepcontrol", "prefetch")


def bits_of(kind: str) -> int:
    """Width of a PTX type: `s32`, `bf16`, `b64`; both halves of `bf16x2`."""
    return 32 if kind.endswith("x2") else int(re.sub(r"\D", "", kind))


def numbers(raw: Array, kind: str) -> Array:
    """The numbers that the lowest bits of registers stand for: float32, int64, or uint64 as they are."""
    if kind == "f32":
        return raw.astype(np.uint32).view(np.float32)
    if kind == "bf16":
        return (raw.astype(np.uint32) << np.uint32(16)).view(np.float32)
    if kind == "f16":
        return raw.astype(np.uint16).view(np.float16).astype(np.float32)
    width = bits_of(kind)
    if kind[0] == "s":
        return (
            raw.astype({8: np.uint8, 16: np.uint16, 32: np.uint32, 64: U64}[width])
            .view(f"i{width // 8}")
            .astype(np.int64)
        )
    return raw & U64((1 << width) - 1)


def registers(values: Array, kind: str) -> Array:
    """The inverse of `numbers`; integers wrap, floats round to nearest even. 8 signed bits fill the register, as in PTX."""
    if kind == "f32":
        return np.ascontiguousarray(values, np.float32).view(np.uint32).astype(U64)
    if kind == "f16":
        with np.errstate(over="ignore"):
            return np.asarray(values, np.float32).astype(np.float16).view(np.uint16).astype(U64)
    if kind == "bf16":
        raw = np.ascontiguousarray(values, np.float32).view(np.uint32).astype(U64)
        rounded = (raw + U64(0x7FFF) + ((raw >> U64(16)) & U64(1))) >> U64(16)
        return np.where(np.isnan(values), U64(0x7FFF), rounded)
    if np.asarray(values).dtype.kind == "f":
        values = np.trunc(values).astype(np.int64)
    raw = np.ascontiguousarray(values).view(U64) if values.dtype == np.int64 else np.asarray(values).astype(U64)
    if kind == "s8":
        return numbers(raw, "s8").view(U64)
    return raw & U64((1 << bits_of(kind)) - 1)


ARITHMETIC: dict[str, Callable[..., Array]] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "mad": lambda a, b, c: a * b + c,
    "fma": lambda a, b, c: (a.astype(np.float64) * b + c).astype(np.float32),
    "div": lambda a, b: a / b if a.dtype.kind == "f" else np.trunc(a / np.where(b == 0, 1, b)).astype(np.int64),
    "rem": lambda a, b: np.fmod(a, np.where(b == 0, 1, b)),
    "min": np.fmin,
    "max": np.fmax,
    "neg": np.negative,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "not": np.invert,
    "shl": lambda a, b: np.where(b > U64(63), U64(0), a << np.minimum(b, U64(63))),
    "shr": lambda a, b: a >> np.minimum(b.astype(U64), U64(63)).astype(a.dtype),
    "ex2": np.exp2,
    "sqrt": np.sqrt,
}
COMPARISONS: dict[str, Callable[[Array, Array], Array]] = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
}  # fmt: skip


class Memory:
    """The tensors of a launch, by address."""

    def __init__(self, tensors: Iterable[torch.Tensor]) -> None:
        self._blocks: dict[int, Array] = {}
        for tensor in tensors:
            whole = tensor.untyped_storage()
            if whole.nbytes():
                pointer = (ctypes.c_uint8 * whole.nbytes()).from_address(whole.data_ptr())
                self._blocks[whole.data_ptr()] = np.ctypeslib.as_array(pointer)

    def place(self, addresses: Array, size: int, shared: Array) -> tuple[Array, Array]:
        """The block that addresses [n] lie in, and the bytes of each in it [n, size]."""
        for start, block in ((SHARED, shared), *self._blocks.items()):
            at = addresses - start
            if at.size and at.min() >= 0 and at.max() + size <= block.size:
                return block, at[:, None] + np.arange(size)
        raise IndexError(f"{size} bytes at {addresses.min():#x} to {addresses.max():#x} are in no tensor of the launch")


def parse(ptx: str) -> tuple[list[tuple[str | None, list[str], list[str]]], dict[str, int]]:
    """Instructions of the only kernel as (predicate, name split at its dots, operands), and where labels point."""
    body = re.sub(r"//.*", "", ptx[ptx.index("{", ptx.index(".visible .entry")) + 1 :])
    body = re.sub(r"^\s*\.(loc|file|section)\b.*$", "", body, flags=re.MULTILINE)
    code, labels = [], {}
    for statement in body.split(";"):
        statement = statement.strip()
        while opening := re.match(r"[{}]\s*|(\$[\w$]+):\s*", statement):
            if opening[1]:
                labels[opening[1]] = len(code)
            statement = statement[opening.end() :]
        if found := re.match(r"(@!?%\w+\s+)?([a-z][\w.:]*)\s*(.*)$", statement, re.DOTALL):
            operands = re.findall(r"(?:\{[^}]*\}|\[[^\]]*\]|[^,{\[])+", found[3])
            predicate = found[1].strip() if found[1] else None
            code.append((predicate, found[2].replace("::", ".").split("."), [each.strip() for each in operands]))
    return code, labels


class Block:
    """One block of threads while it runs."""

    def __init__(
        self, threads: int, shared_bytes: int, parameters: list[int], memory: Memory, index: tuple[int, ...]
    ) -> None:
        self.threads, self.parameters, self.memory, self.index = threads, parameters, memory, index
        self.shared = np.full(shared_bytes, 0xEE, np.uint8)
        self.registers: dict[str, Array] = {}
        self.copies: list[tuple[Array, Array]] = []
        self.groups: list[list[tuple[Array, Array]]] = []

    def run(self, code: list[tuple[str | None, list[str], list[str]]], labels: dict[str, int]) -> None:
        at = 0
        while at < len(code):
            predicate, name, operands = code[at]
            at += 1
            active = np.ones(self.threads, bool)
            if predicate is not None:
                active = self.value(predicate.lstrip("@!")).astype(bool)
                active = ~active if predicate.startswith("@!") else active
            if name[0] == "ret":
                return
            if name[0] == "bra":
                if active.any() != active.all():
                    raise NotImplementedError("threads of a block take different branches")
                at = labels[operands[0]] if active.all() else at
            elif name[0] not in NO_EFFECT and active.any():
                try:
                    with np.errstate(all="ignore"):
                        getattr(self, f"_{name[0]}", self._arithmetic)(name, operands, active)
                except Exception as error:
                    error.add_note(f"in {predicate or ''} {'.'.join(name)} {', '.join(operands)}")
                    raise

    # operands

    def value(self, operand: str) -> Array:
        """A register, a constant or a special register."""
        if operand in self.registers:
            return self.registers[operand]
        if operand == "%tid.x":
            return np.arange(self.threads, dtype=U64)
        if operand.startswith("%ctaid."):
            return np.full(self.threads, self.index["xyz".index(operand[-1])], U64)
        if operand.startswith("%"):
            return np.zeros(self.threads, U64)  # never written: where a predicate was false
        if operand.startswith("0f"):
            return np.full(self.threads, int(operand[2:], 16), U64)
        number = SHARED if operand == "global_smem" else int(operand.rstrip("U"), 0)
        return np.full(self.threads, number & (2**64 - 1), U64)

    def set(self, operand: str, raw: Array, active: Array) -> None:
        if operand != "_":
            before = self.registers.get(operand, np.zeros(self.threads, raw.dtype))
            self.registers[operand] = np.where(active, raw, before)

    @staticmethod
    def vector(operand: str) -> list[str]:
        return [each.strip() for each in operand.strip("{} ").split(",")]

    def address(self, operand: str) -> Array:
        base, _, offset = operand.strip("[] ").partition("+")
        return self.value(base.strip()).astype(np.int64) + int(offset.strip() or "0", 0)

    def read(self, addresses: Array, size: int) -> Array:
        block, at = self.memory.place(addresses, size, self.shared)
        return block[at]

    def write(self, addresses: Array, data: Array) -> None:
        block, at = self.memory.place(addresses, data.shape[1], self.shared)
        block[at] = data

    # instructions, by the first part of their name

    def _mov(self, name: list[str], operands: list[str], active: Array) -> None:
        to, source = operands
        if to.startswith("{"):
            parts = self.vector(to)
            width = bits_of(name[-1]) // len(parts)
            for i, part in enumerate(parts):
                self.set(part, (self.value(source) >> U64(width * i)) & U64((1 << width) - 1), active)
        elif source.startswith("{"):
            parts = self.vector(source)
            width = bits_of(name[-1]) // len(parts)
            self.set(to, self._joined([self.value(part) for part in parts], width), active)
        else:
            value = self.value(source)
            self.set(to, value.astype(bool) if name[-1] == "pred" else numbers(value, f"b{bits_of(name[-1])}"), active)

    @staticmethod
    def _joined(parts: list[Array], width: int) -> Array:
        whole = np.zeros(parts[0].shape, U64)
        for i, part in enumerate(parts):
            whole |= (part & U64((1 << width) - 1)) << U64(width * i)
        return whole

    def _ld(self, name: list[str], operands: list[str], active: Array) -> None:
        if name[1] == "param":
            number = int(operands[1].strip("[]").rpartition("_")[2])
            self.set(operands[0], np.full(self.threads, self.parameters[number], U64), active)
            return
        size = bits_of(name[-1]) // 8
        for i, part in enumerate(self.vector(operands[0])):
            data = np.zeros((self.threads, 8), np.uint8)
            data[active, :size] = self.read(self.address(operands[1])[active] + i * size, size)
            self.set(part, data.view(U64)[:, 0], active)

    def _st(self, name: list[str], operands: list[str], active: Array) -> None:
        size = bits_of(name[-1]) // 8
        for i, part in enumerate(self.vector(operands[1])):
            data = np.ascontiguousarray(self.value(part).astype(U64)).view(np.uint8).reshape(-1, 8)
            self.write(self.address(operands[0])[active] + i * size, data[active, :size])

    def _cp(self, name: list[str], operands: list[str], active: Array) -> None:
        if "commit_group" in name:
            self.groups.append(self.copies)
            self.copies = []
        elif "wait_group" in name:
            while len(self.groups) > int(operands[0], 0):
                for to, data in self.groups.pop(0):
                    self.write(to, data)
        else:  # cp.async to, source, size, of which so many bytes are read and the rest is 0
            size = int(operands[2], 0)
            read = self.value(operands[3]).astype(np.int64) if len(operands) > 3 else np.full(self.threads, size)
            data = np.zeros((self.threads, size), np.uint8)
            for length in set(read[active].tolist()) - {0}:
                these = active & (read == length)
                data[these, :length] = self.read(self.address(operands[1])[these], length)
            self.copies.append((self.address(operands[0])[active], data[active]))

    def _mma(self, name: list[str], operands: list[str], active: Array) -> None:
        """mma.m16n8k16 of 16-bit floats with float32 sums: D [16, 8] = A [16, 16] B [16, 8] + C."""
        if "m16n8k16" not in name or name[-1] != "f32":
            raise NotImplementedError("only m16n8k16 of 16-bit floats")
        to, a, b, c = (self.vector(each) for each in operands)
        for first in range(0, self.threads, 32):
            lanes = slice(first, first + 32)
            left, right, sums = np.zeros((16, 16)), np.zeros((16, 8)), np.zeros((16, 8))
            for half in range(2):
                shift = U64(16 * half)
                for part, (row, k) in zip(a, ((0, 0), (8, 0), (0, 8), (8, 8)), strict=True):
                    left[QUAD + row, 2 * IN_QUAD + k + half] = numbers(self.value(part)[lanes] >> shift, name[-3])
                for part, k in zip(b, (0, 8), strict=True):
                    right[2 * IN_QUAD + k + half, QUAD] = numbers(self.value(part)[lanes] >> shift, name[-3])
            corners = ((0, 0), (0, 1), (8, 0), (8, 1))
            for part, (row, column) in zip(c, corners, strict=True):
                sums[QUAD + row, 2 * IN_QUAD + column] = numbers(self.value(part)[lanes], "f32")
            product = left @ right + sums
            for part, (row, column) in zip(to, corners, strict=True):
                raw = np.zeros(self.threads, U64)
                raw[lanes] = registers(product[QUAD + row, 2 * IN_QUAD + column], "f32")
                self.set(part, raw, np.isin(np.arange(self.threads), np.arange(first, first + 32)))

    def _ldmatrix(self, name: list[str], operands: list[str], active: Array) -> None:
        self._matrices(name, self.address(operands[1]), self.vector(operands[0]), store=False)

    def _stmatrix(self, name: list[str], operands: list[str], active: Array) -> None:
        self._matrices(name, self.address(operands[0]), self.vector(operands[1]), store=True)

    def _matrices(self, name: list[str], addresses: Array, parts: list[str], store: bool) -> None:
        """8 x 8 matrices of 16 bits between shared memory, a row per address, and a register a lane each."""
        for i, part in enumerate(parts):
            raw = self.value(part).copy()
            for first in range(0, self.threads, 32):
                rows, lanes = addresses[first + 8 * i : first + 8 * i + 8], slice(first, first + 32)
                matrix = self.read(rows, 16).view(np.uint16)
                if store:
                    halves = raw[lanes].astype(np.uint32).view(np.uint16).reshape(8, 8)
                    matrix = halves.T if "trans" in name else halves
                    self.write(rows, np.ascontiguousarray(matrix).view(np.uint8))
                else:
                    matrix = np.ascontiguousarray(matrix.T if "trans" in name else matrix)
                    raw[lanes] = matrix.view(np.uint32).reshape(-1)
            if not store:
                self.set(part, raw, np.ones(self.threads, bool))

    def _shfl(self, name: list[str], operands: list[str], active: Array) -> None:
        lane, by = np.arange(self.threads), self.value(operands[2]).astype(np.int64)
        source = {"bfly": lane ^ by, "idx": lane // 32 * 32 + (by & 31)}[name[2]]
        self.set(operands[0].partition("|")[0], self.value(operands[1])[source], active)

    def _redux(self, name: list[str], operands: list[str], active: Array) -> None:
        values = numbers(self.value(operands[1]), name[-1]).astype(np.int64).reshape(-1, 32)
        reduced = {"min": values.min, "max": values.max, "add": values.sum}[name[2]](axis=1)
        self.set(operands[0], registers(np.repeat(reduced, 32), name[-1]), active)

    def _atom(self, name: list[str], operands: list[str], active: Array) -> None:
        if "add" not in name or active.sum() != 1:
            raise NotImplementedError("only one thread that adds")
        before = np.zeros(self.threads, U64)
        before[active] = self.read(self.address(operands[1])[active], 4).view(np.uint32)[:, 0]
        after = (before + self.value(operands[2]))[active].astype(np.uint32)
        self.write(self.address(operands[1])[active], after.view(np.uint8).reshape(1, 4))
        self.set(operands[0], before, active)

    def _lop3(self, name: list[str], operands: list[str], active: Array) -> None:
        inputs, table = [self.value(each) for each in operands[1:4]], int(operands[4], 0)
        result = np.zeros(self.threads, U64)
        for case in range(8):
            if table >> case & 1:
                a, b, c = (each if case >> (2 - i) & 1 else ~each for i, each in enumerate(inputs))
                result |= a & b & c
        self.set(operands[0], numbers(result, "b32"), active)

    def _prmt(self, name: list[str], operands: list[str], active: Array) -> None:
        a, b, selector = (self.value(each) for each in operands[1:4])
        both, chosen = self._joined([a, b], 32), []
        for i in range(4):
            which = selector >> U64(4 * i)
            byte = (both >> (U64(8) * (which & U64(7)))) & U64(0xFF)
            sign = (byte >> U64(7)) * U64(0xFF)
            chosen.append(np.where(which & U64(8), sign, byte))
        self.set(operands[0], self._joined(chosen, 8), active)

    def _bfe(self, name: list[str], operands: list[str], active: Array) -> None:
        value, first, length = (self.value(each) for each in operands[1:4])
        field = (numbers(value, "b32") >> first) & ((U64(1) << length) - U64(1))
        if name[-1][0] == "s":
            above = U64(64) - length
            field = registers((field << above).view(np.int64) >> above.astype(np.int64), "b32")
        self.set(operands[0], field, active)

    def _setp(self, name: list[str], operands: list[str], active: Array) -> None:
        a, b = (numbers(self.value(each), name[-1]) for each in operands[1:3])
        unordered = name[1] not in COMPARISONS  # such as geu: also true where one is no number
        result = COMPARISONS[name[1].removesuffix("u")](a, b)
        self.set(operands[0], result | ((a != a) | (b != b)) if unordered else result, active)

    def _selp(self, name: list[str], operands: list[str], active: Array) -> None:
        first, second, which = (self.value(each) for each in operands[1:4])
        self.set(operands[0], np.where(which, first, second), active)

    def _cvt(self, name: list[str], operands: list[str], active: Array) -> None:
        to, source = name[-2:]
        values = [numbers(self.value(each), source) for each in operands[1:]]
        if to.endswith("x2"):  # the first operand is the upper half
            raw = self._joined([registers(each, to[:-2]) for each in reversed(values)], 16)
        else:
            raw = registers(values[0], to)
        self.set(operands[0], raw, active)

    def _arithmetic(self, name: list[str], operands: list[str], active: Array) -> None:
        """Everything that is a function of its operands' numbers."""
        operation, kind = ARITHMETIC.get(name[0]), name[-1]
        if operation is None:
            raise NotImplementedError("unknown instruction")
        inputs = [self.value(each) for each in operands[1:]]
        if kind == "pred":
            self.set(operands[0], operation(*(each.astype(bool) for each in inputs)), active)
        elif kind.endswith("x2"):
            half = kind[:-2]
            parts = [operation(*(numbers(each >> U64(shift), half) for each in inputs)) for shift in (0, 16)]
            self.set(operands[0], self._joined([registers(part, half) for part in parts], 16), active)
        elif "wide" in name or "hi" in name:
            wide = kind[0] + str(2 * bits_of(kind))
            values = [numbers(each, kind).astype(np.int64) for each in inputs[:2]]
            values += [numbers(each, wide).astype(np.int64) for each in inputs[2:]]
            result = operation(*values)
            self.set(operands[0], registers(result >> bits_of(kind) if "hi" in name else result, wide), active)
        else:
            values = [
                numbers(each, "u32" if name[0] in ("shl", "shr") and i else kind) for i, each in enumerate(inputs)
            ]
            self.set(operands[0], registers(operation(*values), kind), active)


def run_kernel(kernel: Any, arguments: list[Any], grid: tuple[int, ...]) -> None:
    """A launch of a compiled kernel; `arguments` without those that were compiled in."""
    memory = Memory(each for each in arguments if isinstance(each, torch.Tensor))
    parameters = [_parameter(each) for each in arguments] + [0, 0]  # the last: scratch memory, which these have none of
    code, labels = parse(kernel.asm["ptx"])
    for index in reversed(list(np.ndindex(*reversed(grid)))) if BACKWARDS else np.ndindex(*reversed(grid)):
        block = Block(
            32 * kernel.metadata.num_warps, kernel.metadata.shared, parameters, memory, tuple(reversed(index))
        )
        block.run(code, labels)


def _parameter(value: Any) -> int:
    if isinstance(value, torch.Tensor):
        return value.data_ptr()
    if isinstance(value, float):
        return struct.unpack("<I", struct.pack("<f", value))[0]
    return int(value) & (2**64 - 1)


def emulate(capability: int = 90) -> None:
    """From now on launches run here. Triton must not interpret: TRITON_INTERPRET is to be 0 before it is imported."""
    pretended: Any = NoDevice(capability)
    driver.set_active(pretended)
    compile_only = JITFunction.run

    def launch(self: Any, *positional: Any, grid: Any = None, warmup: bool = False, **options: Any) -> Any:
        kernel: Any = compile_only(self, *positional, grid=grid, warmup=True, **options)
        values = dict(zip(self.arg_names, positional, strict=False)) | options
        signature = kernel.src.signature
        arguments = [values[name] for name in self.arg_names if signature[name] != "constexpr"]
        run_kernel(kernel, arguments, (*grid, *(1,) * (3 - len(grid))))
        return kernel

    JITFunction.run = launch
