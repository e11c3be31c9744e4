"""The stored form of a linear: what is planned is what is made, to the byte, and reads back as the same layer."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from halve import compress, load_model
from halve.checkpoint.reader import open_checkpoint
from halve.checkpoint.stored import StoredLinear, to_tensors
from halve.compression.compress import plan_recipe
from halve.compression.edits import keep_inputs, keep_outputs
from halve.compression.recipe import as_steps
from halve.compression.step_run import Request
from halve.errors import CheckpointError
from halve.model.inventory import LinearShape
from halve.model.linear import Linear
from halve.quantization import QuantizedWeight, QuantSpec, quantize

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@st.composite
def compressed(draw: st.DrawFn) -> tuple[Linear, StoredLinear, torch.dtype]:
    """A layer quantized, pruned, both in either order or neither, how that was planned, and the dtype it is written in."""
    dtype = draw(st.sampled_from(DTYPES))
    rows = draw(st.integers(2, 40))
    columns = 16 * draw(st.integers(1, 4))
    spec = QuantSpec(draw(st.sampled_from([2, 3, 4, 8])), draw(st.sampled_from([-1, 8, 16])), draw(st.booleans()))
    shape = LinearShape("block.proj", "proj", 0, rows, columns, draw(st.booleans()))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    bias = torch.randn(rows, generator=generator).to(dtype) if shape.bias else None
    linear = Linear(torch.randn(rows, columns, generator=generator).to(dtype), bias)
    planned = StoredLinear.dense(shape)
    for step in draw(st.permutations(["quantize", "inputs", "outputs"]))[: draw(st.integers(0, 3))]:
        if step == "outputs":
            kept = torch.randperm(rows, generator=generator)[: draw(st.integers(1, rows))].sort().values
            linear, planned = keep_outputs(linear, kept), planned.keeping(outputs=len(kept))
        elif step == "inputs":
            # the first of every eight stays, so that no group loses all its columns
            gone = torch.arange(columns).view(-1, 8)[:, 1 : draw(st.integers(1, 8))]
            kept = torch.tensor(sorted(set(range(columns)) - set(gone.flatten().tolist())))
            linear, planned = keep_inputs(linear, kept), planned.keeping(inputs=len(kept))
        elif spec.divides(planned.kept_in):
            assert isinstance(linear.weight, torch.Tensor)
            linear = linear.replaced(weight=quantize(linear.weight, spec, dtype))
            planned = planned.quantized(spec)
    return linear, planned, dtype


@settings(derandomize=True, deadline=None, max_examples=200)
@given(compressed())
def test_what_is_made_is_what_was_planned(case: tuple[Linear, StoredLinear, torch.dtype]) -> None:
    linear, planned, dtype = case
    tensors = to_tensors("block.proj", linear, dtype)
    made = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    assert made == {f"block.proj.{part}": header for part, header in planned.parts(dtype).items()}
    assert planned.nbytes(dtype) == sum(tensor.nbytes for tensor in tensors.values())
    assert StoredLinear.of(linear, planned.shape).parts(dtype) == planned.parts(dtype)


class MemoryTensors:
    """Tensors in memory, as a file holds them."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        self.tensors = tensors
        self.shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        self.dtypes = {name: tensor.dtype for name, tensor in tensors.items()}

    def get(self, name: str) -> torch.Tensor:
        return self.tensors[name]


@settings(derandomize=True, deadline=None, max_examples=200)
@given(compressed())
def test_what_was_stored_is_found_and_reads_back_as_the_same_layer(
    case: tuple[Linear, StoredLinear, torch.dtype],
) -> None:
    linear, planned, dtype = case
    file = MemoryTensors(to_tensors("block.proj", linear, dtype))
    stored = StoredLinear.from_headers(file, planned.shape, planned.spec, "file")
    stored.check(file, "file")
    assert replace(stored, dtype=None, bias_dtype=None) == planned
    back = stored.to_linear(lambda part: file.get(f"block.proj.{part}"), dtype, "cpu")
    assert torch.equal(back.dense_weight(), linear.dense_weight())
    assert (back.in_features, back.out_features) == (linear.in_features, linear.out_features)
    for ours, theirs in [
        (back.bias, linear.bias),
        (back.input_index, linear.input_index),
        (back.output_index, linear.output_index),
    ]:
        assert torch.equal(ours, theirs) if ours is not None and theirs is not None else ours is theirs
    again = to_tensors("block.proj", back, dtype)
    assert again.keys() == file.tensors.keys()
    assert all(torch.equal(again[name], file.tensors[name]) for name in again)


