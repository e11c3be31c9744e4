"""A GGUF file becomes the model it was made from, as transformers reads it, and a hostile one a line of an error."""

from __future__ import annotations

import json
import os
import random
import struct
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from halve.checkpoint.convert import convert
from halve.checkpoint.gguf import open_gguf, read_rows
from halve.checkpoint.gguf_header import TYPES, read_header
from halve.checkpoint.tensors import SafetensorsFolder, read_json
from halve.checkpoint.tokenizer import Tokenizer
from halve.cli.app import main
from halve.errors import CheckpointError, HalveError, UnsupportedModelError
from tests.common import GRANITE, logits, relative, their_logits
from tests.ggufs import ARRAY, TEXT, header, info, number, text, write_gguf

WIDE: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96}
GEMMA = WIDE | {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32, "query_pre_attn_scalar": 32}
GEMMA |= {"sliding_window": 5, "tie_word_embeddings": True}
LONGROPE = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0, 1.25] * 4, "long_factor": [1.1, 4.7] * 4}
PARTIAL = LONGROPE | {"partial_rotary_factor": 0.75, "short_factor": [1.0, 1.25] * 3, "long_factor": [1.1, 4.7] * 3}
PHI3: dict[str, Any] = WIDE | {"pad_token_id": 0, "rope_parameters": LONGROPE, "original_max_position_embeddings": 16}
MODELS: dict[str, dict[str, Any]] = {
    "llama": WIDE,
    "llama-biases": WIDE | {"attention_bias": True, "mlp_bias": True, "head_dim": 32},
    "qwen2": WIDE | {"tie_word_embeddings": True},
    "qwen3": WIDE | {"head_dim": 32},
    "gemma2": GEMMA,
    "gemma3_text": GEMMA | {"num_hidden_layers": 7},
    "phi3": WIDE | {"pad_token_id": 0},
    "phi3-longrope": PHI3,
    "phi3-partial": PHI3 | {"rope_parameters": PARTIAL},
    "granite": WIDE | GRANITE,
    "smollm3": WIDE | {"num_hidden_layers": 5, "pad_token_id": 0, "tie_word_embeddings": True},
    "olmo2": WIDE,
    "gemma": WIDE | {"head_dim": 32, "pad_token_id": 0},
}


@pytest.fixture(scope="module")
def make_model(make_hf):
    made: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in made:
            made[name] = make_hf(name.split("-")[0], **MODELS[name])
        return made[name]

    return make


