"""A model as a GGUF file: read back it is the same model, and what a file cannot say is refused before it is begun."""

from __future__ import annotations

import json
import os
import random
import shutil
import sys
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from safetensors.torch import load_file, save_file

from halve import compress, convert, export, load_model
from halve.checkpoint import gguf_export
from halve.checkpoint.gguf import open_gguf
from halve.checkpoint.gguf_plan import linear_shapes
from halve.checkpoint.reader import open_checkpoint
from halve.checkpoint.tensors import SafetensorsFolder, read_json
from halve.checkpoint.tokenizer import Tokenizer
from halve.cli.app import main
from halve.errors import CheckpointError, HalveError, OutputError, RecipeError
from tests.checkpoint.test_gguf import GEMMA, GEMMA_ROPES, LINEAR, MODELS, WIDE, state_of
from tests.common import TOKENS, logits, relative, their_logits

MISTRAL = WIDE | {"sliding_window": None}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 32.0, "low_freq_factor": 1.0}
LLAMA3 |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
WRITTEN: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name.split("-")[0], options) for name, options in MODELS.items() if not name.startswith("phi3-")},
    "mistral": ("mistral", MISTRAL),
    "llama-linear": ("llama", WIDE | {"rope_parameters": LINEAR}),
    "llama-3": ("llama", WIDE | {"head_dim": 64, "rope_parameters": LLAMA3, "max_position_embeddings": 131072}),
    "gemma2-caps": ("gemma2", GEMMA | {"attn_logit_softcapping": 0.8, "final_logit_softcapping": 5.0}),
    "gemma3-ropes": (
        "gemma3_text",
        GEMMA | {"rope_parameters": GEMMA_ROPES, "final_logit_softcapping": 5.0, "num_hidden_layers": 4},
    ),
    # windows that are not every so many layers
    "gemma3-windows": (
        "gemma3_text",
        GEMMA | {"layer_types": ["sliding_attention", "full_attention", "full_attention"]},
    ),
    "gemma3-period": (
        "gemma3_text",
        GEMMA | {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    ),
}


@pytest.fixture(scope="module")
def make_model(make_hf):
    made: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in made:
            kind, options = WRITTEN[name]
            made[name] = make_hf(kind, **options)
        return made[name]

    return make


def fields_of(file: Path) -> dict[str, Any]:
    return {key: field.contents() for key, field in gguf.GGUFReader(file).fields.items()}


def types_of(file: Path) -> dict[str, str]:
    return {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(file).tensors}


@pytest.mark.parametrize("name", WRITTEN)
def test_read_back_it_is_the_same_model(name: str, make_model, tmp_path: Path) -> None:
    """In float32: weights to the last bit, but Gemma's norms, which lose half a step of float32 where they are near -1."""
    folder = make_model(name)
    export(folder, tmp_path / "m.gguf", to="gguf")
    convert(tmp_path / "m.gguf", tmp_path / "out", dtype=torch.float32)
    ours, again = open_checkpoint(folder), open_checkpoint(tmp_path / "out")
    for key in ours.tensors.shapes:
        if key != "lm_head.weight" or not ours.config.tied:
            difference = (ours.tensor(key) - again.tensor(key)).abs().max()
            assert difference <= (2.0**-23 if name.startswith("gemma") and key.endswith("norm.weight") else 0), key
    assert relative(logits(tmp_path / "out"), their_logits(folder)) < 1e-5