def test_bytes_by_hand() -> None:
    """40 of 48 outputs, 24 of 32 inputs, 3 bits asymmetric in ragged groups of 16, bias, everything floating 2 bytes."""
    shape = LinearShape("proj", "proj", 0, 48, 32, True)
    stored = StoredLinear(shape, 40, 24, QuantSpec(3, 16, False), 2, True)
    words, scales, zeros = 40 * 3 * 4, 40 * 2 * 2, 4 * 2 * 4  # 72 bits are 3 words, 120 bits are 4
    assert stored.nbytes(torch.bfloat16) == words + scales + zeros + 2 * 8 + 24 * 4 + 48 * 2 + 24 * 4 + 40 * 4


def test_a_group_that_loses_all_its_columns_takes_its_scales_along() -> None:
    shape = LinearShape("proj", "proj", 0, 8, 32, False)
    linear = Linear(quantize(torch.randn(8, 32), QuantSpec(4, 16)))
    kept = keep_inputs(linear, torch.arange(10))
    planned = StoredLinear.dense(shape).quantized(QuantSpec(4, 16)).keeping(inputs=10)
    assert planned.nbytes(torch.float32) - StoredLinear.of(kept, shape).nbytes(torch.float32) == 8 * 4


def test_scales_of_another_dtype_are_counted_as_they_are(make_hf, tmp_path: Path) -> None:
    """A folder whose scales are float32, written on in bfloat16: what is quantized already stays as it is."""
    folder = tmp_path / "rounded"
    compress(make_hf("llama"), folder, ["rtn:bits=4,group_size=16,ignore=*down_proj"])
    result = compress(folder, tmp_path / "out", ["rtn:bits=8,targets=*down_proj"], dtype=torch.bfloat16)
    stored = sum(t.nbytes for path in (tmp_path / "out").glob("*.safetensors") for t in load_file(path).values())
    assert result.plan.bytes_after == stored
    plan = plan_recipe(Request(str(tmp_path / "out"), tmp_path / "again", as_steps(["l1-outputs"])))
    assert plan.bytes_before == stored


def break_tensor(folder: Path, part: str, change) -> str:
    """Change one tensor of a compressed folder; returns its name."""
    for path in sorted(folder.glob("*.safetensors")):
        tensors = load_file(path)
        for name in sorted(tensors):
            if name.endswith(part):
                tensors[name] = change(tensors[name])
                save_file(tensors, path, metadata={"format": "pt"})
                return name
    raise AssertionError(part)


@pytest.fixture(scope="module")
def ragged(make_hf, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ragged") / "model"
    steps = ["rtn:bits=4,group_size=16,symmetric=false", "l1-inputs:fraction=0.3", "l1-outputs:fraction=0.2"]
    compress(make_hf("llama"), folder, steps)
    return folder


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("weight_packed", torch.Tensor.float, "torch.float32, it must be torch.int32"),
        ("weight_packed", torch.Tensor.long, "torch.int64, it must be torch.int32"),
        ("weight_zero_point", lambda t: t.to(torch.int8), "torch.int8, it must be torch.int32"),
        ("weight_scale", torch.Tensor.int, "torch.int32, it must be floating"),
        ("kept_inputs", torch.Tensor.float, "torch.float32, it must be torch.int32"),
        ("kept_outputs", lambda t: t.to(torch.uint8), "torch.uint8, it must be torch.int32 or torch.int64"),
        ("group_index", lambda t: t.to(torch.int8), "torch.int8, it must be torch.int32 or torch.int64"),
        ("weight_shape", torch.Tensor.float, "torch.float32, it must be torch.int32 or torch.int64"),
        ("weight_shape", lambda t: torch.cat((t, t)), "has shape .* the config asks for"),
        ("q_proj.weight_packed", lambda t: t[:, :-1].contiguous(), "has shape .* the config asks for"),
        ("weight_scale", lambda t: t.flatten(), "has shape .* the config asks for"),
        ("group_index", lambda t: t[:-1].contiguous(), "has shape .* the config asks for"),
        ("kept_inputs", lambda t: t.view(1, -1), "has shape .* the config asks for"),
        ("kept_outputs", lambda t: torch.arange(64, dtype=torch.int32), "keeps 64 of 32 channels"),
    ],
)
def test_headers_that_do_not_fit_are_refused_by_name(ragged: Path, tmp_path: Path, part, change, message) -> None:
    folder = Path(shutil.copytree(ragged, tmp_path / "model"))
    name = break_tensor(folder, part, change)
    with pytest.raises(CheckpointError, match=f"'{name}' .*{message}"):
        open_checkpoint(folder)


