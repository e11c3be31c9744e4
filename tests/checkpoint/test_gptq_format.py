"""Reading GPTQ checkpoints: words written by hand from the format's definition, both versions, orders and whole folders."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from halve import compress, load_model
from halve.checkpoint.gptq_format import read_gptq
from halve.checkpoint.reader import open_checkpoint
from halve.checkpoint.tensors import SafetensorsFolder
from halve.errors import CheckpointError, UnsupportedModelError
from halve.quantization import QuantSpec
from tests.common import TOKENS, logits, relative, their_logits

QUANTIZED = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def signed(word: int) -> int:
    return word - (1 << 32) if word >= 1 << 31 else word


def words(values: list[int], bits: int) -> list[int]:
    """Unsigned codes as one stream of bits, least significant first, in 32-bit words."""
    stream = sum(value << (bits * position) for position, value in enumerate(values))
    return [signed(stream >> shift & 0xFFFFFFFF) for shift in range(0, bits * len(values), 32)]


def pack_columns(codes_IO: torch.Tensor, bits: int) -> torch.Tensor:
    """qweight [I*b/32, O]."""
    return torch.tensor([words(column, bits) for column in codes_IO.t().tolist()], dtype=torch.int32).t().contiguous()


def pack_rows(zeros_GO: torch.Tensor, bits: int) -> torch.Tensor:
    """qzeros [G, O*b/32]."""
    return torch.tensor([words(row, bits) for row in zeros_GO.tolist()], dtype=torch.int32)


def fixture(bits: int, columns: int, rows: int, group: int, version: str, symmetric: bool, shuffle: bool = False):
    """Tensors of one linear as a GPTQ tool writes them, and the weight [O, I] they stand for, from W = s (q - z)."""
    generator = torch.Generator().manual_seed(bits)
    top, groups = 1 << bits, columns // group
    codes = torch.randint(0, top, (columns, rows), generator=generator)
    zeros = torch.full((groups, rows), top // 2)
    if not symmetric:
        zeros = torch.randint(1, top, (groups, rows), generator=generator)
    scales = (torch.rand(groups, rows, generator=generator) + 0.5).half()
    g_idx = torch.arange(columns) // group
    if shuffle:
        g_idx = g_idx[torch.randperm(columns, generator=generator)]
    stored = zeros - 1 if version == "gptq" else zeros
    tensors = {
        "qweight": pack_columns(codes, bits),
        "qzeros": pack_rows(stored, bits),
        "scales": scales,
        "g_idx": g_idx.to(torch.int32),
    }
    return tensors, (scales.float()[g_idx] * (codes - zeros[g_idx])).t()


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("version", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_numbers_are_those_of_the_definition(bits: int, version: str, symmetric: bool, shuffle: bool) -> None:
    tensors, expected = fixture(bits, 64, 32, 16, version, symmetric, shuffle)
    weight = read_gptq(*tensors.values(), QuantSpec(bits, 16, symmetric), version)
    assert torch.equal(weight.dequantize(), expected)
    assert (weight.group_index is not None) == shuffle  # static groups carry no index


def test_words_of_a_symmetric_weight_by_hand() -> None:
    """Inputs 0..7 carry codes 8..15 and zero 8 (stored 7 in v1): the weights are 0..7 times the scale."""
    qweight = torch.tensor([[signed(0xFEDCBA98)]], dtype=torch.int32)
    scales = torch.tensor([[0.5]], dtype=torch.float16)
    for version, word in (("gptq", 0x7), ("gptq_v2", 0x8)):
        qzeros = torch.tensor([[word]], dtype=torch.int32)
        weight = read_gptq(qweight, qzeros, scales, None, QuantSpec(4, -1), version)
        assert weight.dequantize().tolist() == [[0.0, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 3.5]]


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_a_borrowed_zero_point_is_given_back(bits: int) -> None:
    """Zero points 0 turned to v1 by taking 1 off every code of the whole word borrow from their neighbours."""
    count, top = 32 // bits, 1 << bits
    zeros = [0 if position % 2 == 0 else top - 1 for position in range(count)]
    (v2,) = words(zeros, bits)
    ones = sum(1 << (bits * position) for position in range(count))
    v1 = signed((v2 - ones) & 0xFFFFFFFF)
    qweight = torch.zeros(bits, count, dtype=torch.int32)  # 32 inputs, all codes 0: the weight is minus the zero point
    weight = read_gptq(
        qweight,
        torch.tensor([[v1]], dtype=torch.int32),
        torch.ones(1, count, dtype=torch.float16),
        None,
        QuantSpec(bits, -1, symmetric=False),
        "gptq",
    )
    assert weight.dequantize()[:, 0].tolist() == [-float(z) for z in zeros]


@pytest.mark.parametrize(("written", "read"), [("gptq", "gptq_v2"), ("gptq_v2", "gptq")])
def test_the_wrong_version_is_refused(written: str, read: str) -> None:
    tensors, _ = fixture(4, 64, 32, 16, written, symmetric=True)
    with pytest.raises(CheckpointError, match=f"set checkpoint_format in its config to {written}"):
        read_gptq(*tensors.values(), QuantSpec(4, 16), read)


def to_gptq(source: Path, out: Path, version: str, shuffle: bool = False, group: int = 16, **config: object) -> Path:
    """The dense model `source` as a GPTQ folder of random codes, and beside it (out/dense) what these stand for."""
    shutil.copytree(source, out / "dense")
    shutil.copytree(source, out / "gptq")
    dense = load_file(source / "model.safetensors")
    stored: dict[str, torch.Tensor] = {}
    for name, tensor in list(dense.items()):
        if not name.endswith(tuple(f"{role}.weight" for role in QUANTIZED)):
            stored[name] = tensor
            continue
        rows, columns = tensor.shape
        parts, weight = fixture(4, columns, rows, group, version, bool(config["sym"]), shuffle)
        parts["scales"] = parts["scales"] * 0.03
        base = name.removesuffix(".weight")
        stored |= {f"{base}.{part}": value for part, value in parts.items()}
        stored[f"{base}.bias"] = torch.zeros(rows)  # as AutoGPTQ writes it where the model has none
        expected = read_gptq(*parts.values(), QuantSpec(4, group, bool(config["sym"])), version).dequantize()
        assert torch.allclose(expected, weight * 0.03, rtol=1e-2)
        dense[name] = expected
    save_file(stored, out / "gptq" / "model.safetensors", metadata={"format": "pt"})
    save_file(dense, out / "dense" / "model.safetensors", metadata={"format": "pt"})
    raw = json.loads((source / "config.json").read_text())
    raw["quantization_config"] = {
        "quant_method": "gptq",
        "bits": 4,
        "group_size": group,
        "desc_act": shuffle,
        "checkpoint_format": version,
        **config,
    }
    (out / "gptq" / "config.json").write_text(json.dumps(raw))
    return out / "gptq"


@pytest.mark.parametrize(("version", "sym", "shuffle"), [("gptq", True, True), ("gptq_v2", False, False)])
def test_a_folder_made_by_another_tool_loads(make_hf, tmp_path: Path, version: str, sym: bool, shuffle: bool) -> None:
    folder = to_gptq(make_hf("llama"), tmp_path / "made", version, shuffle, sym=sym)
    assert relative(logits(folder), their_logits(tmp_path / "made" / "dense")) < 1e-5


def test_a_gptq_folder_is_a_source_for_compress(make_hf, tmp_path: Path) -> None:
    """What is quantized stays as it is and is written in our form; only the head is left to do."""
    folder = to_gptq(make_hf("llama"), tmp_path / "made", "gptq", sym=False)
    compress(folder, tmp_path / "out", ["rtn:bits=8,targets=Linear|lm_head"])
    with torch.inference_mode():
        before, after = load_model(folder), load_model(tmp_path / "out")
        assert torch.equal(before.hidden(TOKENS), after.hidden(TOKENS))
        assert not torch.equal(before(TOKENS), after(TOKENS))


def test_names_without_prefix_are_read(make_hf, tmp_path: Path) -> None:
    folder = to_gptq(make_hf("llama"), tmp_path / "made", "gptq", sym=True)
    with torch.inference_mode():
        expected = load_model(folder)(TOKENS)
        tensors = load_file(folder / "model.safetensors")
        save_file({k.removeprefix("model."): v for k, v in tensors.items()}, folder / "model.safetensors")
        assert torch.equal(load_model(folder)(TOKENS), expected)


def test_a_mislabelled_folder_is_refused_by_name(make_hf, tmp_path: Path) -> None:
    folder = to_gptq(make_hf("llama"), tmp_path / "made", "gptq_v2", sym=True)
    raw = json.loads((folder / "config.json").read_text())
    raw["quantization_config"]["checkpoint_format"] = "gptq"
    (folder / "config.json").write_text(json.dumps(raw))
    with pytest.raises(CheckpointError, match=r"config\.json: model\.layers\.0\.self_attn\.\w+: .*gptq_v2"):
        load_model(folder)


@pytest.mark.parametrize(
    ("option", "value"), [("dynamic", {"-:.*down_proj": {}}), ("bits", 5), ("checkpoint_format", "marlin")]
)
def test_what_changes_the_numbers_is_refused(make_hf, tmp_path: Path, option: str, value: object) -> None:
    folder = to_gptq(make_hf("llama"), tmp_path / "made", "gptq", sym=True)
    raw = json.loads((folder / "config.json").read_text())
    raw["quantization_config"][option] = value
    (folder / "config.json").write_text(json.dumps(raw))
    with pytest.raises(UnsupportedModelError, match=r"(is|are) not handled"):
        load_model(folder)


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        *(
            (
                "g_idx",
                lambda t, value=value: torch.cat((t[:-1].long(), torch.tensor([value]))),
                f"points to {value}, outside",
            )
            for value in (-1, 2, 10**6, 2 * 10**9, 2**32)
        ),
        ("g_idx", torch.Tensor.float, "torch.float32, it must be torch.int32 or torch.int64"),
        ("g_idx", lambda t: t.repeat(2), "has shape"),
        ("qweight", torch.Tensor.long, "torch.int64, it must be torch.int32"),
        ("qweight", lambda t: t[1:].contiguous(), "has shape"),
        ("qzeros", torch.Tensor.float, "torch.float32, it must be torch.int32"),
        ("qzeros", lambda t: t[:, 1:].contiguous(), "has shape"),
        ("qzeros", lambda t: t[1:].contiguous(), "has shape"),
        ("scales", torch.Tensor.int, "torch.int32, it must be floating"),
        ("scales", lambda t: t[:, 1:].contiguous(), "has shape"),
    ],
)
def test_tensors_that_do_not_fit_are_refused_by_name_on_opening(make_hf, tmp_path: Path, part, change, message) -> None:
    folder = to_gptq(make_hf("llama"), tmp_path / "made", "gptq", sym=True)
    tensors = load_file(folder / "model.safetensors")
    name = f"model.layers.1.self_attn.v_proj.{part}"
    tensors[name] = change(tensors[name])
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=f"'{name}' (is )?{message}"):
        open_checkpoint(folder)


def test_opening_reads_no_weight(make_hf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = to_gptq(make_hf("llama"), tmp_path / "made", "gptq", shuffle=True, sym=False)
    monkeypatch.setattr(
        SafetensorsFolder, "get", lambda self, name, get=SafetensorsFolder.get: (read.append(name), get(self, name))[1]
    )
    read: list[str] = []
    open_checkpoint(folder)
    assert {name.rpartition(".")[2] for name in read} == {"g_idx", "bias"}


def configured(folder: Path, **fields: object) -> Path:
    """Change fields of the folder's quantization_config; ... takes one away."""
    raw = json.loads((folder / "config.json").read_text())
    merged = raw["quantization_config"] | fields
    raw["quantization_config"] = {key: value for key, value in merged.items() if value is not ...}
    (folder / "config.json").write_text(json.dumps(raw))
    return folder