def test_a_tied_table_is_written_once(make_hf, tmp_path: Path) -> None:
    """Its codes and scales (bfloat16, which float16 holds) as they are, as the embedding; the head is no tensor."""
    steps = ["rtn:bits=4,group_size=32", "rtn:bits=8,group_size=32,targets=Embedding"]
    source = make_hf("llama", **WIDE, tie_word_embeddings=True)
    out = compress(source, tmp_path / "out", steps, dtype=torch.bfloat16).out
    export(out, tmp_path / "m.gguf", to="gguf")
    types = types_of(tmp_path / "m.gguf")
    assert types["token_embd.weight"] == "Q8_0" and "output.weight" not in types
    convert(tmp_path / "m.gguf", tmp_path / "back", dtype=torch.float32)
    with torch.inference_mode():
        back, ours = (load_model(folder, dtype=torch.float32)(TOKENS) for folder in (tmp_path / "back", out))
    assert relative(back, ours) < 1e-5


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "gemma2", "gemma3_text"])
def test_transformers_reads_the_same_tensors(name: str, make_model, tmp_path: Path) -> None:
    folder = make_model(name)
    export(folder, tmp_path / "m.gguf", to="gguf")
    theirs, ours = state_of(tmp_path / "m.gguf", folder), load_file(folder / "model.safetensors")
    assert ours.keys() == theirs.keys()
    for key, tensor in ours.items():
        torch.testing.assert_close(theirs[key], tensor, rtol=0, atol=2.0**-23 if name.startswith("gemma") else 0)


def quantized(folder: Path, out: Path, *steps: str, dtype: torch.dtype | None = torch.bfloat16) -> Path:
    compress(folder, out, list(steps), dtype=dtype)
    return out


def check_codes(folder: Path, file: Path, out: Path) -> None:
    """Every linear of the file is what the folder's codes stand for, to the last bit; with zero points, to half a step of
    float16 in m, which is at most 15 scales and 2 for each of its neighbours."""
    convert(file, out, dtype=torch.float32)
    ours, again = open_checkpoint(folder), open_checkpoint(out)
    for shape in linear_shapes(ours):
        wanted = ours.linear(shape, torch.float32).dense_weight(torch.float32)
        found = again.linear(shape, torch.float32).dense_weight(torch.float32)
        spec = ours.schemes.get(shape.name)
        allowed = torch.zeros(())
        if spec is not None and not spec.symmetric:
            allowed = ours.tensor(f"{shape.name}.weight_scale").float().max() * 16 * 2.0**-11
        assert ((found - wanted).abs() <= allowed).all(), shape.name


CODES = {
    "rtn:bits=4,group_size=32": "Q4_0",
    "rtn:bits=4,group_size=-1": "Q4_0",
    "rtn:bits=3,group_size=32": "Q4_0",
    "rtn:bits=2,group_size=32": "Q4_0",
    "rtn:bits=8": "Q8_0",
    "rtn:bits=8,group_size=32": "Q8_0",
    "rtn:bits=4,group_size=32,symmetric=false": "Q4_1",
    "rtn:bits=2,group_size=-1,symmetric=false": "Q4_1",
}


@pytest.mark.parametrize("step", CODES)
@pytest.mark.parametrize("name", ["llama-biases", "gemma3_text"])
def test_codes_are_not_rounded_again(name: str, step: str, make_model, tmp_path: Path) -> None:
    folder, file = quantized(make_model(name), tmp_path / "q", step), tmp_path / "m.gguf"
    made = export(folder, file, to="gguf")
    assert types_of(file)["blk.1.ffn_down.weight"] == CODES[step] and made.nbytes == file.stat().st_size
    assert made.rounding.startswith("codes ") and fields_of(file)["halve.rounding"] == made.rounding
    check_codes(folder, file, tmp_path / "out")


@pytest.mark.parametrize("seed", range(8))
def test_any_scheme_and_width(seed: int, make_hf, tmp_path: Path) -> None:
    """Per channel or by groups, with zero points or not, the head too, and some linears in another scheme or none."""
    rng = random.Random(seed)
    hidden, width = 64 * rng.randint(1, 3), 32 * rng.randint(1, 7)
    kind = rng.choice(["llama", "qwen3", "gemma2"])
    options = dict(GEMMA if kind == "gemma2" else {"head_dim": 32})
    folder = make_hf(kind, seed=seed, **options | {"hidden_size": hidden, "intermediate_size": width})
    steps = [
        f"rtn:bits={rng.choice([2, 3, 4])},group_size={rng.choice([-1, 32])},symmetric={rng.choice(['true', 'false'])},"
        f"targets={rng.choice(['q_proj|k_proj|v_proj', 'gate_proj|up_proj', 'down_proj'])}",
        f"rtn:bits=8,group_size={rng.choice([-1, 32])},targets=o_proj",
    ]
    if rng.random() < 0.5:
        steps.append("rtn:bits=8,targets=lm_head")
    q = quantized(folder, tmp_path / "q", *steps)
    export(q, tmp_path / "m.gguf", to="gguf")
    check_codes(q, tmp_path / "m.gguf", tmp_path / "out")