def with_value(value: int, place: int = -1):
    """A change: one value of an index becomes another."""

    def change(index: torch.Tensor) -> torch.Tensor:
        index = index.long() if abs(value) >= 2**31 else index.clone()
        index[place] = value
        return index

    return change


def repeated(index: torch.Tensor) -> torch.Tensor:
    index = index.clone()
    index[3] = index[2]
    return index


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        *(
            (part, with_value(value), f"points to {value}, outside of 0 to")
            for part in ("kept_inputs", "kept_outputs", "group_index")
            for value in (-1, 10**6, 2 * 10**9, 2**32, -(2**40))
        ),
        # one too far: down_proj writes 32 outputs; k_proj reads 32; of 48 inputs in groups of 16 there are groups 0 to 2
        ("down_proj.kept_outputs", with_value(32), "points to 32, outside of 0 to 31"),
        ("k_proj.kept_inputs", with_value(32), "points to 32, outside of 0 to 31"),
        ("down_proj.group_index", with_value(3), "points to 3, outside of 0 to 2"),
        ("kept_inputs", repeated, r"is not ascending, it names (\d+) and then \1:"),
        ("kept_outputs", repeated, r"is not ascending, it names (\d+) and then \1:"),
        ("kept_inputs", lambda t: t.flip(0).contiguous(), "is not ascending"),
        ("kept_outputs", lambda t: t.roll(1), "is not ascending"),
        ("weight_shape", lambda t: t + 1, r"is \[.*, the weight is \["),
        ("weight_shape", lambda t: t * -1, r"is \[.*, the weight is \["),
        ("down_proj.weight_shape", lambda t: t.flip(0).contiguous(), r"is \[.*, the weight is \["),
    ],
)
def test_values_that_do_not_fit_are_refused_by_name_on_opening(
    ragged: Path, tmp_path: Path, part: str, change, message: str
) -> None:
    folder = Path(shutil.copytree(ragged, tmp_path / "model"))
    name = break_tensor(folder, part, change)
    with pytest.raises(CheckpointError, match=f"{folder}: '{name}' {message}"):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    ("beside", "part"), [("q_proj.weight_packed", "weight"), ("embed_tokens.weight", "group_index")]
)
def test_a_part_that_the_others_leave_no_room_for_is_refused(
    ragged: Path, tmp_path: Path, beside: str, part: str
) -> None:
    """Dense and packed at once; groups of a dense head."""
    folder = Path(shutil.copytree(ragged, tmp_path / "model"))
    name = break_tensor(folder, beside, lambda t: t)
    extra = f"{name.removesuffix('.weight_packed')}.{part}" if part == "weight" else f"lm_head.{part}"
    for path in folder.glob("*.safetensors"):
        tensors = load_file(path)
        if name in tensors:
            save_file(tensors | {extra: torch.zeros(32, 32)}, path, metadata={"format": "pt"})
    index = folder / "model.safetensors.index.json"
    listed = json.loads(index.read_text())
    listed["weight_map"][extra] = listed["weight_map"][name]
    index.write_text(json.dumps(listed))
    with pytest.raises(CheckpointError, match=f"'{extra}' contradicts the config or the layer's other"):
        open_checkpoint(folder)


def test_an_index_of_64_bits_is_read(ragged: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(ragged, tmp_path / "model"))
    break_tensor(folder, "kept_inputs", torch.Tensor.long)
    tokens = torch.arange(9).unsqueeze(0)
    with torch.inference_mode():
        assert torch.equal(load_model(folder)(tokens), load_model(ragged)(tokens))


def test_a_dense_linear_that_a_scheme_names_is_dense(make_hf, tmp_path: Path) -> None:
    """A config may name a linear that the writer left alone."""
    folder = tmp_path / "model"
    compress(make_hf("llama"), folder, ["rtn:bits=8,ignore=*down_proj"])
    checkpoint = open_checkpoint(folder)
    shape = next(s for s in checkpoint.linear_shapes() if s.role == "down_proj")
    checkpoint.schemes[shape.name] = QuantSpec(8, -1)
    assert checkpoint.stored(shape) == StoredLinear.dense(shape, torch.float32)
    assert not isinstance(checkpoint.linear(shape, torch.float32).weight, QuantizedWeight)