def with_index(folder: Path, index: torch.Tensor | None) -> Path:
    """Give every linear this g_idx, one of as many zeros for an empty one, or none."""
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if name.endswith("g_idx")]:
        columns = tensors.pop(name).numel()
        if index is not None:
            tensors[name] = index if index.numel() else torch.zeros(columns, dtype=torch.int32)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("index", [torch.empty(0), None], ids=["zeros", "none"])
@pytest.mark.parametrize("order", [False, ..., None], ids=["false", "missing", "null"])
def test_an_index_that_was_never_filled_in(make_hf, tmp_path: Path, sym: bool, index, order: object) -> None:
    folder = with_index(to_gptq(make_hf("llama"), tmp_path / "made", "gptq", sym=sym), index)
    configured(folder, desc_act=order)
    assert relative(logits(folder), their_logits(tmp_path / "made" / "dense")) < 1e-5


@pytest.mark.parametrize("index", [torch.empty(0), None], ids=["zeros", "none"])
def test_an_order_that_is_lost_is_refused(make_hf, tmp_path: Path, index) -> None:
    folder = with_index(to_gptq(make_hf("llama"), tmp_path / "made", "gptq", shuffle=True, sym=True), index)
    with pytest.raises(
        CheckpointError, match=r"desc_act is true and 'model.layers.0.self_attn.q_proj.g_idx'.*desc_act to false"
    ):
        load_model(folder)
    load_model(configured(folder, static_groups=True))  # whose groups are runs of columns in any order


