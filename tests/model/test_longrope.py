"""Frequencies that change when a text outgrows a length, and rotary embedding of a part of each head: as transformers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from halve import compress, load_model
from halve.decode.cpu_step import CpuStep
from halve.decode.generate import generate
from halve.decode.torch_step import TorchStep
from halve.errors import UnsupportedModelError
from halve.measure.quality.scoring import fork
from halve.model.decoder import Model
from halve.model.families import parse_config
from halve.model.wrappers import own_config
from tests.common import relative

LIMIT = 16
SHORT, LONG = [1.0, 1.2, 1.5, 1.9], [1.0, 2.5, 4.0, 9.0]
LONGROPE = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": SHORT, "long_factor": LONG}
PHI: dict[str, Any] = {"pad_token_id": 0, "eos_token_id": None, "original_max_position_embeddings": LIMIT}
PARTIAL = LONGROPE | {"partial_rotary_factor": 0.75, "short_factor": SHORT[:3], "long_factor": LONG[:3]}
CASES = {
    "phi3": ("phi3", {**PHI, "rope_parameters": LONGROPE}),
    "phi3-attention-factor": ("phi3", {**PHI, "rope_parameters": LONGROPE | {"attention_factor": 1.3}}),
    "phi3-partial": ("phi3", {**PHI, "rope_parameters": PARTIAL, "tie_word_embeddings": True, "sliding_window": 11}),
    "phi3-half": ("phi3", {**PHI, "rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}),
    "llama": (
        "llama",
        {
            "rope_parameters": LONGROPE | {"factor": 4.0, "original_max_position_embeddings": LIMIT},
            "eos_token_id": None,
        },
    ),
}


@pytest.fixture(scope="module", params=CASES)
def folder(request: pytest.FixtureRequest, make_hf: Callable[..., Path]) -> Path:
    kind, options = CASES[request.param]
    return make_hf(kind, **options)


def drawn(rows: int, count: int) -> Tensor:
    return torch.randint(0, 97, (rows, count), generator=torch.Generator().manual_seed(rows + count))


@torch.inference_mode()
@pytest.mark.parametrize("count", [3, LIMIT, LIMIT + 1, 40])
def test_texts_on_both_sides_of_the_limit(folder: Path, count: int) -> None:
    tokens = drawn(2, count)
    # fp32 rounding over three layers stays near 1e-6
    assert relative(load_model(folder)(tokens), AutoModelForCausalLM.from_pretrained(folder)(tokens).logits) < 1e-5


@torch.inference_mode()
def test_the_two_kinds_of_frequencies_differ(make_hf: Callable[..., Path]) -> None:
    """Without which no test here could fail."""
    kind, options = CASES["phi3"]
    model, tokens = load_model(make_hf(kind, **options)), drawn(1, LIMIT + 1)
    assert relative(model(tokens[:, :LIMIT]), model(tokens)[:, :LIMIT]) > 1e-2


@torch.inference_mode()
def test_generation_across_the_limit_is_that_of_transformers(folder: Path) -> None:
    """Phi-3 of transformers computes its cache anew when a text grows beyond; other types there mix the two kinds."""
    theirs: Any = AutoModelForCausalLM.from_pretrained(folder)
    prompt, new = drawn(1, LIMIT - 5), 12
    options: dict[str, Any] = {"max_new_tokens": new, "do_sample": False, "attention_mask": torch.ones_like(prompt)}
    options |= {} if theirs.config.model_type == "phi3" else {"use_cache": False}
    expected = theirs.generate(prompt, **options)[0, LIMIT - 5 :].tolist()
    assert generate(load_model(folder), prompt.tolist(), max_new_tokens=new)[0].tokens == expected


@torch.inference_mode()
def test_cached_tokens_equal_the_whole_text_at_every_length(folder: Path) -> None:
    model, tokens = load_model(folder), drawn(2, 24)
    cache, end = model.new_cache(2, 24), 0
    for count in (9, 3, 1, 1, 1, 1, 1, 3, 4):
        step = model(tokens[:, end : end + count], cache)
        end += count
        assert cache.lengths == end
        assert relative(step, model(tokens[:, :end])[:, -count:]) < 1e-5


@torch.inference_mode()
def test_the_longest_row_decides_for_all(folder: Path) -> None:
    """As in transformers, where rows of one batch share their frequencies."""
    model, lengths, more = load_model(folder), [4, LIMIT - 2, 9], 5
    rows = drawn(3, LIMIT + 4)
    cache = model.new_cache(3, LIMIT + 4)
    model(rows[:, : max(lengths)], cache)
    cache.lengths = torch.tensor(lengths)
    for step in range(more):
        ends = [length + step + 1 for length in lengths]
        found = model(torch.stack([row[end - 1 : end] for row, end in zip(rows, ends, strict=True)]), cache)
        whole = model(rows[:, : max(ends)])  # what comes behind a row's end changes nothing before it
        expected = torch.stack([whole[row, end - 1] for row, end in enumerate(ends)])
        assert relative(found[:, 0], expected) < 1e-5


@torch.inference_mode()
def test_a_copy_with_other_rows_goes_back_below_the_limit(folder: Path) -> None:
    model, rows = load_model(folder), drawn(2, LIMIT + 4)
    cache = model.new_cache(2, LIMIT + 2)
    model(rows[:, : LIMIT + 2], cache)
    cache.lengths = torch.tensor([5, LIMIT + 2])
    grown = fork(cache, [0, 0], 2)
    more = rows[:, -2:]
    whole = torch.cat((rows[:1, :5].expand(2, -1), more), dim=1)
    assert relative(model(more, grown), model(whole)[:, 5:]) < 1e-5


def steps_of(engine: TorchStep, prompts: Tensor, lengths: list[int]) -> Tensor:
    engine.model(prompts, engine.cache)
    engine.cache.lengths = torch.tensor(lengths)
    return torch.stack([engine.logits((drawn(len(lengths), 1) + step) % 97).clone() for step in range(10)])


@torch.inference_mode()
def test_the_c_step_crosses_the_limit_too(folder: Path) -> None:
    model, lengths = load_model(folder), [LIMIT - 7, LIMIT - 4]
    reason = CpuStep.serves(model, 2)
    if reason is not None:
        pytest.skip(reason)
    prompts = drawn(2, max(lengths))
    ours, theirs = (steps_of(engine(model, 2, 40), prompts, lengths) for engine in (CpuStep, TorchStep))
    assert relative(ours, theirs) < 3e-6  # as in the tests of the C step


STEPS = {
    "rtn": ["rtn:bits=8"],
    "heads": ["prune-heads:fraction=0.5,score=l1,refit=false", "drop-layers:layers=1"],
    "mlp": ["prune-mlp:fraction=0.5,score=l1,refit=false,multiple_of=8", "rtn:bits=4,group_size=8"],
    "l1": ["l1-inputs:fraction=0.25"],
}


@torch.inference_mode()
@pytest.mark.parametrize("steps", STEPS)
def test_what_is_written_computes_the_same(folder: Path, tmp_path: Path, steps: str) -> None:
    """In transformers too, where one of its types can hold it: none with the tensors of Phi-3 and a part of each head."""
    compress(folder, tmp_path / "out", STEPS[steps])
    model, written = load_model(tmp_path / "out"), json.loads((tmp_path / "out" / "config.json").read_text())
    partial = load_model(folder).config.ropes[0].share != 1
    assert model.config.ropes == load_model(folder).config.ropes
    assert (written["model_type"] == "halve") == (partial or steps == "l1")
    if written["model_type"] == "halve":
        return
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    for count in (LIMIT, LIMIT + 1):
        assert relative(model(drawn(1, count)), theirs(drawn(1, count)).logits) < 1e-5


@torch.inference_mode()
def test_a_part_of_each_head_by_hand(make_hf: Callable[..., Path]) -> None:
    """Channels that are not turned are as they were, and the others as in a head of that size alone."""
    kind, options = CASES["phi3-half"]
    model: Model = load_model(make_hf(kind, **options))
    rope = model.rotaries[0]
    assert rope.turned == 4
    cos, sin = rope.tables(8, torch.float32)
    angles = 7 * torch.tensor([1.0, 1e4 ** -(2 / 4)])
    assert torch.allclose(cos[7], angles.cos().repeat(2)) and torch.allclose(sin[7], angles.sin().repeat(2))


CONFIG = {
    "vocab_size": 97,
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "intermediate_size": 48,
}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rope_scaling": {"type": "longrope", "short_factor": SHORT}}, "long_factor"),
        (
            {"rope_scaling": {"type": "longrope", "short_factor": SHORT, "long_factor": LONG[:3]}},
            "4 numbers in long_factor",
        ),
        ({"rope_scaling": {"type": "longrope", "short_factor": [*SHORT[:3], 0], "long_factor": LONG}}, "short_factor"),
        ({"rope_scaling": {"type": "longrope", "short_factor": "a", "long_factor": LONG}}, "short_factor"),
        ({"rope_scaling": LONGROPE, "original_max_position_embeddings": 1}, "logarithm"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "longrope, su"),
        ({"partial_rotary_factor": 0.4}, "turns 3 of 8"),
        ({"partial_rotary_factor": 1.5}, "at most 1"),
        ({"partial_rotary_factor": "half"}, "at most 1"),
        ({"partial_rotary_factor": True}, "at most 1"),
    ],
)
def test_what_does_not_fit_is_refused(changes: dict, words: str) -> None:
    with pytest.raises(UnsupportedModelError, match=words):
        parse_config(own_config(CONFIG | changes | {"model_type": "phi3"}, "config.json"), "config.json")


@pytest.mark.parametrize("name", ["su", "yarn", "longrope"])
def test_older_names_of_longrope(name: str) -> None:
    raw = CONFIG | {"model_type": "phi3", "rope_scaling": {"type": name, "short_factor": SHORT, "long_factor": LONG}}
    config = parse_config(own_config(raw | {"max_position_embeddings": 8192}, "config.json"), "config.json")[1]
    assert (config.ropes[0].kind, config.length_limit) == ("longrope", 4096)
