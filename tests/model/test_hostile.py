"""Configs that no model has: every one is refused on one line that names the field, its value and what to do, at once."""

from __future__ import annotations

import json
import os
import random
import re
import resource
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from halve import load_model
from halve.checkpoint.foreign import OLD_GPTQ, quantization_of
from halve.checkpoint.gptq_format import read_config
from halve.checkpoint.reader import open_checkpoint
from halve.checkpoint.schemes import read_schemes
from halve.checkpoint.tokenizer import load_tokenizer
from halve.errors import HalveError, UnsupportedModelError
from halve.model.config import ModelConfig
from halve.model.families import parse_config
from halve.model.wrappers import own_config
from tests.common import write_word_tokenizer
from tests.model.differential import BASES, VALUES

NAN, INFINITY = float("nan"), float("inf")
WRONG: list[Any] = [
    "3",
    "",
    [],
    [3],
    {},
    {"a": 1},
    True,
    NAN,
    INFINITY,
    -INFINITY,
    -1,
    0,
    0.5,
    2.0,
    10**9,
    2**31,
    10**30,
]
WRONG += [
    10**400,
    1e300,
    None,
    "\n",
    "\ud800",
    [[[]]],
    {"rope_type": []},
    {"factor": {}},
    "a" * 10_000,
    ["full_attention", 3],
]


@pytest.fixture(autouse=True)
def at_once() -> Iterator[None]:
    """Nothing takes seconds, or hundreds of megabytes."""
    started, before = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert time.monotonic() - started < 20
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000  # kB


def refused(error: HalveError, *words: str) -> None:
    text = str(error)
    assert "\n" not in text and len(text) < 700 and text.count(": ") >= 2, text
    assert all(word in text for word in words), text


@pytest.mark.parametrize("kind", BASES)
def test_any_value_in_any_field_is_read_or_refused(kind: str) -> None:
    """One and two at a time: a config or one line that names a field that was changed; what is read has sane sizes."""
    chosen, known = random.Random(kind), [*BASES[kind], *VALUES, "model_type", "auto_map", "halve_layers"]
    changes = [{field: value} for field in known for value in WRONG]
    changes += [{field: chosen.choice(WRONG) for field in chosen.sample(known, 2)} for _ in range(1500)]
    for change in changes:
        raw = {"model_type": kind} | BASES[kind] | change
        try:
            config = parse_config(own_config(raw, "config.json"), "config.json")[1]
        except UnsupportedModelError as error:
            refused(error)
            named = {*change, "layer_types", "num_attention_heads", "head_dim", "rope_scaling", "rope_parameters"}
            assert any(f"{field}=" in str(error) or f"{field} is missing" in str(error) for field in named), error
        else:
            sane(config)


def sane(config: ModelConfig) -> None:
    numbers = [config.vocab_size, config.hidden_size, config.head_dim, config.max_positions]
    numbers += [n for layer in config.layers for n in (layer.num_heads, layer.num_kv_heads, layer.intermediate_size)]
    assert all(type(n) is int and 0 < n < 2**31 for n in numbers)
    assert all(layer.sliding_window is None or layer.sliding_window >= 1 for layer in config.layers)
    assert 0 <= config.norm_eps < INFINITY and len(config.layers) <= 10_000
    for rope in config.ropes:
        assert 1 < rope.theta < INFINITY
        numbers = [n for value in rope.options.values() for n in (value if isinstance(value, tuple) else (value,))]
        assert all(abs(number) < INFINITY for number in numbers) and 0 < rope.share <= 1


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_hidden_layers": 10**9}, ["num_hidden_layers=1000000000", "at most 10000"]),
        ({"hidden_size": 2**30, "intermediate_size": 2**30}, ["hidden_size=1073741824", "1e+13"]),
        ({"vocab_size": 2**31 - 1, "hidden_size": 2**16}, ["vocab_size=2147483647", "1e+13"]),
        ({"sliding_window": 0}, ["sliding_window=0", "positive"]),
        ({"rms_norm_eps": INFINITY}, ["rms_norm_eps=inf", "at most 1e30"]),
        ({"hidden_size": 32.0}, ["hidden_size=32.0", "integer"]),
        ({"num_key_value_heads": "2"}, ["num_key_value_heads='2'", "integer"]),
        ({"head_dim": 7}, ["head_dim=7", "odd"]),
        ({"rope_scaling": "yarn"}, ["rope_scaling='yarn'", "object"]),
        ({"rope_theta": 0}, ["rope_theta=0", "greater than 1"]),
        ({"rope_scaling": {"type": "linear", "factor": NAN}}, ["rope_scaling=", "factor=nan", "at least 1e-06"]),
        ({"model_type": ["mistral"]}, ["model_type=['mistral']", "mistral"]),
        ({"quantization_config": "gptq"}, ["quantization_config='gptq'", "object"]),
        ({"quantization_config": {"quant_method": ["gptq"]}}, ["quant_method=['gptq']", "gptq"]),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4.0}}, ["bits=4.0", "whole number"]),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": "x"}}, ["group_size='x'"]),
    ],
)
def test_values_out_of_bounds(make_hf, tmp_path: Path, changes: dict, words: list[str]) -> None:
    folder = Path(shutil.copytree(make_hf("mistral"), tmp_path / "model"))
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | changes))
    with pytest.raises(HalveError) as caught:
        load_model(folder)
    refused(caught.value, *words)