@pytest.mark.parametrize(
    "fields",
    [
        {"bits": "4", "group_size": "16"},
        {"checkpoint_format": ...},
        {"checkpoint_format": None},
        {"sym": ...},
        {"quant_method": ...},
        {"quant_method": "GPTQ"},
    ],
)
@pytest.mark.parametrize("sym", [True, False])
def test_fields_that_are_missing_or_odd(make_hf, tmp_path: Path, fields: dict[str, object], sym: bool) -> None:
    folder = to_gptq(make_hf("llama"), tmp_path / "made", "gptq", sym=sym)
    configured(folder, **fields)
    assert relative(logits(folder), their_logits(tmp_path / "made" / "dense")) < 1e-5


def test_a_symmetric_folder_that_says_neither_that_nor_its_version(make_hf, tmp_path: Path) -> None:
    folder = to_gptq(make_hf("llama"), tmp_path / "made", "gptq_v2", sym=True)
    with pytest.raises(CheckpointError, match="set checkpoint_format in its config to gptq_v2"):
        load_model(configured(folder, sym=..., checkpoint_format=...))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"bits": "four"}, "bits='four'"),
        ({"bits": ...}, "bits=None"),
        ({"bits": 4.5}, r"bits=4\.5"),
        ({"group_size": -2}, "group_size=-2"),
        ({"group_size": [16]}, "group_size="),
        ({"sym": "false"}, "sym='false'"),
        ({"desc_act": 1}, "desc_act=1"),
    ],
)
def test_fields_that_mean_nothing(make_hf, tmp_path: Path, fields: dict[str, object], words: str) -> None:
    folder = to_gptq(make_hf("llama"), tmp_path / "made", "gptq", sym=True)
    with pytest.raises(UnsupportedModelError, match=f"config.json: {words}.* is not handled"):
        load_model(configured(folder, **fields))


