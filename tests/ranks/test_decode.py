"""Ranks compute what one process computes: logits, tokens, sampled tokens, of every family and stored form."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from halve.checkpoint.reader import load_model
from halve.checkpoint.tensors import SafetensorsFolder
from halve.compression.compress import compress
from halve.decode.cpu_step import CpuStep
from halve.decode.engines import Engine
from halve.decode.generate import Decoder, generate
from halve.decode.sampling import Sampling
from halve.decode.torch_step import TorchStep
from halve.model.vocabulary_share import VocabularyShare
from halve.ranks.collective import ALONE, Ranks
from tests.common import FAMILIES, GEMMA, TOKENS, relative
from tests.model.test_longrope import CASES as LONGROPE
from tests.model.test_longrope import LIMIT
from tests.ranks.processes import on_ranks

# Both sides add the same products, in other orders: ranks add up parts of a sum of at most 48 terms. Such sums differ by a few
# roundings (2^-24 of float32, 2^-9 of bfloat16 after every layer), which six sublayers and a norm that divides by what is left
# grow by less than 30; tokens that are told apart by less could differ, random logits of these models are not so close.
TOLERANCE = {torch.float32: 30 * 2**-24, torch.bfloat16: 30 * 2**-9}
PROMPTS = [[5, 9, 3, 44], [7] * 11, [90, 2, 61, 33, 8, 8, 17]]
SAMPLED = Sampling(temperature=1.0, top_k=40, top_p=0.95, seed=3)


def computed(ranks: Ranks, folder: Path, dtype: torch.dtype) -> dict[str, Any]:
    """Logits, and what is generated from unequal prompts, greedily and not."""
    model = load_model(folder, dtype=dtype, ranks=ranks)
    options: list[dict[str, Any]] = [{}, {"sampling": SAMPLED}]
    return {
        "logits": model(TOKENS[:, :12]).float().clone(),
        "tokens": [[g.tokens for g in generate(model, PROMPTS, max_new_tokens=5, **o)] for o in options],
        "cache": model.new_cache(1, 8).nbytes,
        "bytes": model.weight_bytes(),
    }


def check(folder: Path, ranks: int, dtype: torch.dtype = torch.float32) -> None:
    with torch.inference_mode():
        expected = computed(ALONE, folder, dtype)
    for rank, found in enumerate(on_ranks(ranks, computed, folder, dtype)):
        assert isinstance(found, dict), (rank, found)
        assert relative(found["logits"], expected["logits"]) < TOLERANCE[dtype], rank
        if dtype == torch.float32:
            assert found["tokens"] == expected["tokens"], rank


@pytest.mark.parametrize(("family", "options"), FAMILIES)
def test_families_on_two_ranks(make_hf: Callable[..., Path], family: str, options: dict[str, Any]) -> None:
    check(make_hf(family, **options), 2)


@pytest.mark.parametrize(("family", "options"), FAMILIES)
def test_families_on_four_ranks(make_hf: Callable[..., Path], family: str, options: dict[str, Any]) -> None:
    """Of all but OPT two ranks have the same key/value head."""
    check(make_hf(family, **options), 4)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text", "opt"])
def test_bfloat16(make_hf: Callable[..., Path], family: str) -> None:
    check(make_hf(family, **dict(FAMILIES)[family]), 2, torch.bfloat16)


STEPS = {
    "int8 with the head": (["rtn:bits=8,targets=Linear|lm_head"], 2),
    "int4 g16": (["rtn:bits=4,group_size=16"], 4),
    "int3 g16 asymmetric": (["rtn:bits=3,group_size=16,symmetric=false"], 2),
    "kept inputs of int4": (["rtn:bits=4,group_size=16", "l1-inputs:fraction=0.3,shared=true"], 2),
    "removed outputs": (["l1-outputs:fraction=0.3,targets=Linear|lm_head", "rtn:bits=8"], 2),
    "hardly any inputs": (["l1-inputs:fraction=0.9"], 4),
    "sublayers gone": (["drop-mlp:layers=0", "drop-attention:layers=1", "rtn:bits=8"], 2),
}


@pytest.mark.parametrize("steps", STEPS)
def test_compressed_models(make_hf: Callable[..., Path], tmp_path: Path, steps: str) -> None:
    recipe, ranks = STEPS[steps]
    check(compress(make_hf("llama", attention_bias=True, mlp_bias=True), tmp_path / "out", recipe).out, ranks)


def test_pruned_layers(make_hf: Callable[..., Path], tmp_path: Path, drawn_windows: None) -> None:
    folder = make_hf("llama", num_attention_heads=8, num_key_value_heads=4)
    steps = ["prune-heads:widths=2|4|2", "prune-mlp:widths=21|48|7", "rtn:bits=4,group_size=16,fallback=channel"]
    check(compress(folder, tmp_path / "out", steps).out, 2)


TABLES: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"tie_word_embeddings": True}),
    ("llama", {"tie_word_embeddings": True, "vocab_size": 101}),
    ("llama", {}),  # of two, the embedding alone
    ("gemma2", {**GEMMA, "final_logit_softcapping": 5.0}),  # scaled rows
    ("opt", {}),  # learned positions beside them
    ("opt", {"word_embed_proj_dim": 16, "do_layer_norm_before": False}),  # projected
]
TABLE_STEPS = [
    "rtn:bits=8,targets=Embedding",
    "rtn:bits=4,group_size=16,targets=Linear|Embedding",
    "rtn:bits=3,group_size=8,symmetric=false,targets=Embedding|lm_head",
]


@pytest.mark.parametrize("step", TABLE_STEPS)
@pytest.mark.parametrize(("family", "options"), TABLES)
def test_packed_embeddings(
    make_hf: Callable[..., Path], tmp_path: Path, family: str, options: dict[str, Any], step: str
) -> None:
    check(compress(make_hf(family, **options), tmp_path / "out", [step]).out, 2)


def test_a_packed_embedding_on_more_ranks_and_in_bfloat16(make_hf: Callable[..., Path], tmp_path: Path) -> None:
    folder = compress(make_hf("llama", tie_word_embeddings=True), tmp_path / "out", [TABLE_STEPS[2]]).out
    check(folder, 4)
    check(folder, 2, torch.bfloat16)


def outgrown(ranks: Ranks, folder: Path) -> tuple[torch.Tensor, list[list[int]]]:
    """Logits on both sides of the limit, and what is generated across it, each of two prompts of unequal lengths."""
    model = load_model(folder, ranks=ranks)
    sides = torch.cat([model(TOKENS[:, :count])[:, -1] for count in (LIMIT, LIMIT + 1)])
    prompts = [TOKENS[0, : LIMIT - 3].tolist(), TOKENS[1, : LIMIT - 6].tolist()]
    return sides.clone(), [g.tokens for g in generate(model, prompts, max_new_tokens=9)]


def looked_up(ranks: Ranks, folder: Path, token: int) -> torch.Tensor:
    return load_model(folder, ranks=ranks)(torch.tensor([[5, token]]))


@pytest.mark.parametrize("token", [-1, 97])
def test_a_token_that_no_rank_has(make_hf: Callable[..., Path], token: int) -> None:
    """It is refused, as by one process; a row of zeros would stand for it."""
    folder = make_hf("llama")
    with pytest.raises(IndexError):
        looked_up(ALONE, folder, token)
    for found in on_ranks(2, looked_up, folder, token):
        assert isinstance(found, IndexError) and "vocabulary of 97" in str(found), found


@pytest.mark.parametrize("case", LONGROPE)
def test_a_text_that_outgrows_the_limit_of_its_keys(make_hf: Callable[..., Path], case: str) -> None:
    """All ranks make their keys again, in the compiled step as well. Phi-3 stores merged linears."""
    family, options = LONGROPE[case]
    folder = make_hf(family, **options)
    with torch.inference_mode():
        logits, tokens = outgrown(ALONE, folder)
    for found in on_ranks(2, outgrown, folder):
        assert isinstance(found, tuple), found
        assert relative(found[0], logits) < TOLERANCE[torch.float32]
        assert found[1] == tokens


def test_the_text_part_of_a_model_of_more(make_hf: Callable[..., Path], tmp_path: Path) -> None:
    text = make_hf("gemma3_text", **dict(FAMILIES)["gemma3_text"])
    config = {"model_type": "gemma3", "text_config": json.loads((text / "config.json").read_text())}
    (tmp_path / "config.json").write_text(json.dumps(config))
    tensors = {f"language_model.{name}": t for name, t in load_file(text / "model.safetensors").items()}
    save_file(tensors | {"vision_tower.weight": torch.ones(2, 2)}, tmp_path / "model.safetensors")
    check(tmp_path, 2)


def test_opt_with_projections_and_norms_of_sums(make_hf: Callable[..., Path]) -> None:
    check(make_hf("opt", word_embed_proj_dim=16, do_layer_norm_before=False), 2)


def test_ranks_hold_their_share(make_hf: Callable[..., Path]) -> None:
    folder = make_hf("llama", tie_word_embeddings=False, num_key_value_heads=4, vocab_size=100)
    whole = load_model(folder)
    norms = sum(32 * 4 for _ in range(2 * 3 + 1))
    for found in on_ranks(2, computed, folder, torch.float32):
        assert found["bytes"] - norms == (whole.weight_bytes() - norms) / 2
        assert found["cache"] == whole.new_cache(1, 8).nbytes / 2


def equal_logits(ranks: Ranks) -> list[int]:
    """Greedy tokens where the largest logit occurs twice: on both ranks, on one rank, at the border."""
    rows = torch.full((4, 7), -1.0)
    for row, tokens in enumerate([(1, 5), (0, 2), (3, 6), (2, 3)]):
        rows[row, list(tokens)] = 2.0
    vocabulary = VocabularyShare(ranks, 7)
    own = rows[:, vocabulary.own.start : vocabulary.own.stop]
    assert torch.equal(vocabulary.join(own), rows)
    return vocabulary.greedy(own)[0].flatten().tolist()


@pytest.mark.parametrize("ranks", [2, 3])
def test_the_first_of_equal_logits(ranks: int) -> None:
    assert on_ranks(ranks, equal_logits) == [[1, 0, 3, 2]] * ranks


def test_real_models(assets: Path) -> None:
    for name in ("stories260K", "babyllama-tok361"):
        check(assets / "models" / name, 2)


def test_a_single_file_is_read_in_parts(make_hf: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank that read a tensor whole would hold it whole for a while."""
    folder = make_hf("llama", tie_word_embeddings=False)
    monkeypatch.setattr(SafetensorsFolder, "get", lambda _, name: pytest.fail(f"{name} was read whole"))
    assert all(isinstance(found, dict) for found in on_ranks(2, computed, folder, torch.float32))


