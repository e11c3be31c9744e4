"""drop-layers, drop-attention, drop-mlp end to end."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

import halve
from halve import compress, load_model
from halve.checkpoint.reader import open_checkpoint
from halve.compression import step_run
from halve.compression.methods.depth import format_layers, parse_layers
from halve.compression.recipe import parse_step
from halve.errors import RecipeError
from tests.common import NEWER, TOKENS, logits, relative

SLIDING = {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 2, "head_dim": 16}
FAMILIES = [
    ("llama", {"tie_word_embeddings": True}),
    ("mistral", {"sliding_window": 6}),
    ("qwen2", SLIDING),
    ("qwen3", SLIDING),
    ("gemma3_text", {"sliding_window": 6, "sliding_window_pattern": 2, "head_dim": 16}),
    ("smollm3", {"pad_token_id": 0, "no_rope_layer_interval": 2}),
    ("olmo2", {}),
    *NEWER,
    ("opt", {}),
]


def without(folder: Path, layers: list[int], kind: str | None = None) -> torch.Tensor:
    """Logits of the model in memory with some blocks, or some of their sublayers, left out."""
    model = load_model(folder)
    for index in sorted(layers, reverse=True):
        block = model.blocks[index]
        if kind is None:
            del model.blocks[index]
        else:
            name = "o_proj" if kind == "attention" else "down_proj"
            linear = block.linears[name]  # type: ignore[index]
            # a sublayer that adds nothing is not there (norm first)
            block.linears[name] = linear.replaced(weight=torch.zeros_like(linear.weight), bias=None)  # type: ignore[index]
    with torch.inference_mode():
        return model(TOKENS)


def tensor_names(folder: Path) -> set[str]:
    names: set[str] = set()
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as handle:
            names |= set(handle.keys())
    return names


@pytest.mark.parametrize(("kind", "options"), FAMILIES, ids=[f[0] for f in FAMILIES])
def test_dropped_layers_leave_a_plain_model(make_hf, tmp_path: Path, kind: str, options: dict) -> None:
    source = make_hf(kind, **options, num_hidden_layers=5)
    compress(source, tmp_path / "out", ["drop-layers:layers=1..2"])
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["model_type"] == kind and config["num_hidden_layers"] == 3
    if "use_sliding_window" in options:
        assert config["layer_types"] == ["full_attention", "sliding_attention", "sliding_attention"]
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with torch.inference_mode():
        assert relative(logits(tmp_path / "out"), theirs(TOKENS).logits) < 1e-5
    assert torch.equal(logits(tmp_path / "out"), without(source, [1, 2]))


@pytest.mark.parametrize(("step", "norm"), [("drop-attention", "input_layernorm"), ("drop-mlp", "post_attention")])
def test_dropped_sublayers_go_with_their_norms(make_hf, tmp_path: Path, step: str, norm: str) -> None:
    source = make_hf("llama", attention_bias=True)
    result = compress(source, tmp_path / "out", [f"{step}:layers=0|2"])
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == "halve"
    kind = step.removeprefix("drop-")
    assert relative(logits(tmp_path / "out"), without(source, [0, 2], kind)) < 1e-6
    names = tensor_names(tmp_path / "out")
    part = "self_attn" if kind == "attention" else "mlp."
    for layer in range(3):
        here = [name for name in names if name.startswith(f"model.layers.{layer}.") and (part in name or norm in name)]
        assert bool(here) == (layer == 1)
    removed = [line for line in result.manifest["steps"][0]["linears"] if line["action"] == "removed"]
    assert len(removed) == (8 if kind == "attention" else 6)
    assert all(line["bytes_after"] == 0 < line["bytes_before"] for line in removed)
    with pytest.raises(ValueError, match="halve"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_a_layer_without_sublayers_goes_altogether(make_hf, tmp_path: Path) -> None:
    source = make_hf("opt")
    compress(source, tmp_path / "out", ["drop-attention:layers=1", "drop-mlp:layers=1"])
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == "opt"
    assert torch.equal(logits(tmp_path / "out"), without(source, [1]))


def test_sublayers_of_post_norm_models_go(make_hf, tmp_path: Path) -> None:
    """OPT-350m normalises after the sum: the norm belongs to the sublayer and goes with it."""
    source = make_hf("opt", do_layer_norm_before=False, word_embed_proj_dim=16)
    compress(source, tmp_path / "out", ["drop-mlp:layers=0"])
    assert not any("layers.0.final_layer_norm" in name for name in tensor_names(tmp_path / "out"))
    assert torch.isfinite(logits(tmp_path / "out")).all()


def test_depth_width_and_quantization_combine(make_hf, tmp_path: Path) -> None:
    steps = [
        "drop-layers:layers=0",
        "prune-mlp:fraction=0.33,multiple_of=16,score=l1,refit=false",
        "rtn:bits=8",
        "drop-layers:layers=1",
        "drop-attention:layers=1",
    ]
    source = make_hf("qwen2", num_hidden_layers=5)
    result = compress(source, tmp_path / "out", steps)
    config = open_checkpoint(tmp_path / "out").config
    assert [(x.has_attention, x.intermediate_size) for x in config.layers] == [(True, 32), (False, 32), (True, 32)]
    assert torch.isfinite(logits(tmp_path / "out")).all()
    sizes = [(s["linear_bytes_before"], s["linear_bytes_after"]) for s in result.manifest["steps"]]
    assert all(before > after for before, after in sizes)
    assert all(a[1] == b[0] for a, b in itertools.pairwise(sizes))
    for step in result.manifest["steps"]:
        for when in ("before", "after"):
            assert step[f"parameters_{when}"] == sum(line[f"parameters_{when}"] for line in step["linears"])
            assert step[f"linear_bytes_{when}"] == sum(line[f"bytes_{when}"] for line in step["linears"])


@pytest.fixture(scope="module")
def real(assets: Path) -> dict[str, str | int]:
    return {"calibration": str(assets / "data" / "tinystories_317.txt"), "samples": 8, "window": 128}


@pytest.mark.parametrize("select", ["angular", "influence", "perplexity", "deepest"])
@pytest.mark.parametrize("step", ["drop-layers", "drop-attention", "drop-mlp"])
def test_selectors_choose_and_say_so(assets: Path, real: dict, tmp_path: Path, step: str, select: str) -> None:
    source = assets / "models" / "stories260K"
    result = compress(source, tmp_path / "out", [f"{step}:count=2,select={select}"], **real)
    done = result.manifest["steps"][0]
    if select == "deepest":
        assert "resolved" not in done
        chosen = [2, 3]  # of five, the last stays
    else:
        chosen = parse_layers(step, tuple(done["resolved"]["layers"]))
        assert len(chosen) == 2
        assert any(note.startswith(f"{step}: chose layers") for note in result.notes)
    layers = open_checkpoint(tmp_path / "out").config.layers
    if step == "drop-layers":
        assert len(layers) == 3
        assert select != "angular" or chosen[1] == chosen[0] + 1
    else:
        lost = [i for i, x in enumerate(layers) if not (x.has_attention if step == "drop-attention" else x.has_mlp)]
        assert lost == chosen


def test_deepest_keeps_the_last_layer(make_hf, tmp_path: Path) -> None:
    source = make_hf("llama", num_hidden_layers=5)
    for count, gone in ((1, [3]), (3, [1, 2, 3]), (4, [0, 1, 2, 3])):
        out = tmp_path / str(count)
        compress(source, out, [f"drop-layers:count={count},select=deepest"])
        assert torch.equal(logits(out), without(source, gone))


def test_perplexity_beats_the_other_selectors_by_its_own_measure(assets: Path, real: dict, tmp_path: Path) -> None:
    source, losses = assets / "models" / "stories260K", {}
    tokens = halve.load_tokenizer(source).encode((assets / "data" / "tinystories_317.txt").read_text()[:4000], bos=True)
    batch = torch.tensor([tokens[:400]])
    for select in ("perplexity", "deepest", "influence"):
        compress(source, tmp_path / select, [f"drop-layers:count=1,select={select}"], **real)
        with torch.inference_mode():
            log_probs = load_model(tmp_path / select)(batch)[0, :-1].log_softmax(-1)
        losses[select] = -float(log_probs.gather(-1, batch[0, 1:, None]).mean())
    assert losses["perplexity"] == min(losses.values())


def test_a_resumed_run_keeps_the_choice(assets: Path, real: dict, tmp_path: Path, monkeypatch) -> None:
    source, steps = assets / "models" / "stories260K", ["drop-layers:count=2,select=influence", "rtn:bits=8"]
    compress(source, tmp_path / "whole", steps, **real)
    original, calls = step_run._block_tensors, []

    def crash(*arguments):
        calls.append(None)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(*arguments)

    monkeypatch.setattr(step_run, "_block_tensors", crash)
    with pytest.raises(KeyboardInterrupt):
        compress(source, tmp_path / "out", steps, **real)
    monkeypatch.setattr(
        "halve.compression.methods.depth.measure_layers", lambda walk: pytest.fail("chosen a second time")
    )
    compress(source, tmp_path / "out", steps, **real)
    for path in (tmp_path / "whole").glob("model*"):
        assert path.read_bytes() == (tmp_path / "out" / path.name).read_bytes(), path.name
    assert (tmp_path / "whole" / "halve.json").read_bytes() == (tmp_path / "out" / "halve.json").read_bytes()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("drop-layers", "count=N or layers"),
        ("drop-layers:count=1,layers=2", "count=N or layers"),
        ("drop-layers:count=0", "count=0"),
        ("drop-layers:count=1,select=best", "select='best'"),
        ("drop-layers:layers=3..1", "3..1"),
        ("drop-layers:layers=1-2", "1-2"),
        ("drop-layers:layers=1|1..2", "layer 1 twice"),
    ],
)
def test_options_that_make_no_sense_are_refused(text: str, words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        parse_step(text)


@pytest.mark.parametrize(
    ("steps", "words"),
    [
        (["drop-layers:count=3"], "3 of 3 layers would go"),
        (["drop-layers:count=9,select=deepest"], "9 of 3 layers would go"),
        (["drop-layers:layers=0..2"], "3 of 3 layers would go"),
        (["drop-layers:layers=3"], "no layer 3 to drop: the model has layers 0..2"),
        (["drop-attention:count=3"], "3 of 3 attention sublayers"),
        (["drop-attention:layers=1", "drop-attention:layers=1"], "its attention is gone already"),
        (["drop-layers:layers=1..2", "drop-layers:layers=1"], "no layer 1 to drop"),
    ],
)
def test_what_cannot_go_is_refused_before_any_work(make_hf, tmp_path: Path, steps: list[str], words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        compress(make_hf("llama"), tmp_path / "out", steps, calibration="no such file")
    assert list(tmp_path.iterdir()) == []


def test_layers_are_read_and_written_as_ranges() -> None:
    assert parse_layers("drop-layers", ("7", "21..23", "0")) == [0, 7, 21, 22, 23]
    assert format_layers([0, 7, 21, 22, 23]) == ("0", "7", "21..23")


# patched


def report(result: halve.compression.compress.Result) -> dict[str, dict]:  # type: ignore[name-defined]
    return {line["name"]: line for line in result.manifest["steps"][0]["linears"]}


@pytest.fixture(scope="module")
def held_out(assets: Path) -> torch.Tensor:
    """Stories that no calibration window of `real` holds, [6, 200]."""
    source = assets / "models" / "stories260K"
    stories = (assets / "data" / "tinystories_317.txt").read_text().split("<|endoftext|>")[-12:]
    tokens = halve.load_tokenizer(source).encode(" ".join(stories), bos=True)
    return torch.tensor(tokens[: 6 * 200]).view(6, 200)


@torch.inference_mode()
def divergence(folder: Path, dense: Path, tokens: torch.Tensor) -> float:
    p, q = (load_model(each)(tokens).log_softmax(-1) for each in (dense, folder))
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.mark.parametrize("step", ["drop-layers:layers=2", "drop-attention:layers=1", "drop-mlp:layers=1"])
def test_a_patched_gap_costs_less(assets: Path, tmp_path: Path, held_out: torch.Tensor, step: str) -> None:
    source = assets / "models" / "stories260K"
    options = {"calibration": str(assets / "data" / "tinystories_317.txt"), "samples": 24, "window": 256}
    compress(source, tmp_path / "plain", [step])
    result = compress(source, tmp_path / "patched", [f"{step},patch=true"], **options)
    plain, patched = (divergence(tmp_path / each, source, held_out) for each in ("plain", "patched"))
    assert patched < 0.85 * plain
    for line in report(result).values():
        if line["action"] == "refitted":
            assert line["held_out_error_after"] <= line["held_out_error_before"] * (1 + 1e-5)
            assert line["bytes_after"] == line["bytes_before"] and line["alpha"] in (0.0, 0.25, 0.5)


def test_only_what_stands_around_the_gap_is_refitted(make_hf, tmp_path: Path, drawn_windows: None) -> None:
    source = make_hf("llama", num_hidden_layers=4)
    result = compress(source, tmp_path / "out", ["drop-layers:layers=2,patch=true"], calibration="drawn")
    refitted = {name for name, line in report(result).items() if line["action"] == "refitted"}
    assert refitted == {"model.layers.1.mlp.down_proj"} | {n for n in report(result) if n.startswith("model.layers.3.")}
    before, after = open_checkpoint(source), open_checkpoint(tmp_path / "out")
    for name in after.tensors.shapes:
        there = name.replace("layers.2.", "layers.3.")
        same = torch.equal(before.tensor(there), after.tensor(name))
        touched = there.removesuffix(".weight") in refitted
        alpha = report(result).get(there.removesuffix(".weight"), {}).get("alpha")
        assert same == (not touched or alpha == 0.0), name


@pytest.mark.parametrize(("kind", "options"), FAMILIES, ids=[f[0] for f in FAMILIES])
@pytest.mark.parametrize("step", ["drop-layers:layers=0", "drop-attention:layers=2", "drop-mlp:layers=1"])
def test_every_family_is_patched(
    make_hf, tmp_path: Path, drawn_windows: None, kind: str, options: dict, step: str
) -> None:
    """A first or last sublayer may go, too, and what is left still is a model of finite logits."""
    source = make_hf(kind, **options)
    result = compress(source, tmp_path / "out", [f"{step},patch=true"], calibration="drawn")
    assert torch.isfinite(logits(tmp_path / "out")).all()
    assert [line for line in report(result).values() if line["action"] == "refitted"]


def test_quantized_linears_are_not_patched(make_hf, tmp_path: Path, drawn_windows: None) -> None:
    source = make_hf("llama")
    with pytest.raises(RecipeError, match=r"patch=true changes weights, and model\.layers\.0\.self_attn\.q_proj is q"):
        compress(source, tmp_path / "out", ["rtn:bits=8", "drop-layers:layers=1,patch=true"], calibration="drawn")
    result = compress(source, tmp_path / "out", ["rtn:bits=8", "drop-layers:count=1"], calibration="drawn")
    assert not [line for line in report(result).values() if line["action"] == "refitted"]


def test_a_choice_by_hand_needs_no_text_unless_it_is_patched() -> None:
    assert not parse_step("drop-layers:layers=1").calibrates and parse_step("drop-layers:count=1").calibrates
    assert not parse_step("drop-layers:count=1,select=deepest").calibrates
    assert parse_step("drop-layers:layers=1,patch=true").calibrates
    assert not parse_step("drop-layers:count=1,patch=false").aims  # type: ignore[attr-defined]
    with pytest.raises(RecipeError, match=r"damping=2\.0 is not in \(0, 1\]"):
        parse_step("drop-layers:count=1,damping=2")