@pytest.mark.parametrize("size", [-1, 0, None, ..., 8])
def test_a_group_size_that_does_not_fit_the_scales(make_hf, tmp_path: Path, size: object) -> None:
    folder = to_gptq(make_hf("llama"), tmp_path / "made", "gptq", sym=True)
    with pytest.raises(CheckpointError, match=r"group_size=-?\d+ makes \d groups of the 32 inputs of .*q_proj.* has 2"):
        load_model(configured(folder, group_size=size))


def test_layout_of_awq_under_the_name_of_gptq(make_hf, tmp_path: Path) -> None:
    folder = to_gptq(make_hf("llama"), tmp_path / "made", "gptq", sym=True)
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.qweight"
    tensors[name] = torch.zeros(32, 6, dtype=torch.int32)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UnsupportedModelError, match=f"'{name}' is packed along the outputs, which is AWQ's"):
        load_model(folder)


@pytest.mark.parametrize("file", ["model.safetensors", "gptq_model-4bit-16g.safetensors", "llama-4bit.safetensors"])
def test_an_old_folder_with_its_description_in_a_file_of_its_own(make_hf, tmp_path: Path, file: str) -> None:
    folder = with_index(to_gptq(make_hf("llama"), tmp_path / "made", "gptq", sym=True), None)
    expected = logits(folder)
    (folder / "model.safetensors").rename(folder / file)
    raw = json.loads((folder / "config.json").read_text())
    config = {"bits": 4, "group_size": 16, "desc_act": False, "sym": True, "damp_percent": 0.01}
    (folder / "quantize_config.json").write_text(json.dumps(config))
    del raw["quantization_config"]
    (folder / "config.json").write_text(json.dumps(raw))
    assert torch.equal(logits(folder), expected)
    compress(folder, tmp_path / "out", ["rtn:bits=8,targets=lm_head"])
    assert relative(logits(tmp_path / "out"), their_logits(tmp_path / "out")) < 1e-5
    if file != "model.safetensors":
        shutil.copyfile(folder / file, folder / "another.safetensors")
        with pytest.raises(CheckpointError, match=f"there are: another.safetensors, {file}: .*model_file_base_name"):
            load_model(folder)
        config["model_file_base_name"] = file.removesuffix(".safetensors")
        (folder / "quantize_config.json").write_text(json.dumps(config))
        assert torch.equal(logits(folder), expected)