def stepped(ranks: Ranks, folder: Path, dtype: torch.dtype, engine: type[Engine]) -> list[torch.Tensor] | str:
    """Logits of all tokens at a few steps behind unequal prompts, or why the engine does not serve. What is fed is given:
    each of two engines might take another of two tokens that are nearly alike."""
    model = load_model(folder, dtype=dtype, ranks=ranks)
    if (reason := engine.serves(model, len(PROMPTS))) is not None:
        return reason
    decoder = Decoder(model, PROMPTS, 20, Sampling())
    decoder.engine = engine(model, len(PROMPTS), 20)
    decoder.cache = decoder.engine.cache
    decoder.prefill()
    found = []
    for token in (3, 47, 48, 91):  # at both sides of what ranks share the vocabulary at
        assert isinstance(decoder.engine, TorchStep)
        own = decoder.engine.logits(torch.tensor([[token], [token + 5], [96 - token]]))
        found.append(model.vocabulary.join(own.float()).clone())
    return found


# C and torch add up every product in other orders as well, on one rank too: some hundred roundings, of scaled rows most
STEP_TOLERANCE = {torch.float32: 100 * 2**-24, torch.bfloat16: TOLERANCE[torch.bfloat16]}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("family", "options"), FAMILIES)
def test_the_compiled_step_adds_up_what_torch_does(
    make_hf: Callable[..., Path], family: str, options: dict[str, Any], dtype: torch.dtype
) -> None:
    check_steps(make_hf(family, **options), dtype)