MALFORMED = [
    "[" * 100_000 + "]" * 100_000,
    '{"a": ' * 100_000 + "1" + "}" * 100_000,
    '{"a": ' * 500 + "1" + "}" * 500,
    '{"a": ' + "1" * 100_000 + "}",
    '{"a": "\udcff"}',
    "",
    "3",
    "[]",
]
INDEX, MANIFEST, GENERATION = "model.safetensors.index.json", "halve.json", "generation_config.json"


BESIDE = [(name, text) for name in ("config.json", INDEX, MANIFEST, GENERATION, OLD_GPTQ) for text in MALFORMED]
BESIDE += [
    (INDEX, text)
    for text in ("{}", '{"weight_map": 3}', '{"weight_map": {"a": 3}}', '{"weight_map": {"a": "\\u0000"}}')
]
BESIDE += [(MANIFEST, text) for text in ('{"recipe": 3}', '{"recipe": [3]}', '{"steps": {}}', '{"steps": ["a"]}')]
BESIDE += [
    (GENERATION, f'{{"eos_token_id": {ids}}}')
    for ids in ('"3"', "[3, []]", "true", "{}", "1.5", "[[3]]", "1" + "0" * 30)
]


@pytest.mark.parametrize(("name", "text"), BESIDE, ids=[f"{name}-{i}" for i, (name, _) in enumerate(BESIDE)])
def test_files_beside_the_weights(make_hf, tmp_path: Path, name: str, text: str) -> None:
    folder = Path(shutil.copytree(make_hf("llama"), tmp_path / "model"))
    write_word_tokenizer(folder, ["a"])
    (folder / name).write_bytes(text.encode(errors="surrogateescape"))
    if name == INDEX:  # beside a single file it is not read
        (folder / "model.safetensors").unlink()
    with pytest.raises(HalveError) as caught:
        load_tokenizer(folder) if name == GENERATION else open_checkpoint(folder)
    message = str(caught.value)
    assert "\n" not in message and re.search(rf"{re.escape(name)}(:| is )", message) and len(message) < 500
    assert message.count(": ") >= (2 if f"{name}: " in message else 1), message


def test_a_pipe_is_not_waited_for(make_hf, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(make_hf("llama"), tmp_path / "model"))
    (folder / "config.json").unlink()
    os.mkfifo(folder / "config.json")
    with pytest.raises(HalveError, match=r"config\.json: .*pipe"):
        open_checkpoint(folder)


QUANTIZED: dict[str, Any] = {
    "format": "pack-quantized",
    "ignore": ["lm_head"],
    "config_groups": {"g": {"targets": ["Linear"], "weights": {"num_bits": 4, "strategy": "group", "group_size": 8}}},
}


def test_any_value_in_any_field_of_a_quantization_config() -> None:
    names = [f"model.layers.{n}.mlp.up_proj" for n in range(3)]
    wrong = [*WRONG, ["re:(a+)+$"], ["re:(.|.)*x"], ["re:" + ".*" * 40 + "x"], ["re:("], ["re:" + "(" * 10_000]]

    def places(value: Any, path: tuple = ()) -> Iterator[tuple]:
        if path:
            yield path
        if isinstance(value, dict):
            for key, inner in value.items():
                yield from places(inner, (*path, key))

    assert set(read_schemes(QUANTIZED, names, "config.json")) == set(names)
    for path in places(QUANTIZED):
        for value in wrong:
            config = json.loads(json.dumps(QUANTIZED))
            place = config
            for key in path[:-1]:
                place = place[key]
            place[path[-1]] = value
            try:
                schemes = read_schemes(config, names, "config.json")
            except UnsupportedModelError as error:
                assert "\n" not in str(error) and len(str(error)) < 500 and str(error).count(": ") >= 1
            else:
                assert all(type(s.bits) is int and type(s.group_size) is int for s in schemes.values())


def test_any_value_in_any_field_of_a_gptq_config(tmp_path: Path) -> None:
    good = {
        "quant_method": "gptq",
        "bits": 4,
        "group_size": 8,
        "sym": True,
        "desc_act": False,
        "checkpoint_format": "gptq",
    }
    wrong = [*WRONG, "1" * 10_000, "-", "--1"]
    for key in (*good, "format", "pack_dtype", "dynamic", "static_groups"):
        for value in wrong:
            try:
                config = quantization_of(tmp_path, {"quantization_config": good | {key: value}})
                assert config is not None
                spec, _ = read_config(config, "config.json")
            except HalveError as error:
                assert "\n" not in str(error) and len(str(error)) < 500 and str(error).count(": ") >= 1
                assert f"{key}=" in str(error) or key == "dynamic" or "group size" in str(error), error
            else:
                assert type(spec.bits) is int and type(spec.group_size) is int and type(spec.symmetric) is bool