def state_of(file: Path, folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of a GGUF file as transformers reads them; `folder`: with the model's config."""
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    return load_gguf_checkpoint(file, return_tensors=True, model_to_load=model)["tensors"]


@pytest.mark.parametrize("name", MODELS)
def test_the_model_it_was_made_from(name: str, make_model, tmp_path: Path) -> None:
    """Of float32 exactly: names, rows of queries and keys, norms, biases, and what the config says."""
    folder = make_model(name)
    convert(write_gguf(folder, tmp_path / "m.gguf"), tmp_path / "out", dtype=torch.float32)
    assert relative(logits(tmp_path / "out"), their_logits(folder)) < 1e-5
    assert relative(their_logits(tmp_path / "out"), their_logits(folder)) < 1e-6


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
@pytest.mark.parametrize("name", ["llama", "gemma3_text", "qwen2"])
def test_the_tensors_that_transformers_reads(name: str, kind: str, make_model, tmp_path: Path) -> None:
    file = write_gguf(make_model(name), tmp_path / "m.gguf", kind)
    convert(file, tmp_path / "out", dtype=torch.float32)
    tensors = SafetensorsFolder(tmp_path / "out")
    theirs = state_of(file, make_model(name))
    assert tensors.shapes.keys() == theirs.keys()
    for key, value in theirs.items():
        assert torch.equal(tensors.get(key), value), key


@pytest.mark.parametrize("kind", [k for k, block in TYPES.items() if block.size > 1])
def test_every_quantized_type_in_runs_of_rows(kind: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.integrations.gguf.dequant import GGML_BLOCK
    from transformers.integrations.gguf.kernels import dequantize_blocks

    rows, block = 7, TYPES[kind]
    rng = np.random.default_rng(kind)
    raw = rng.integers(0, 256, (rows, 512 // block.size * block.bytes), dtype=np.uint8) & 0xBF  # no scale is infinite
    file = tmp_path / "m.gguf"
    file.write_bytes(header([], [info("w", (512, rows), kind)], raw.tobytes()))
    monkeypatch.setattr("halve.checkpoint.gguf._CHUNK_VALUES", 1024)
    parts = list(read_rows(read_header(file), "w"))
    assert [len(part) for part in parts] == [2, 2, 2, 1]
    if kind in GGML_BLOCK:
        theirs = dequantize_blocks(torch.from_numpy(raw), kind, rows, 512, torch.float32)
    else:  # Q5_0 and Q5_1, which transformers leaves to the package as well
        theirs = torch.from_numpy(gguf.dequantize(raw, gguf.GGMLQuantizationType(kind)))
    torch.testing.assert_close(torch.cat(parts), theirs, rtol=1e-5, atol=0)


def test_the_sizes_of_blocks_are_those_of_the_package() -> None:
    for kind, block in TYPES.items():
        theirs = gguf.GGMLQuantizationType(kind)
        assert (block.name, block.size, block.bytes) == (theirs.name, *gguf.GGML_QUANT_SIZES[theirs])


def test_bfloat16_unless_float32_is_asked_for(make_model, tmp_path: Path) -> None:
    file = write_gguf(make_model("llama"), tmp_path / "m.gguf")
    for dtype, name in ((None, torch.bfloat16), (torch.float32, torch.float32)):
        out = convert(file, tmp_path / str(dtype), dtype=dtype)
        assert set(SafetensorsFolder(out).dtypes.values()) == {name}
        assert read_json(out / "config.json")["dtype"] == str(name).removeprefix("torch.")
        assert len(list(out.glob("model-*-of-00004.safetensors"))) == 4  # one for each block, one for the rest


def test_the_frequencies_of_llama_3(make_hf, tmp_path: Path) -> None:
    """They are stored as factors alone; any other factors are refused."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 32.0, "low_freq_factor": 1.0}
    rope |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    folder = make_hf("llama", **WIDE, head_dim=64, rope_parameters=rope, max_position_embeddings=131072)
    turned, _ = ROPE_INIT_FUNCTIONS["llama3"](AutoConfig.from_pretrained(folder), "cpu")
    factors = (1 / 500000.0 ** (torch.arange(0, 64, 2) / 64) / turned).numpy()
    convert(write_gguf(folder, tmp_path / "m.gguf", spread=factors), tmp_path / "out", dtype=torch.float32)
    written = read_json(tmp_path / "out" / "config.json")["rope_parameters"]
    assert written.keys() == rope.keys() and all(
        written[key] == pytest.approx(rope[key]) for key in rope if key != "rope_type"
    )
    assert relative(logits(tmp_path / "out"), their_logits(folder)) < 1e-5
    with pytest.raises(UnsupportedModelError, match=r"rope_freqs\.weight"):
        convert(write_gguf(folder, tmp_path / "m.gguf", spread=factors[::-1].copy()), tmp_path / "other")


def tokens_of(kind: str) -> dict[str, Any]:
    """Fields of a small tokenizer of a kind."""
    ids = {f"tokenizer.ggml.{name}_token_id": number for number, name in enumerate(("unknown", "bos", "eos"))}
    words = ["<unk>", "<s>", "</s>"]
    if kind == "gpt2":
        words += sorted(set("abcdefghijklmnopqrstuvwxyz0123456789.,!Ġ"))
        merges = ["t h", "th e", "Ġ a", "Ġ the"]
        words += [merge.replace(" ", "") for merge in merges]
        own = {"tokenizer.ggml.pre": "qwen2", "tokenizer.ggml.merges": merges}
    else:
        words += [*"▁abcdefghijklmnopqrst", "th", "the", "▁the", "▁a"]
        own = {"tokenizer.ggml.scores": [float(-number) for number in range(len(words))]}
    types = [2, 3, 3] + [1] * (len(words) - 3)
    own |= {"tokenizer.ggml.model": kind, "tokenizer.ggml.tokens": words, "tokenizer.ggml.token_type": types}
    return own | ids


@pytest.mark.parametrize(("name", "kind"), [("llama", "llama"), ("gemma3_text", "llama"), ("qwen2", "gpt2")])
def test_the_tokenizer_that_transformers_builds(name: str, kind: str, make_model, tmp_path: Path) -> None:
    fields = tokens_of(kind) | {"tokenizer.chat_template": "{{ messages }}", "tokenizer.ggml.eot_token_id": 5}
    file = write_gguf(make_model(name), tmp_path / "m.gguf", fields=fields)
    ours = Tokenizer(convert(file, tmp_path / "out"))
    theirs = AutoTokenizer.from_pretrained(tmp_path, gguf_file="m.gguf")
    for line in ("the cat", " a  the that", "</s> then", "a, b!"):
        assert ours.inner(line)["input_ids"] == theirs(line)["input_ids"]
        assert ours.inner.decode(ours.encode(line, bos=True)) == theirs.decode(theirs(line)["input_ids"])
    assert ours.bos_ids == ((1,) if kind == "llama" else ())
    assert ours.eos_ids == (2, 5) and ours.inner.chat_template == "{{ messages }}"


LINEAR = {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0}
GEMMA_ROPES = {"full_attention": LINEAR, "sliding_attention": {"rope_type": "default", "rope_theta": 20000.0}}


@pytest.mark.parametrize(
    ("name", "options", "fields"),
    [
        (
            "gemma3_text",
            {"rope_parameters": GEMMA_ROPES, "final_logit_softcapping": 5.0, "sliding_window_pattern": 2},
            {
                "gemma3.rope.scaling.type": "linear",
                "gemma3.rope.scaling.factor": 8.0,
                "gemma3.rope.freq_base_swa": 20000.0,
                "gemma3.final_logit_softcapping": 5.0,
                "gemma3.attention.sliding_window_pattern": [True, False, True, False, True, False, True],
            },
        ),
        ("gemma2", {"attn_logit_softcapping": 0.8}, {"gemma2.attn_logit_softcapping": 0.8}),
        # scores by hidden size / heads, as Gemma 2 27B has them
        ("gemma2", {"num_hidden_layers": 46, "head_dim": 16}, {}),
        ("llama", {"rope_parameters": LINEAR}, {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 8.0}),
    ],
)
def test_what_transformers_leaves_out(
    name: str, options: dict[str, Any], fields: dict[str, Any], make_hf, tmp_path: Path
) -> None:
    folder = make_hf(name, **(MODELS[name] | options))
    convert(write_gguf(folder, tmp_path / "m.gguf", fields=fields), tmp_path / "out", dtype=torch.float32)
    assert (
        relative(logits(tmp_path / "out"), their_logits(folder)) < 1e-4
    )  # 46 layers of rounding; a field left out makes 0.3


def test_a_text_begins_as_that_of_llama_3_does(make_model, tmp_path: Path) -> None:
    fields = tokens_of("gpt2") | {"tokenizer.ggml.pre": "llama-bpe"}
    for own, begins in (({}, (1,)), ({"tokenizer.ggml.add_bos_token": False}, ())):
        file = write_gguf(make_model("llama"), tmp_path / "m.gguf", fields=fields | own)
        assert Tokenizer(convert(file, tmp_path / "out", overwrite=True)).bos_ids == begins


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"tokenizer.ggml.model": "t5"}, "model='t5' is a tokenizer that is not built"),
        ({"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "new"}, "pre='new' splits a text"),
        ({"tokenizer.ggml.scores": [1.0]}, "scores must hold a number for each"),
        ({"tokenizer.ggml.tokens": ["a"] * 24}, "holds a token twice"),
        ({"tokenizer.ggml.tokens": ["a"] * 200}, "at most as many tokens as the embedding has rows"),
        ({"tokenizer.ggml.merges": ["a"]}, "merges must list pairs"),
        ({"tokenizer.ggml.eos_token_id": 97}, "eos_token_id=97 is no token"),
        ({"tokenizer.ggml.eos_token_id": 96}, "cannot be built"),
        ({"llama.rope.scaling.type": "yarn"}, "rope.scaling.type='yarn'"),
        ({"llama.logit_scale": 2.0}, "'llama.logit_scale' is not known"),
        ({"llama.expert_count": 8}, "expert_count=8"),
        ({"split.count": 3}, "one of 3 parts"),
        ({"general.type": "adapter"}, "general.type='adapter'"),
    ],
)
def test_what_is_not_understood_is_refused(changed: dict[str, Any], words: str, make_model, tmp_path: Path) -> None:
    file = write_gguf(make_model("llama"), tmp_path / "m.gguf", fields=tokens_of("llama") | changed)
    with pytest.raises(HalveError) as error:
        convert(file, tmp_path / "out")
    assert words in str(error.value) and "\n" not in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"]


def test_an_architecture_that_is_not_converted_is_named(tmp_path: Path) -> None:
    file = tmp_path / "m.gguf"
    file.write_bytes(header([text("general.architecture") + struct.pack("<I", TEXT) + text("mamba")]))
    with pytest.raises(UnsupportedModelError, match=r"'mamba' is not converted: take a GGUF of llama, "):
        convert(file, tmp_path / "out")


def test_the_package_that_is_missing_is_named(make_model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files without blocks need none."""
    for kind in ("F16", "Q8_0"):
        write_gguf(make_model("llama"), tmp_path / f"{kind}.gguf", kind)
    monkeypatch.setitem(sys.modules, "gguf", None)
    monkeypatch.setitem(sys.modules, "gguf.quants", None)
    convert(tmp_path / "F16.gguf", tmp_path / "out")
    with pytest.raises(HalveError, match=r"stored in Q8_0, .*pip install 'halve\[gguf\]'"):
        convert(tmp_path / "Q8_0.gguf", tmp_path / "other")


HUGE = 2**60
FIELD = number("a", 1)
ARRAYS = {
    "count of 2^60": text("a") + struct.pack("<IIQ", ARRAY, 4, HUGE),
    "texts of 2^60": text("a") + struct.pack("<IIQ", ARRAY, TEXT, HUGE),
    "array in array": text("a") + struct.pack("<IIQ", ARRAY, ARRAY, 1) + b"\0" * 64,
}
ONE = info("w", (32, 2))
HOSTILE: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "is no GGUF file"),
    "magic": (b"GGML" + header()[4:], "does not begin with GGUF"),
    "version 1": (header(version=1), "GGUF version 1"),
    "version 4": (header(version=4), "GGUF version 4"),
    "big-endian": (header(version=3 << 24), "big-endian"),
    "tensors": (header(counts=(HUGE, 0)), "holds 1,152,921,504,606,846,976 tensors"),
    "fields": (header(counts=(0, HUGE)), "holds 1,152,921,504,606,846,976 fields"),
    "more fields": (header([FIELD], counts=(0, 2)), "without a name"),
    "length of a name": (header([struct.pack("<Q", HUGE) + b"a" * 9]), "a field's name"),
    "length of all": (header([struct.pack("<Q", 2**64 - 1) + b"a" * 9]), "a field's name"),
    "no text": (header([text(b"\xff") + struct.pack("<II", 4, 1)]), "no UTF-8"),
    "field twice": (header([FIELD, FIELD]), "'a' twice"),
    "type of a field": (header([text("a") + struct.pack("<II", 13, 0)]), "of type 13"),
    "boolean": (header([text("a") + struct.pack("<IB", 7, 2)]), "2 for true or false"),
    "text of 2^60": (header([text("a") + struct.pack("<IQ", TEXT, HUGE)]), "the text of 'a'"),
    **{name: (header([raw]), "type 9" if "in" in name else "1,152,921") for name, raw in ARRAYS.items()},
    "alignment 0": (header([number("general.alignment", 0)]), "power of two"),
    "alignment 3": (header([number("general.alignment", 3)]), "power of two"),
    "alignment 2^31": (header([number("general.alignment", 2**31)]), "power of two"),
    "alignment text": (header([text("general.alignment") + struct.pack("<I", TEXT) + text("32")]), "power of two"),
    "dimensions 0": (header(tensors=[info("w", ())], data=b"\0" * 256), "0 dimensions"),
    "dimensions 2^32": (header(tensors=[text("w") + struct.pack("<I", 2**32 - 1) + b"\0" * 64]), "4294967295 dimensions"),
    "no rows": (header(tensors=[info("w", (32, 0))]), "shape [0, 32]"),
    "product is 0 in 64 bits": (header(tensors=[info("w", (2**32, 2**32))]), "the file at"),
    "product is 64 in 64 bits": (header(tensors=[info("w", (2**63 + 32, 2))], data=b"\0" * 256), "the file at"),
    "type of a tensor": (header(tensors=[info("w", (32, 2), 99)]), "type 99"),
    "type with a name": (header(tensors=[info("w", (256, 2), 23)]), "type IQ4_XS"),
    "type taken out": (header(tensors=[info("w", (32, 2), 4)]), "type 4"),
    "part of a block": (header(tensors=[info("w", (33, 2), 8)], data=b"\0" * 256), "multiples of 32"),
    "offset": (header(tensors=[info("w", (32, 2), 0, 2**64 - 32)], data=b"\0" * 256), "the file at"),
    "offset not aligned": (header(tensors=[info("w", (8,), 0, 4)], data=b"\0" * 256), "multiple of 32"),
    "one byte short": (header(tensors=[ONE], data=b"\0" * 255), "the file at"),
    "tensor twice": (header(tensors=[ONE, ONE], data=b"\0" * 256), "'w' twice"),
    "bytes of another": (header(tensors=[ONE, info("v", (8,), 0, 224)], data=b"\0" * 256), "lie over each other"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_header_is_one_line(name: str, tmp_path: Path) -> None:
    raw, words = HOSTILE[name]
    file = tmp_path / "m.gguf"
    file.write_bytes(raw)
    with pytest.raises(CheckpointError) as error:
        read_header(file)
    assert words in str(error.value) and str(error.value).startswith(f"{file}: ") and "\n" not in str(error.value)


def test_a_header_that_is_whole_is_read(tmp_path: Path) -> None:
    """The cases above differ from it by one thing each."""
    file = tmp_path / "m.gguf"
    words = text("words") + struct.pack("<IIQ", ARRAY, TEXT, 2) + text("x") + text("")
    file.write_bytes(header([FIELD, words], [info("v", (8,), 0, 256), ONE], b"\0" * 288))
    read = read_header(file)
    assert read.fields == {"a": 1, "words": ("x", "")}
    assert [(name, one.shape, one.nbytes) for name, one in read.tensors.items()] == [
        ("w", (2, 32), 256),
        ("v", (8,), 32),
    ]


def test_mutated_headers(make_model, tmp_path: Path) -> None:
    """Bytes, whole numbers and lengths of a real header changed at random: opened, or refused in one line."""
    file = write_gguf(make_model("gemma3_text"), tmp_path / "m.gguf", fields=tokens_of("llama"))
    whole = file.read_bytes()
    end = min(one.offset for one in read_header(file).tensors.values())
    rng, refused = random.Random(0), 0
    for _ in range(300):
        raw = bytearray(whole)
        for _ in range(rng.randint(1, 3)):
            at = rng.randrange(end - 8)
            if rng.random() < 0.5:
                raw[at] ^= 1 << rng.randrange(8)
            else:
                number = rng.choice([0, 1, HUGE, 2**63, 2**64 - 1, 2**32 - 1, rng.randrange(2**20)])
                raw[at : at + 8] = struct.pack("<Q", number)
        if rng.random() < 0.1:
            del raw[rng.randrange(len(raw)) :]
        file.write_bytes(raw)
        try:
            open_gguf(file, torch.bfloat16)
        except HalveError as error:
            refused += 1
            assert str(file) in str(error) and str(error).isprintable() and len(str(error)) < 600, str(error)
    assert refused > 150


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_value_that_is_no_number(value: float, make_model, tmp_path: Path) -> None:
    file = write_gguf(make_model("llama"), tmp_path / "m.gguf")
    raw = bytearray(file.read_bytes())
    raw[-4:] = struct.pack("<f", value)
    file.write_bytes(raw)
    with pytest.raises(CheckpointError, match="holds NaN or infinite values"):
        convert(file, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"]


def test_a_tensor_that_the_config_does_not_know(make_model, tmp_path: Path) -> None:
    file = write_gguf(make_model("llama"), tmp_path / "m.gguf")
    whole = file.read_bytes()
    cases = [
        (b"blk.0.attn_z", "unexpected tensor 'blk.0.attn_z.weight'"),
        (b"blk.3.attn_q", "unexpected tensor 'blk.3.attn_q.weight'"),
        (b"blk.1.attn_q", "'blk.1.attn_q.weight' twice"),
    ]
    for theirs, words in cases:
        file.write_bytes(whole.replace(b"blk.0.attn_q", theirs))
        with pytest.raises(CheckpointError) as error:
            convert(file, tmp_path / "out")
        assert words in str(error.value)


def test_the_command(make_model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, out = write_gguf(make_model("qwen2"), tmp_path / "no-suffix"), tmp_path / "out"
    monkeypatch.setattr(sys, "argv", ["halve", "convert", str(file), str(out), "--dtype", "fp32"])
    with pytest.raises(SystemExit) as stop:
        main()
    assert not stop.value.code and relative(logits(out), their_logits(make_model("qwen2"))) < 1e-5
    with pytest.raises(CheckpointError, match="a GGUF file becomes a folder by `halve convert`"):
        logits(file)


def test_a_folder_keeps_its_dtypes(make_model, tmp_path: Path) -> None:
    with pytest.raises(HalveError, match="leave out --dtype"):
        convert(make_model("llama"), tmp_path / "out", dtype=torch.float32)


def test_gemma_3_270m(tmp_path: Path) -> None:
    """A real file of four quantized types: the tensors and the tokens that transformers reads."""
    if not (place := os.environ.get("HALVE_TEST_GEMMA")):
        pytest.skip("HALVE_TEST_GEMMA is not set: no folder with gemma-3-270m.gguf")
    file = Path(place) / "gemma-3-270m.gguf"
    out = convert(file, tmp_path / "out", dtype=torch.float32)
    tensors, theirs = SafetensorsFolder(out), state_of(file, out)
    assert all(torch.equal(tensors.get(name), theirs[name]) for name in tensors.shapes)
    ours, other = Tokenizer(out), AutoTokenizer.from_pretrained(place, gguf_file=file.name)
    for line in ("The quick brown fox", "  two spaces\n\n\ttab 12345", "Ünïcode 中文 🙂 <bos> x"):
        assert ours.inner(line)["input_ids"] == other(line)["input_ids"]
    json.loads((out / "tokenizer.json").read_text())