@pytest.mark.parametrize("step", TABLE_STEPS)
@pytest.mark.parametrize(("family", "options"), TABLES[:5])
def test_the_compiled_step_looks_packed_rows_up(
    make_hf: Callable[..., Path], tmp_path: Path, family: str, options: dict[str, Any], step: str
) -> None:
    folder = compress(make_hf(family, **options), tmp_path / "out", [step]).out
    check_steps(folder, torch.float32)


def check_steps(folder: Path, dtype: torch.dtype) -> None:
    in_c, by_torch = (on_ranks(2, stepped, folder, dtype, engine) for engine in (CpuStep, TorchStep))
    if isinstance(in_c[0], str):
        pytest.skip(in_c[0])
    for rank in range(2):
        for c, t in zip(in_c[rank], by_torch[rank], strict=True):
            assert relative(c, t) < STEP_TOLERANCE[dtype]
    # the same bits on all ranks
    assert all(torch.equal(a, b) for a, b in zip(in_c[0], in_c[1], strict=True))


def test_nothing_is_left_in_shared_memory(make_hf: Callable[..., Path]) -> None:
    before = set(Path("/dev/shm").glob("halve-*"))
    on_ranks(2, stepped, make_hf("llama"), torch.float32, CpuStep)
    assert set(Path("/dev/shm").glob("halve-*")) <= before


def test_what_the_compiled_step_leaves_to_torch(make_hf: Callable[..., Path]) -> None:
    reasons = on_ranks(2, stepped, make_hf("olmo2"), torch.float32, CpuStep)
    assert len(set(reasons)) == 1
    assert reasons[0] == "norms over the heads of all ranks" or "kernels" in reasons[0]
