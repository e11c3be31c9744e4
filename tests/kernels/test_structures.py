"""A library built from other sources than the package is found out when it is loaded, whatever differs."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from halve import kernels
from halve.checkpoint.reader import load_model
from halve.decode.generate import Decoder
from halve.decode.sampling import Sampling
from halve.errors import HalveError, StaleKernelsError
from halve.kernels import cpu, structures
from halve.kernels.structures import FUNCTIONS, STRUCTURES

pytestmark = pytest.mark.skipif(isinstance(cpu.load_library(), str), reason=str(cpu.load_library()))

Fields = list[tuple[str, Any]]


def altered(name: str, change: Callable[[Fields], Fields]) -> type[ctypes.Structure]:
    """A structure of the package with other fields."""
    return type("Altered", (ctypes.Structure,), {"_fields_": change(list(STRUCTURES[name]._fields_))})  # type: ignore[arg-type]


@pytest.fixture
def library() -> ctypes.CDLL:
    """The library, not yet looked at."""
    return ctypes.CDLL(str(cpu.PATH))


@pytest.fixture
def loaded_anew() -> Iterator[None]:
    cpu.load_library.cache_clear()
    yield
    cpu.load_library.cache_clear()


@pytest.mark.parametrize("name", STRUCTURES)
@pytest.mark.parametrize(
    "change",
    [
        lambda fields: [(f"{fields[0][0]}_", fields[0][1]), *fields[1:]],
        lambda fields: [fields[1], fields[0], *fields[2:]],
        lambda fields: fields[:-1],
        lambda fields: [*fields, ("more", ctypes.c_int32)],
    ],
    ids=["renamed", "swapped", "missing", "added"],
)
def test_a_field_that_differs_is_named(
    library: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch, name: str, change: Callable[[Fields], Fields]
) -> None:
    structures.bind(library)
    monkeypatch.setitem(STRUCTURES, name, altered(name, change))
    with pytest.raises(StaleKernelsError, match=rf"of another version than this package \({name}: .*pip install"):
        structures.bind(library)


def test_a_field_of_another_size_is_found_where_the_structure_stays_as_large(
    library: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch
) -> None:
    # model_t ends in eleven numbers of 4 bytes and 4 bytes of padding
    def widen(fields: Fields) -> Fields:
        return [*fields[:-1], (fields[-1][0], ctypes.c_int16)]

    monkeypatch.setitem(STRUCTURES, "model_t", altered("model_t", widen))
    with pytest.raises(StaleKernelsError, match=r"model_t: .*segments"):
        structures.bind(library)


def test_functions_and_constants_are_compared_too(library: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setitem(FUNCTIONS, "halve_cpu_pack", "void(const weight_t *, const void *)")
        with pytest.raises(StaleKernelsError, match="halve_cpu_pack"):
            structures.bind(library)
    monkeypatch.setitem(structures.CONSTANTS, "ROWS", 8)
    with pytest.raises(StaleKernelsError, match="ROWS"):
        structures.bind(library)


def test_a_library_that_declares_nothing_is_of_another_version() -> None:
    with pytest.raises(StaleKernelsError, match="no halve_cpu_declarations"):
        structures.bind(ctypes.CDLL(None))


@pytest.mark.usefixtures("loaded_anew")
def test_torch_runs_in_its_place_and_the_record_says_why(
    make_hf: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(STRUCTURES, "cache_t", altered("cache_t", lambda fields: fields[:-1]))
    folder = make_hf("llama")
    model = load_model(folder)
    assert model.head.kernel == "torch.linear"
    kernel = Decoder(model, [[1]], 8, Sampling()).kernel
    assert kernel.startswith("torch (the compiled kernels are of another version than this package (cache_t: ")
    with pytest.raises(HalveError, match="the compiled kernels are of another version"):
        load_model(folder, backend="cpu")
    with pytest.raises(HalveError, match="the compiled kernels are of another version"):
        kernels.select("cpu", torch.randn(4, 4), torch.float32)