def test_scales_that_float16_does_not_hold_are_said(make_model, tmp_path: Path) -> None:
    """Those of a float32 model; a scale moves by 2^-11 of itself at most."""
    q = quantized(make_model("llama"), tmp_path / "q", "rtn:bits=8,group_size=32", dtype=None)
    made = export(q, tmp_path / "m.gguf", to="gguf")
    assert "scales rounded to float16, by 0.05 % at most" in made.rounding
    convert(tmp_path / "m.gguf", tmp_path / "out", dtype=torch.float32)
    ours, again = open_checkpoint(q), open_checkpoint(tmp_path / "out")
    for shape in ours.linear_shapes():
        wanted = ours.linear(shape, torch.float32).dense_weight(torch.float32)
        found = again.linear(shape, torch.float32).dense_weight(torch.float32)
        assert ((found - wanted).abs() <= wanted.abs() * 2.0**-11 * (1 + 2.0**-20)).all()


def test_codes_of_an_activation_order(assets: Path, tmp_path: Path) -> None:
    """GPTQ takes columns by their size and leaves them where they were."""
    step = "gptq:bits=4,group_size=32,ignore=down_proj"
    text = assets / "data" / "tinystories_317.txt"
    q = tmp_path / "q"
    compress(
        assets / "models" / "stories260K", q, [step], calibration=str(text), samples=4, window=64, dtype=torch.bfloat16
    )
    export(q, tmp_path / "m.gguf", to="gguf")
    check_codes(q, tmp_path / "m.gguf", tmp_path / "out")
    lines = text.read_text()[:5000].replace("<|endoftext|>", "").strip()
    assert Tokenizer(q).encode(lines, bos=True) == Tokenizer(tmp_path / "out").encode(lines, bos=True)


