"""The embedding, or the one table of embedding and head, quantized: plans, files, products, look-ups, engines."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from halve import load_model
from halve.checkpoint.reader import open_checkpoint
from halve.checkpoint.schemes import read_schemes
from halve.checkpoint.tensors import SafetensorsFolder
from halve.compression.compress import Request, compress, plan_recipe
from halve.compression.plan import dense_table
from halve.compression.recipe import as_steps
from halve.decode.cpu_step import CpuStep
from halve.decode.generate import Decoder
from halve.decode.sampling import Sampling
from halve.errors import CheckpointError, RecipeError
from halve.kernels.cpu import CpuMatmul
from halve.model.decoder import Model
from halve.model.linear import Linear
from halve.quantization import QuantSpec, quantize
from tests.common import GEMMA, TOKENS, logits, relative

Make = Callable[..., Path]
TIED: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"tie_word_embeddings": True}),
    ("llama", {"tie_word_embeddings": True, "vocab_size": 101}),  # no multiple of the rows of a block
    ("gemma3_text", {**GEMMA, "sliding_window_pattern": 2}),  # scaled embeddings
    ("gemma2", {**GEMMA, "final_logit_softcapping": 5.0}),
    ("opt", {}),
    ("opt", {"word_embed_proj_dim": 16, "do_layer_norm_before": False}),  # projected, learned positions
]
UNTIED: list[tuple[str, dict[str, Any]]] = [("llama", {}), ("opt", {"tie_word_embeddings": False})]
FLOAT32_ERROR = 1e-5  # some hundred roundings of 2^-24 along two or three layers


def embed_name(folder: Path) -> str:
    return open_checkpoint(folder).table_shape.name


def stored(folder: Path) -> dict[str, torch.Tensor]:
    return {name: t for file in folder.glob("*.safetensors") for name, t in load_file(file).items()}


def expanded(folder: Path) -> Model:
    """The model with every packed weight as the numbers it stands for, computed by torch alone."""
    model = load_model(folder, backend="reference")
    tied = model.head is model.table
    model.table = Linear(model.table.dense_weight())
    model.head = model.table if tied else model.head.replaced(weight=model.head.dense_weight())
    return model


def size_of(folder: Path) -> int:
    return SafetensorsFolder(folder).nbytes


@pytest.mark.parametrize("targets", ["embed_tokens", "Embedding", "lm_head", "*embed*", "Embedding|lm_head"])
def test_a_tied_model_has_one_table(make_hf: Make, tmp_path: Path, targets: str) -> None:
    """However it is named: one stored tensor, one object in memory, counted once, and the config says tied."""
    source = make_hf("llama", tie_word_embeddings=True)
    step = f"rtn:bits=8,group_size=16,targets={targets}"
    plan = plan_recipe(Request(str(source), tmp_path / "out", as_steps([step])))
    rows = {row.name: row for row in plan.steps[0].rows}
    assert "embedding and head in one" in rows["model.embed_tokens"].action
    assert "untie=true" in rows["lm_head"].reason and rows["lm_head"].bytes_after == 0
    out = compress(source, tmp_path / "out", [step]).out
    names = stored(out)
    assert "model.embed_tokens.weight_packed" in names and "model.embed_tokens.weight" not in names
    assert not any(name.startswith("lm_head") for name in names)
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is True
    model = load_model(out)
    assert model.head is model.table and model.table.quantized
    assert plan.bytes_after == size_of(out)
    # 97 rows of 32 bytes and two scales of 4 bytes, against 97 x 32 x 4 of weights
    assert size_of(source) - size_of(out) == 97 * 32 * 4 - 97 * (32 + 2 * 4) - 2 * 8  # weight_shape: two int64


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("family", "options"), TIED + UNTIED)
def test_logits_are_those_of_the_numbers_that_are_stored(
    make_hf: Make, tmp_path: Path, family: str, options: dict[str, Any], dtype: torch.dtype
) -> None:
    source = make_hf(family, **options)
    width = options.get("word_embed_proj_dim", 32)
    step = f"rtn:bits=4,group_size={width // 2},symmetric=false,targets=embed_tokens"
    out = compress(source, tmp_path / "out", [step]).out
    wanted = quantize(load_model(source).table.dense_weight(), QuantSpec(4, width // 2, False)).dequantize()
    model = load_model(out, dtype=dtype)
    assert torch.equal(model.table.dense_weight(), wanted)
    with torch.inference_mode():
        exact = expanded(out)(TOKENS)
        # bfloat16: some dozen roundings of 2^-9, and integer products whose x has 15 bits
        assert relative(model(TOKENS), exact) < (FLOAT32_ERROR if dtype == torch.float32 else 0.05)


@pytest.mark.parametrize(("family", "options"), [*TIED[:5], *UNTIED])
def test_the_step_in_c_looks_rows_up(make_hf: Make, tmp_path: Path, family: str, options: dict[str, Any]) -> None:
    out = compress(make_hf(family, **options), tmp_path / "out", ["rtn:bits=3,group_size=8,targets=Embedding"]).out
    model, exact = load_model(out), expanded(out)
    decoder = Decoder(model, [[5, 9, 3], [96, 0, 7]], 20, Sampling())
    assert isinstance(decoder.engine, CpuStep), decoder.passed_over
    rows = [[5, 9, 3], [96, 0, 7]]
    with torch.inference_mode():
        decoder.prefill()
        for token in (0, 96, 15, 16):  # the ends of the table, and of a block of it
            for row in rows:
                row.append(token)
            found = decoder.engine.logits(torch.tensor([[token], [token]]))
            assert relative(found, exact(torch.tensor(rows))[:, -1]) < FLOAT32_ERROR


def test_seeded_widths_and_groups(make_hf: Make, tmp_path: Path) -> None:
    """Look-up and product of every kernel against the numbers themselves."""
    draw = random.Random(0)
    for case in range(24):
        bits, symmetric = draw.choice((2, 3, 4, 8)), draw.random() < 0.5
        columns = draw.choice((32, 48, 60, 96, 160))
        group = draw.choice([-1, *(g for g in (4, 8, 12, 16, 20, 32) if columns % g == 0)])
        rows, generator = draw.randint(1, 70), torch.Generator().manual_seed(case)
        dtype = draw.choice((torch.float32, torch.bfloat16, torch.float16))
        weight = quantize(torch.randn(rows, columns, generator=generator), QuantSpec(bits, group, symmetric), dtype)
        if draw.random() < 0.3 and group != -1:  # columns gone: groups of unequal size
            weight = weight.columns(torch.randperm(columns, generator=generator)[: columns // 2].sort().values)
        exact, table = weight.dequantize(), Linear(weight)
        tokens = torch.randint(0, rows, (2, 5), generator=generator)
        wanted = exact[tokens]
        assert torch.equal(table.look_up(tokens, torch.float32), wanted), (bits, group, columns)
        table.select_backend("auto", torch.float32)
        assert isinstance(table.matmul, CpuMatmul)
        assert torch.equal(table.look_up(tokens, torch.float32), wanted), (bits, group, columns)
        assert torch.equal(table.look_up(tokens, torch.bfloat16), wanted.bfloat16())
        x = torch.randn(3, exact.shape[1], generator=generator)
        assert relative(table(x), x.double() @ exact.double().t()) < FLOAT32_ERROR
        for outside in (-1, rows):
            with pytest.raises(IndexError):
                table.look_up(torch.tensor([outside]), torch.float32)


def test_planned_bytes_of_seeded_schemes_are_the_written_ones(make_hf: Make, tmp_path: Path) -> None:
    draw = random.Random(1)
    for case in range(10):
        vocabulary, width = draw.randint(50, 140), draw.choice((32, 48, 80))
        options = {"vocab_size": vocabulary, "hidden_size": width, "tie_word_embeddings": draw.random() < 0.7}
        source = make_hf("llama", num_hidden_layers=1, **options)
        bits, symmetric = draw.choice((2, 3, 4, 8)), draw.choice(("true", "false"))
        group = draw.choice([-1, *(g for g in (4, 8, 12, 16, 20, 24) if width % g == 0)])
        targets, untie = draw.choice(
            [("Embedding", "false"), ("lm_head", "false"), ("*embed*|lm_head", "true"), ("lm_head", "true")]
        )
        step = f"rtn:bits={bits},group_size={group},symmetric={symmetric},targets={targets},untie={untie}"
        plan = plan_recipe(Request(str(source), tmp_path / f"{case}", as_steps([step])))
        out = compress(source, tmp_path / f"{case}", [step]).out
        assert plan.bytes_after == size_of(out), (options, step)
        model, tokens = (
            load_model(out),
            torch.randint(0, vocabulary, (2, 9), generator=torch.Generator().manual_seed(case)),
        )
        with torch.inference_mode():
            assert relative(model(tokens), expanded(out)(tokens)) < FLOAT32_ERROR, (options, step)


@pytest.mark.parametrize(("family", "options"), [TIED[0], TIED[2], UNTIED[0]])
def test_recipes_compose(make_hf: Make, tmp_path: Path, family: str, options: dict[str, Any]) -> None:
    """Before and after other steps, planned bytes are the written ones, and it runs."""
    recipes = [
        ["rtn:bits=8,targets=Embedding", "rtn:bits=4,group_size=16"],
        ["rtn:bits=4,group_size=16", "rtn:bits=8,group_size=16,targets=embed_tokens"],
        ["rtn:bits=4,group_size=8,targets=Linear|Embedding", "drop-layers:layers=1"],
        ["prune-mlp:fraction=0.3,multiple_of=16,score=l1,refit=false", "rtn:bits=8,targets=Linear|Embedding|lm_head"],
        ["rtn:bits=4,targets=Embedding", "l1-inputs:fraction=0.25,targets=lm_head"],
    ]
    source = make_hf(family, **options)
    for number, recipe in enumerate(recipes):
        out = tmp_path / f"out-{number}"
        plan = plan_recipe(Request(str(source), out, as_steps(recipe)))
        compress(source, out, recipe)
        assert plan.bytes_after == size_of(out), recipe
        assert relative(logits(out), expanded(out)(TOKENS)) < FLOAT32_ERROR


def test_a_head_pruned_after_its_table_was_quantized_leaves_it(make_hf: Make, tmp_path: Path) -> None:
    source = make_hf("llama", tie_word_embeddings=True)
    one = compress(source, tmp_path / "one", ["rtn:bits=8,targets=Embedding"]).out
    two = compress(one, tmp_path / "two", ["l1-inputs:fraction=0.25,targets=lm_head"]).out
    before, after = load_model(one), load_model(two)
    assert torch.equal(before.table.dense_weight(), after.table.dense_weight())
    assert after.head is not after.table and after.head.input_index is not None
    assert torch.equal(after.head.dense_weight(), before.head.dense_weight()[:, after.head.input_index])


def test_untie_gives_the_head_a_tensor_of_its_own(make_hf: Make, tmp_path: Path) -> None:
    source = make_hf("llama", tie_word_embeddings=True)
    out = compress(source, tmp_path / "out", ["rtn:bits=4,targets=Embedding|lm_head,untie=true"]).out
    model = load_model(out)
    assert model.head is not model.table and model.head.quantized and model.table.quantized
    assert {f"{name}.weight_packed" for name in ("model.embed_tokens", "lm_head")} <= stored(out).keys()
    with pytest.raises(RecipeError, match="name lm_head"):
        plan_recipe(Request(str(source), tmp_path / "no", as_steps(["rtn:bits=4,targets=Embedding,untie=true"])))


@pytest.mark.parametrize("ignored", ["lm_head", "embed_tokens"])
def test_either_name_ignored_leaves_the_table(make_hf: Make, tmp_path: Path, ignored: str) -> None:
    step = f"rtn:bits=8,targets=Linear|Embedding|lm_head,ignore={ignored}"
    plan = plan_recipe(Request(str(make_hf("llama", tie_word_embeddings=True)), tmp_path, as_steps([step])))
    assert plan.steps[0].after.table.spec is None


def test_what_stays_dense_is_told(make_hf: Make, tmp_path: Path) -> None:
    """The step that a plan names does what the plan says."""
    for options, names in (({"tie_word_embeddings": True}, 1), ({}, 2)):
        source = make_hf("llama", hidden_size=128, **options)
        after = plan_recipe(Request(str(source), tmp_path / "out", as_steps(["rtn:bits=4"]))).steps[-1].after
        told = dense_table(after)
        assert told is not None and len(told.names) == names and "group_size=128" in told.step
        shrunk = (
            plan_recipe(Request(str(source), tmp_path / "out", as_steps(["rtn:bits=4", told.step]))).steps[-1].after
        )
        assert dense_table(shrunk) is None
        assert after.nbytes - shrunk.nbytes == told.nbytes - told.nbytes_after


@pytest.mark.usefixtures("drawn_windows")
@pytest.mark.parametrize(("family", "options"), [TIED[0], TIED[2], TIED[4], *UNTIED])
def test_gptq_of_a_table_is_at_least_as_good_as_rounding_for_what_it_minimizes(
    make_hf: Make, tmp_path: Path, family: str, options: dict[str, Any]
) -> None:
    source = make_hf(family, **options)
    common = "bits=3,group_size=16,targets=embed_tokens"
    errors = {}
    for name, step in (("gptq", f"gptq:{common}"), ("rtn", f"rtn:{common}")):
        out = compress(source, tmp_path / name, [step]).out
        dense, made = (load_model(folder).table.dense_weight() for folder in (source, out))
        errors[name] = float((made - dense).norm())
        (row,) = [
            r for r in json.loads((out / "halve.json").read_text())["steps"][0]["linears"] if r["action"] != "skipped"
        ]
        assert row["bytes_after"] == sum(t.nbytes for n, t in stored(out).items() if n.startswith(embed_name(out)))
    if not open_checkpoint(source).config.tied:
        # rows are only looked up: nearest codes under ranges chosen by squared error, never worse than full ranges
        assert errors["gptq"] <= errors["rtn"]


@pytest.mark.usefixtures("drawn_windows")
@pytest.mark.parametrize(("family", "options"), [TIED[0], TIED[2], TIED[5], *UNTIED])
def test_options_beyond_plain_gptq_leave_the_table_to_it(
    make_hf: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, options: dict[str, Any]
) -> None:
    """By itself the table has the same bytes with and without them; beside it the linears have those of a step of their own,
    and only they report a choice."""
    monkeypatch.setattr(
        "halve.compression.methods.problem.TOKENS_PER_CHANNEL", 0
    )  # the drawn tokens do for all linears
    further = "target=dense,refit=true,polish=2"
    source, common = make_hf(family, **options), "gptq:bits=3,group_size=8"
    steps = {
        "plain": f"{common},targets=Embedding",
        "table": f"{common},targets=Embedding,{further}",
        "linears": f"{common},{further}",
        "all": f"{common},targets=Linear|Embedding,{further}",
    }
    outs = {name: compress(source, tmp_path / name, [step]).out for name, step in steps.items()}
    plain, table, linears, both = (stored(outs[name]) for name in steps)
    assert plain.keys() == table.keys() and all(torch.equal(plain[name], t) for name, t in table.items())
    name = embed_name(source)
    changed = [each for each in linears if not each.startswith(name)]
    assert changed and all(torch.equal(linears[each], both[each]) for each in changed)
    assert f"{name}.weight_packed" in both
    rows = {row["name"]: row for row in json.loads((outs["all"] / "halve.json").read_text())["steps"][0]["linears"]}
    chose = {each for each, row in rows.items() if "accepted" in row}
    assert name not in chose and rows[name]["alpha"] == 0.0
    assert chose == {each for each, row in rows.items() if row["action"] != "skipped"} - {name}
    assert plan_recipe(Request(str(source), tmp_path / "no", as_steps([steps["all"]]))).bytes_after == size_of(
        outs["all"]
    )
    assert relative(logits(outs["all"]), expanded(outs["all"])(TOKENS)) < FLOAT32_ERROR


@pytest.mark.usefixtures("drawn_windows")
def test_a_head_untied_beside_its_table_aims_at_the_dense_stream(make_hf: Make, tmp_path: Path) -> None:
    source = make_hf("llama", tie_word_embeddings=True)
    step = "gptq:bits=3,group_size=8,targets=Linear|lm_head,untie=true,target=dense,refit=true,polish=2"
    out = compress(source, tmp_path / "out", [step]).out
    rows = {row["name"]: row for row in json.loads((out / "halve.json").read_text())["steps"][0]["linears"]}
    assert rows["lm_head"]["accepted"] in ("gptq", "refit", "polish") and "alpha" in rows["lm_head"]
    assert torch.isfinite(logits(out)).all()


@pytest.mark.usefixtures("drawn_windows")
def test_an_interrupted_run_goes_on(make_hf: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from halve.checkpoint.writer import CheckpointWriter

    source, steps = make_hf("llama", tie_word_embeddings=True), ["gptq:bits=4,group_size=16,targets=Linear|Embedding"]
    compress(source, tmp_path / "whole", steps)
    write = CheckpointWriter.write

    def stop(self: CheckpointWriter, part: int, *rest: Any) -> None:
        if part == 3:  # all blocks are there, the table is not
            raise KeyboardInterrupt
        write(self, part, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(CheckpointWriter, "write", stop)
        with pytest.raises(KeyboardInterrupt):
            compress(source, tmp_path / "out", steps)
    compress(source, tmp_path / "out", steps)
    for file in (*sorted((tmp_path / "whole").glob("*.safetensors")), tmp_path / "whole" / "halve.json"):
        assert file.read_bytes() == (tmp_path / "out" / file.name).read_bytes()


def test_schemes_of_other_writers() -> None:
    """`Embedding` as a class is the table and no linear; `Linear` is not the table."""
    weights = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}
    for target, found in (("Embedding", {"embed"}), ("Linear", {"a", "head"}), ("re:.*e.*", {"embed", "head"})):
        config = {"config_groups": {"group_0": {"targets": [target], "weights": weights}}}
        assert read_schemes(config, ["a", "head"], "here", "embed").keys() == found


def test_a_table_without_all_of_its_rows_is_refused(make_hf: Make, tmp_path: Path) -> None:
    out = compress(make_hf("llama"), tmp_path / "out", ["l1-outputs:fraction=0.25,targets=lm_head"]).out
    config = json.loads((out / "config.json").read_text())
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert config["model_type"] == "halve" and "lm_head.kept_outputs" in index["weight_map"]
    from safetensors.torch import save_file

    shard = out / index["weight_map"]["lm_head.weight"]
    tensors = load_file(shard)
    for part in ("weight", "kept_outputs"):
        tensors[f"model.embed_tokens.{part}"] = tensors[f"lm_head.{part}"].clone()
        index["weight_map"][f"model.embed_tokens.{part}"] = shard.name
    save_file(tensors, shard)
    (out / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="an embedding has all"):
        open_checkpoint(out)
