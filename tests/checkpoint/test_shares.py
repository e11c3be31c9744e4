"""What ranks hold of a stored model: put together it is the model, byte for byte of every code, and nothing is read twice."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from halve.checkpoint.reader import Checkpoint, open_checkpoint
from halve.checkpoint.shares import SharedTensors
from halve.compression.compress import compress
from halve.errors import HalveError
from halve.model.decoder import Block
from halve.model.linear import Linear
from halve.model.shares import split
from halve.model.wiring import STREAM, WIRES
from halve.quantization import CodeRun, QuantSpec, code_run, cut_run, pack, quantize, unpack
from tests.common import full_weight

STEPS: dict[str, list[str]] = {
    "dense": [],
    "int8": ["rtn:bits=8"],
    "head": ["rtn:bits=8,targets=Linear|lm_head"],
    "table and head": ["rtn:bits=3,group_size=8,symmetric=false,targets=Linear|lm_head|Embedding"],
    "int4 g16": ["rtn:bits=4,group_size=16"],
    "int4 g8 asymmetric": ["rtn:bits=4,group_size=8,symmetric=false,targets=Linear|lm_head"],
    "int3 g16 asymmetric": ["rtn:bits=3,group_size=16,symmetric=false"],
    "int3": ["rtn:bits=3"],
    "int2 g4": ["rtn:bits=2,group_size=4"],
    "kept inputs": ["l1-inputs:fraction=0.3,targets=Linear|lm_head"],
    "kept inputs of codes": ["rtn:bits=4,group_size=16,symmetric=false", "l1-inputs:fraction=0.3"],
    "kept inputs of int3": ["rtn:bits=3,group_size=8", "l1-inputs:fraction=0.3,shared=true"],
    "removed outputs": ["l1-outputs:fraction=0.3,targets=Linear|lm_head", "rtn:bits=4,group_size=16"],
    "both": ["rtn:bits=4,group_size=16,symmetric=false", "l1-inputs:fraction=0.2", "l1-outputs:fraction=0.2"],
    "hardly any inputs": ["l1-inputs:fraction=0.9"],
    "hardly any outputs": ["rtn:bits=8", "l1-outputs:fraction=0.97"],
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "opt": ("opt", {}),
}


def check_shares(checkpoint: Checkpoint, ranks: int) -> None:
    """Every linear of every rank is the part of the whole one that its share names; its bias is added once."""
    dtype = torch.float32
    shares = list(zip(split(checkpoint.config, ranks), checkpoint.shares(ranks), strict=True))
    for index, layer in enumerate(checkpoint.config.layers):
        whole = checkpoint.block(index, dtype)
        blocks = [own.block(index, dtype) for _, own in shares]
        for role, linear in whole.linears.items():
            assert isinstance(linear, Linear)
            shape = next(s for s in checkpoint.linear_shapes() if (s.layer, s.role) == (index, role))
            expected, biases = full_weight(linear), []
            for (share, _), block in zip(shares, blocks, strict=True):
                own, part = block.linears[role], share.linear(shape)
                assert isinstance(own, Linear)
                assert (own.in_features, own.out_features) == (len(part.columns), len(part.rows))
                wanted = expected[part.rows.start : part.rows.stop, part.columns.start : part.columns.stop]
                assert torch.equal(full_weight(own), wanted), (role, share.rank)
                if own.bias is not None and linear.bias is not None:
                    added = WIRES[role].writes == STREAM  # what ranks compute is added up, and with it their biases
                    biases.append(own.bias if added else own.bias - linear.bias[part.rows.start : part.rows.stop])
            if linear.bias is not None:
                added = WIRES[role].writes == STREAM
                assert torch.equal(torch.stack(biases).sum(0), linear.bias) if added else not torch.cat(biases).any()
        assert all(isinstance(block, Block) and block.layer.num_heads == layer.num_heads // ranks for block in blocks)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("steps", STEPS)
def test_shares_are_parts_of_the_whole(make_hf: Callable[..., Path], tmp_path: Path, steps: str, family: str) -> None:
    kind, options = FAMILIES[family]
    folder = make_hf(kind, tie_word_embeddings=False, **options)
    if STEPS[steps]:
        folder = compress(folder, tmp_path / "out", STEPS[steps]).out
    checkpoint = open_checkpoint(folder)
    dtype = torch.float32
    for ranks in (2, 4):
        check_shares(checkpoint, ranks)
        shares = list(checkpoint.shares(ranks))
        heads = [full_weight(own.head(dtype, "cpu")) for own in shares]
        assert torch.equal(torch.cat(heads), full_weight(checkpoint.head(dtype, "cpu")))
        tables = [own.table(dtype).dense_weight() for own in shares]
        assert torch.equal(torch.cat(tables), checkpoint.table(dtype).dense_weight())


@pytest.mark.parametrize("ranks", [2, 4])
def test_pruned_and_dropped_layers(
    make_hf: Callable[..., Path], tmp_path: Path, ranks: int, drawn_windows: None
) -> None:
    folder = make_hf("llama", num_attention_heads=16, num_key_value_heads=8, head_dim=4, num_hidden_layers=4)
    steps = [
        "prune-heads:widths=4|8|4|8,refit=false",
        "prune-mlp:widths=20|48|36|8,refit=false",
        "drop-mlp:layers=1",
        "drop-attention:layers=2",
        "rtn:bits=4,group_size=4",
    ]
    checkpoint = open_checkpoint(compress(folder, tmp_path / "out", steps).out)
    shares = list(checkpoint.shares(ranks))
    assert [len(own.block(1, torch.float32).linears) for own in shares] == [4] * ranks
    assert [len(own.block(2, torch.float32).linears) for own in shares] == [3] * ranks
    widths = [[layer.intermediate_size for layer in own.config.layers] for own in shares]
    assert widths == [[20 // ranks, 0, 36 // ranks, 8 // ranks]] * ranks


@pytest.mark.parametrize("steps", ["dense", "table and head", "int3 g16 asymmetric", "both", "hardly any inputs"])
def test_the_plan_tells_what_is_read_and_held(make_hf: Callable[..., Path], tmp_path: Path, steps: str) -> None:
    folder = make_hf("llama", tie_word_embeddings=False)
    if STEPS[steps]:
        folder = compress(folder, tmp_path / "out", STEPS[steps]).out
    for own in open_checkpoint(folder).shares(4):
        assert isinstance(own.tensors, SharedTensors)
        for name, planned in own.tensors.plan.items():
            before = own.tensors.read_bytes
            tensor = own.tensors.get(name)
            assert own.tensors.read_bytes - before == planned.read_bytes, name
            assert (tuple(tensor.shape), tensor.dtype, tensor.nbytes) == (planned.shape, planned.dtype, planned.nbytes)
            assert tensor.untyped_storage().nbytes() == tensor.nbytes  # nothing of the others' is held


def test_dense_shares_are_read_once(make_hf: Callable[..., Path]) -> None:
    """Of a dense model ranks read every number once, and what all of them need (norms) once each."""
    folder = make_hf("llama", tie_word_embeddings=False, attention_bias=True)
    checkpoint = open_checkpoint(folder)
    shares = [own.tensors for own in checkpoint.shares(2)]
    read = sum(plan.read_bytes for own in shares if isinstance(own, SharedTensors) for plan in own.plan.values())
    norms = sum(4 * shape[0] for name, shape in checkpoint.tensors.shapes.items() if "norm" in name)
    total = sum(4 * torch.Size(shape).numel() for shape in checkpoint.tensors.shapes.values())
    assert read == total + norms


@pytest.mark.parametrize(
    ("options", "ranks", "said"),
    [
        ({"intermediate_size": 3}, 4, "layer 0 has an MLP of 3 channels, .* 4 or more fit"),
        (
            {"num_attention_heads": 6, "num_key_value_heads": 3, "hidden_size": 48},
            2,
            "3 key/value heads, .* 2 or 4 key/value",
        ),
        ({"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 8}, 3, "2 key/value heads, .* 3 key/value"),
        ({"num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": 3}, 4, "a vocabulary of 3 tokens"),
    ],
)
def test_what_cannot_be_shared_is_refused(
    make_hf: Callable[..., Path], options: dict[str, int], ranks: int, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = open_checkpoint(make_hf("llama", **options))
    monkeypatch.setattr(type(checkpoint.tensors), "get", lambda *_: pytest.fail("a tensor was read"))
    with pytest.raises(HalveError, match=said):
        list(checkpoint.shares(ranks))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_runs_of_codes(bits: int) -> None:
    generator = torch.Generator().manual_seed(bits)
    low, high = -(1 << (bits - 1)), 1 << (bits - 1)
    codes = torch.randint(low, high, (3, 131), generator=generator).to(torch.int8)
    packed = pack(codes, bits)
    for first, end in [(0, 131), (0, 32), (32, 64), (1, 2), (31, 33), (64, 131), (65, 130), (130, 131), (96, 128)]:
        run = code_run(range(first, end), bits)
        cut = cut_run(packed[:, run.words.start : run.words.stop], run)
        assert torch.equal(cut, pack(codes[:, first:end], bits))
        assert torch.equal(unpack(cut, bits, end - first), codes[:, first:end])
        # no word is read that holds none of the codes, but for those that a 3-bit code begins in
        assert len(run.words) <= -(-(end - first) * bits // 32) + (3 if bits == 3 else 1)


def test_a_run_of_whole_words_is_not_packed_again() -> None:
    weight = quantize(torch.randn(4, 64, generator=torch.Generator().manual_seed(0)), QuantSpec(4, 16))
    assert code_run(range(16, 40), 4) == CodeRun(range(2, 5), 0, 24, 4)
    words = weight.packed[:, 2:5]
    assert cut_run(words, code_run(range(16, 40), 4)) is words