def test_the_dtype_of_dense_weights(make_model, tmp_path: Path) -> None:
    folder = make_model("llama")
    kinds = {None: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
    for dtype, kind in kinds.items():
        export(folder, tmp_path / "m.gguf", to="gguf", dtype=dtype, overwrite=True)
        stored = types_of(tmp_path / "m.gguf")
        assert {stored["token_embd.weight"], stored["blk.0.attn_q.weight"]} == {kind}
        assert {stored["blk.0.attn_norm.weight"], stored["output_norm.weight"]} == {"F32"}


PRUNED = {
    "drop-layers:layers=1": ("llama", 2, [48 * 2] * 2),
    "prune-mlp:fraction=0.3,score=l1,refit=false,multiple_of=32": ("llama", 3, [64] * 3),
    "prune-heads:fraction=0.5,score=l1,refit=false": ("llama", 3, [96] * 3),
    "prune-mlp:widths=32|64|96,score=l1,refit=false,multiple_of=32": ("deci", 3, [32, 64, 96]),
    "drop-attention:layers=1": ("deci", 3, [96] * 3),
}


@pytest.mark.parametrize("step", PRUNED)
@pytest.mark.parametrize("bits", [None, 8])
def test_pruned_models(step: str, bits: int | None, make_model, tmp_path: Path) -> None:
    name, layers, widths = PRUNED[step]
    steps = [step, *([f"rtn:bits={bits}"] if bits else [])]
    q = quantized(make_model("llama"), tmp_path / "q", *steps)
    export(q, tmp_path / "m.gguf", to="gguf")
    fields = fields_of(tmp_path / "m.gguf")
    assert fields["general.architecture"] == name and fields[f"{name}.block_count"] == layers
    found = fields[f"{name}.feed_forward_length"]
    assert (found if isinstance(found, list) else [found] * layers) == widths
    check_codes(q, tmp_path / "m.gguf", tmp_path / "out")
    assert open_checkpoint(tmp_path / "out").config.layers == open_checkpoint(q).config.layers


def test_ragged_groups_that_end_with_blocks_are_kept(make_hf, tmp_path: Path) -> None:
    """Columns went by whole blocks: every block still has one scale."""
    folder = make_hf("llama", **WIDE | {"intermediate_size": 128})
    q = quantized(folder, tmp_path / "q", "rtn:bits=4,group_size=32,targets=down_proj")
    tensors, config = load_shards(q), read_json(q / "config.json")
    kept = torch.cat([torch.arange(0, 32), torch.arange(64, 128)])
    for layer in range(3):
        name = f"model.layers.{layer}.mlp"
        for linear in ("gate_proj", "up_proj"):
            tensors[f"{name}.{linear}.weight"] = tensors[f"{name}.{linear}.weight"][kept]
        down = f"{name}.down_proj"
        tensors[f"{down}.weight_packed"] = tensors[f"{down}.weight_packed"][:, torch.arange(16) // 4 != 1]
        tensors[f"{down}.weight_shape"] = torch.tensor([64, 96])
        tensors[f"{down}.group_index"] = (kept // 32).to(torch.int32)
    config |= {"model_type": "halve", "halve_model_type": "llama"}
    config["halve_layers"] = [{"num_heads": 4, "num_kv_heads": 2, "intermediate_size": 96}] * 3
    ragged = tmp_path / "ragged"
    ragged.mkdir()
    save_file({key: value.contiguous() for key, value in tensors.items()}, ragged / "model.safetensors")
    (ragged / "config.json").write_text(json.dumps(config))
    export(ragged, tmp_path / "m.gguf", to="gguf")
    assert types_of(tmp_path / "m.gguf")["blk.0.ffn_down.weight"] == "Q4_0"
    check_codes(ragged, tmp_path / "m.gguf", tmp_path / "out")


def load_shards(folder: Path) -> dict[str, torch.Tensor]:
    return {key: value for shard in folder.glob("*.safetensors") for key, value in load_file(shard).items()}


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_rounded_again_where_it_is_asked_for(kind: str, make_model, tmp_path: Path) -> None:
    """The numbers that codes stand for, in the blocks that the gguf package makes of them; channels that went are zeros."""
    q = quantized(
        make_model("qwen3"), tmp_path / "q", "rtn:bits=4,group_size=16", "l1-inputs:fraction=0.25,targets=o_proj"
    )
    made = export(q, tmp_path / "m.gguf", to="gguf", requantize=kind)
    assert made.rounding == f"21 linears rounded again to {kind}"
    read, ours = gguf.GGUFReader(tmp_path / "m.gguf"), open_checkpoint(q)
    shapes = {shape.name: shape for shape in ours.linear_shapes()}
    for tensor in read.tensors:
        for ours_name, theirs in (("self_attn.o_proj", "attn_output"), ("mlp.down_proj", "ffn_down")):
            if tensor.name == f"blk.1.{theirs}.weight":
                linear = ours.linear(shapes[f"model.layers.1.{ours_name}"], torch.float32)
                full = torch.zeros(linear.out_features, linear.in_features)
                columns = torch.arange(linear.in_features) if linear.input_index is None else linear.input_index
                full[:, columns] = linear.dense_weight(torch.float32)
                stored = gguf.GGMLQuantizationType[kind]
                assert tensor.data.tobytes() == gguf.quants.quantize(full.numpy(), stored).tobytes()


def test_rows_that_went_are_zeros(make_model, tmp_path: Path) -> None:
    q = quantized(make_model("qwen3"), tmp_path / "q", "l1-outputs:fraction=0.1,targets=q_proj|down_proj", dtype=None)
    export(q, tmp_path / "m.gguf", to="gguf", requantize="F32")
    convert(tmp_path / "m.gguf", tmp_path / "out", dtype=torch.float32)
    assert relative(logits(tmp_path / "out"), logits(q)) < 1e-6


def test_rounding_again_is_for_what_has_no_place(make_model, tmp_path: Path) -> None:
    """The rest keeps its codes; a width that blocks do not divide takes another type."""
    q = quantized(
        make_model("llama"), tmp_path / "q", "rtn:bits=4,group_size=32,targets=q_proj", "rtn:bits=4,group_size=16"
    )
    made = export(q, tmp_path / "m.gguf", to="gguf", requantize="Q8_0")
    types = types_of(tmp_path / "m.gguf")
    assert types["blk.0.attn_q.weight"] == "Q4_0" and types["blk.0.attn_k.weight"] == "Q8_0"
    assert "18 linears rounded again to Q8_0; codes and scales as they were" in made.rounding
    odd = quantized(
        make_model("llama"),
        tmp_path / "odd",
        "prune-mlp:fraction=0.1,score=l1,refit=false,multiple_of=1",
        "rtn:bits=4,group_size=-1",
    )
    with pytest.raises(RecipeError, match="has 86 inputs, and Q8_0 is in blocks of 32: use --requantize F16 or BF16"):
        export(odd, tmp_path / "odd.gguf", to="gguf", requantize="Q8_0")
    export(odd, tmp_path / "odd.gguf", to="gguf", requantize="F16")
    with pytest.raises(HalveError, match="--requantize 'Q3_K' is not known: use one of F32, F16, BF16, Q4_0"):
        export(odd, tmp_path / "other.gguf", to="gguf", requantize="Q3_K")


def test_the_package_that_is_missing_is_named(make_model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Codes as they are need none."""
    q = quantized(make_model("llama"), tmp_path / "q", "rtn:bits=4,group_size=32")
    monkeypatch.setitem(sys.modules, "gguf", None)
    monkeypatch.setitem(sys.modules, "gguf.quants", None)
    export(q, tmp_path / "m.gguf", to="gguf", requantize="F16")
    with pytest.raises(HalveError, match=r"--requantize Q4_0 takes a package more: pip install 'halve\[gguf\]'"):
        export(q, tmp_path / "n.gguf", to="gguf", requantize="Q4_0")


def test_runs_of_rows_make_the_same_file(make_model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    q = quantized(make_model("llama-biases"), tmp_path / "q", "rtn:bits=4,group_size=32,targets=q_proj|down_proj")
    export(q, tmp_path / "whole.gguf", to="gguf")
    monkeypatch.setattr(gguf_export, "_CHUNK_VALUES", 200)
    export(q, tmp_path / "parts.gguf", to="gguf")
    assert (tmp_path / "whole.gguf").read_bytes() == (tmp_path / "parts.gguf").read_bytes()


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (float("nan"), "NaN or infinite values"),
        (float("inf"), "NaN or infinite values"),
        (1e5, "holds 99840 and a scale of GGUF ends at 65,504: use --requantize BF16"),
        (1e-30, "those of GGUF keep their digits from 6.1e-05 on"),
    ],
)
def test_a_scale_that_is_none_leaves_nothing(value: float, words: str, make_model, tmp_path: Path) -> None:
    q = quantized(make_model("llama"), tmp_path / "q", "rtn:bits=8,targets=v_proj")
    shard = next(
        file for file in q.glob("*.safetensors") if any("layers.1.self_attn.v" in key for key in load_file(file))
    )
    tensors = load_file(shard)
    tensors["model.layers.1.self_attn.v_proj.weight_scale"].fill_(value)
    save_file(tensors, shard, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=words) as error:
        export(q, tmp_path / "m.gguf", to="gguf")
    assert "layers.1.self_attn.v_proj" in str(error.value) and "\n" not in str(error.value)
    assert not [path for path in tmp_path.iterdir() if path != q]


def test_a_weight_that_float16_does_not_hold_leaves_nothing(make_hf, tmp_path: Path) -> None:
    folder = make_hf("llama", **WIDE)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.2.mlp.down_proj.weight"][3, 4] = 1e5
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"layers.2.mlp.down_proj holds 100000 and float16 ends at 65504"):
        export(folder, tmp_path / "m.gguf", to="gguf", dtype=torch.float16)
    assert not list(tmp_path.iterdir())


def test_a_full_disk_leaves_nothing(make_model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
        with pytest.raises(OutputError, match="the disk has 1,000 bytes free and this needs"):
            export(make_model("llama"), tmp_path / "m.gguf", to="gguf")

    def fill(path: Path, header: bytes, tensors: Any) -> None:
        path.write_bytes(header)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(gguf_export, "write_file", fill)
    with pytest.raises(OutputError, match=r"m\.gguf cannot be written \(No space left on device\)"):
        export(make_model("llama"), tmp_path / "m.gguf", to="gguf")
    assert not list(tmp_path.iterdir())


def test_what_is_there_stays(make_model, tmp_path: Path) -> None:
    folder, file = make_model("llama"), tmp_path / "m.gguf"
    file.write_bytes(b"GGUF of somebody")
    with pytest.raises(OutputError, match="exists: name another file, or replace it with --overwrite"):
        export(folder, file, to="gguf")
    export(folder, file, to="gguf", overwrite=True)
    whole = file.read_bytes()
    for name, content in (("notes.txt", b"mine"), ("model.safetensors", b"\0" * 9)):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(OutputError, match="is not a GGUF file"):
            export(folder, tmp_path / name, to="gguf", overwrite=True)
        assert (tmp_path / name).read_bytes() == content
    os.mkfifo(tmp_path / "pipe")
    for name, words in (("pipe", "pipe or a device"), (".", "is a folder"), ("none/m.gguf", "there is no folder")):
        with pytest.raises(OutputError, match=words):
            export(folder, tmp_path / name, to="gguf", overwrite=True)
    (tmp_path / "empty").touch()
    export(folder, tmp_path / "empty", to="gguf")
    assert (tmp_path / "empty").read_bytes() == whole  # and equal runs give equal bytes


def test_the_command(
    make_model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    q, file = quantized(make_model("qwen2"), tmp_path / "q", "rtn:bits=4,group_size=32"), tmp_path / "m.gguf"

    def run(*arguments: str) -> Any:
        monkeypatch.setattr(sys, "argv", ["halve", "export", str(q), str(file), *arguments])
        with pytest.raises(SystemExit) as stop:
            main()
        return stop.value.code

    assert run("--to", "onnx") == 2 and "--to 'onnx' is not known: use gguf" in capsys.readouterr().err
    assert run("--to", "gguf", "--dtype", "fp8") == 2 and "use bf16, fp32 or fp16" in capsys.readouterr().err
    assert not run("--to", "gguf", "--dtype", "fp16")
    assert "tensors: 1 F16, 21 Q4_0; codes and scales as they were" in " ".join(capsys.readouterr().out.split())
    assert json.loads(fields_of(file)["halve.recipe"])[0]["step"] == "rtn"
    assert open_gguf(file, torch.float32)[0].config.tied


def test_gemma_3_270m(tmp_path: Path) -> None:
    """A real model and its vocabulary of 262,144 tokens: to a file and back."""
    if not (place := os.environ.get("HALVE_TEST_GEMMA")):
        pytest.skip("HALVE_TEST_GEMMA is not set: no folder with gemma-3-270m.gguf")
    folder = convert(Path(place) / "gemma-3-270m.gguf", tmp_path / "in")
    export(folder, tmp_path / "m.gguf", to="gguf")
    out = convert(tmp_path / "m.gguf", tmp_path / "out")
    ours, again = SafetensorsFolder(folder), SafetensorsFolder(out)
    assert ours.shapes == again.shapes
    assert all(torch.equal(ours.get(name), again.get(name)) for name in ours.shapes)
    first, second = Tokenizer(folder), Tokenizer(out)
    for line in ("The quick brown fox", "  two spaces\n\n\ttab 12345", "Ünïcode 中文 🙂 <bos> x"):
        assert first.encode(line, bos=True) == second.encode(line, bos=True)
