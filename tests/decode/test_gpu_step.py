"""The fused decode step against the model's own forward: on a GPU (captured) where there is one, else interpreted."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed: its kernels cannot run")

from halve.checkpoint.reader import load_model
from halve.compression.compress import compress
from halve.decode import gpu_launches, gpu_step
from halve.decode.generate import Decoder, generate
from halve.decode.gpu_step import CapturedStep, GpuStep
from halve.decode.sampling import Sampling
from halve.kernels import triton_backend
from halve.kernels.triton_backend import Tiling
from halve.model.decoder import Model
from tests.common import MINISTRAL3_ROPE
from tools.ptx.cpu import cpu_too

pytestmark = pytest.mark.slow

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HALF = {"rope_type": "default", "partial_rotary_factor": 0.5}
LONGROPE = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
PROMPTS = [[5, 9, 3, 44], [7] * 21, [90, 2, 61, 33, 8, 8, 17]]


@pytest.fixture(autouse=True)
def interpreted(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let models on the CPU through; few and large tiles, since the interpreter pays for each; short stretches of cache."""
    for name, value in (("_SLOTS", 16), ("_SHORTEST", 16), ("_SPLITS", 3)):
        monkeypatch.setattr(gpu_launches, name, value)
    if DEVICE == "cpu":
        monkeypatch.setattr(triton_backend, "runs_on", cpu_too)
        for module in (triton_backend, gpu_launches):
            monkeypatch.setattr(module, "tiling", lambda operand: Tiling(128))
    yield


def captured_by(decoder: Decoder) -> CapturedStep:
    assert isinstance(decoder.engine, GpuStep), decoder.kernel
    return decoder.engine.captured


def check_steps(
    folder: Path, prompts: list[list[int]], steps: int = 2, dtype: torch.dtype = torch.float32, error: float = 1e-4
) -> Model:
    """Logits of some steps after a prefill, against the forward of the reference backend fed the same tokens."""
    reference = load_model(folder, device=DEVICE, backend="reference", dtype=torch.float32)
    model = load_model(folder, device=DEVICE, backend="triton", dtype=dtype)
    with torch.inference_mode():
        decoder = Decoder(model, prompts, 64, Sampling())
        captured = captured_by(decoder)
        rows = [list(prompt) for prompt in prompts]
        tokens = decoder.prefill()
        for _ in range(steps):
            for row, (token,) in zip(rows, tokens.tolist(), strict=True):
                row.append(token)
            tokens = decoder.step(tokens)
            for number, row in enumerate(rows):
                wanted = reference(torch.tensor([row], device=DEVICE))[0, -1]
                found = captured.logits[number]
                assert float((found - wanted).norm() / wanted.norm()) < error
                assert int(tokens[number]) == int(found.argmax())
    return model


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama", {}),
        ("qwen3", {"head_dim": 8}),
        ("qwen2", {"tie_word_embeddings": True}),
        ("mistral", {"sliding_window": 18}),
        ("seed_oss", {"head_dim": 8, "attention_out_bias": True}),
    ],
)
def test_families(make_hf: Callable[..., Path], family: str, options: dict[str, Any]) -> None:
    folder = make_hf(family, num_hidden_layers=2, **options)
    if family == "llama":  # several rows, of several lengths
        check_steps(folder, PROMPTS[:2], steps=1)
    else:
        check_steps(folder, PROMPTS[1:2])


@pytest.mark.parametrize(
    "steps",
    [
        ["rtn:bits=8"],
        ["rtn:bits=4,group_size=16", "rtn:bits=8,targets=lm_head"],
        ["l1-inputs:fraction=0.25"],
        ["rtn:bits=4,group_size=16", "l1-inputs:fraction=0.25"],
        ["l1-outputs:fraction=0.2,targets=Linear|lm_head"],
        ["drop-attention:layers=0", "prune-mlp:widths=32|16,score=l1,refit=false"],
    ],
)
def test_compressed_models(make_hf: Callable[..., Path], tmp_path: Path, steps: list[str]) -> None:
    folder = make_hf("llama", num_hidden_layers=2)
    compress(folder, tmp_path / "out", steps, dtype=torch.float32)
    check_steps(tmp_path / "out", PROMPTS[1:2])


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    "step", ["bits=8,group_size=16", "bits=4", "bits=3,group_size=8,symmetric=false"], ids=["8", "4", "3 ragged"]
)
def test_a_packed_table(make_hf: Callable[..., Path], tmp_path: Path, tied: bool, step: str) -> None:
    """Rows looked up from it, and where it is tied its product as the head; groups of 8 are stored in another order."""
    folder = make_hf("llama", num_hidden_layers=1, tie_word_embeddings=tied)
    compress(folder, tmp_path / "out", [f"rtn:{step},targets=embed_tokens"])
    model = check_steps(tmp_path / "out", PROMPTS[1:2], steps=1)
    assert model.table.quantized and (model.head is model.table) == tied
    tokens = torch.tensor([[0, 96, 15], [16, 5, 5]], device=DEVICE)
    exact = load_model(tmp_path / "out", device=DEVICE, backend="reference").table.dense_weight()
    assert torch.equal(model.table.look_up(tokens, torch.float32), exact[tokens])


@pytest.mark.parametrize(("dtype", "error"), [(torch.bfloat16, 0.03), (torch.float16, 0.004)])
def test_half_precision(make_hf: Callable[..., Path], tmp_path: Path, dtype: torch.dtype, error: float) -> None:
    """Some ten roundings of 2^-9 (2^-12) along the residual stream of two layers; codes are exact in both."""
    folder = make_hf("llama", num_hidden_layers=2)
    compress(folder, tmp_path / "out", ["rtn:bits=4,group_size=16", "l1-inputs:fraction=0.25"], dtype=torch.float32)
    check_steps(tmp_path / "out", PROMPTS[1:2], dtype=dtype, error=error)


def test_generation_uses_the_step_and_keeps_it(make_hf: Callable[..., Path]) -> None:
    folder = make_hf("llama", num_hidden_layers=1)
    ordinary = load_model(folder, device=DEVICE, backend="reference")
    model = load_model(folder, device=DEVICE, backend="triton")
    for sampling in (Sampling(), Sampling(temperature=0.8, top_k=20, seed=3)):
        made = generate(model, PROMPTS[:2], max_new_tokens=3, sampling=sampling)
        assert made == generate(ordinary, PROMPTS[:2], max_new_tokens=3, sampling=sampling)
    kept = gpu_step._LAST_STEPS[model]
    again = Decoder(model, PROMPTS[:2], 24, Sampling())
    assert captured_by(again) is kept and "fused kernels" in again.kernel
    del again
    # two decoders at once do not share a cache
    one = Decoder(model, PROMPTS, 40, Sampling())
    two = Decoder(model, PROMPTS, 40, Sampling())
    assert one.cache is not two.cache


@pytest.mark.skipif(DEVICE == "cuda", reason="a GPU captures in every other test")
@pytest.mark.parametrize("fails", [False, True])
def test_capturing_leaves_the_state_as_it_was(
    make_hf: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, fails: bool
) -> None:
    """Without a GPU: a stand-in for CUDA graphs, whose capture does nothing or fails and whose replay runs the step."""
    folder = make_hf("llama", num_hidden_layers=1)
    wanted = generate(load_model(folder, backend="reference"), PROMPTS[:1], max_new_tokens=4)
    model = load_model(folder, backend="triton")
    decoder = Decoder(model, PROMPTS[:1], 40, Sampling())
    step = captured_by(decoder)
    tokens = decoder.prefill()

    @contextmanager
    def capture(graph: object, **options: object) -> Iterator[None]:
        with monkeypatch.context() as patch:
            patch.setattr(step, "_run", lambda greedy: None)
            yield
        if fails:
            raise RuntimeError("operation not permitted when stream is capturing")

    stream = SimpleNamespace(wait_stream=lambda other: None)
    cuda = SimpleNamespace(
        Stream=lambda device: stream,
        current_stream=lambda device: stream,
        stream=lambda stream: nullcontext(),
        set_stream=lambda stream: None,
        CUDAGraph=lambda: SimpleNamespace(replay=lambda: step._run(True)),
        graph=capture,
    )
    monkeypatch.setattr(gpu_step, "torch", SimpleNamespace(**(vars(torch) | {"cuda": cuda})))
    monkeypatch.setattr(triton_backend, "current", lambda device: nullcontext())
    monkeypatch.setattr(step, "device", torch.device("cuda"))
    made = [int(tokens)]
    for _ in range(3):
        tokens = decoder.step(tokens)
        made.append(int(tokens))
    assert made == wanted[0].tokens
    assert int(step.turn) == 3 and int(step.position) == len(PROMPTS[0]) + 3
    assert ("no CUDA graph: operation not permitted" if fails else "in a CUDA graph") in decoder.kernel


def test_a_row_at_the_end_of_the_context_does_not_disturb_the_others(make_hf: Callable[..., Path]) -> None:
    folder = make_hf("llama", num_hidden_layers=1)
    ordinary = load_model(folder, device=DEVICE, backend="reference")
    model = load_model(folder, device=DEVICE, backend="triton")
    prompts = [[3] * 64, [4] * 62]
    made = generate(model, prompts, max_new_tokens=20)
    assert made == generate(ordinary, prompts, max_new_tokens=20)
    assert [len(row.tokens) for row in made] == [1, 3]


@pytest.mark.parametrize(
    ("family", "options", "reason"),
    [
        ("gemma2", {}, "norms of what sublayers write"),
        ("gemma3_text", {}, "norms of what sublayers write"),
        ("smollm3", {"pad_token_id": 0, "no_rope_layer_interval": 2}, "rotary embeddings that differ between layers"),
        ("granite", {}, "scaled embeddings, scores, sums or logits"),
        ("olmo2", {}, "not a Llama-like block"),
        ("arcee", {}, "not a Llama-like block"),
        ("ernie4_5", {}, "of neighbours"),
        ("ministral3", {"rope_parameters": MINISTRAL3_ROPE}, "queries that grow"),
        ("phi3", {"pad_token_id": 0, "rope_parameters": HALF}, "a part of each head"),
        ("phi3", {"pad_token_id": 0, "rope_parameters": LONGROPE}, "that a text's length changes"),
    ],
)
def test_families_that_cannot_be_fused_say_why(make_hf, family: str, options: dict, reason: str) -> None:
    decoder = Decoder(load_model(make_hf(family, **options), device=DEVICE), [[1, 2]], 4, Sampling())
    assert reason in decoder.passed_over["gpu"] and reason in decoder.kernel


def test_what_cannot_be_fused_says_why(make_hf: Callable[..., Path]) -> None:
    opt = load_model(make_hf("opt"), device=DEVICE)
    decoder = Decoder(opt, [[1, 2]], 4, Sampling())
    assert (
        decoder.passed_over["gpu"] == "learned positions or projections"
        and decoder.passed_over["gpu"] in decoder.kernel
    )
    llama = load_model(make_hf("llama"), device=DEVICE, backend="reference")
    assert "runs torch.linear" in Decoder(llama, [[1, 2]], 4, Sampling()).kernel
    assert GpuStep.serves(llama, 17) == "17 prompts at once, the fused kernels take 16"


def test_the_cost_of_attention_follows_the_live_length(monkeypatch: pytest.MonkeyPatch) -> None:
    """Slots beyond the live ones are never read: filled with NaN they change nothing."""
    from halve.kernels import triton_attention as kernels

    torch.manual_seed(0)
    heads, groups, size, capacity, position = 6, 2, 16, 96, 37
    qkv = torch.randn(1, (heads + 2 * groups) * size, device=DEVICE)
    keys, values = (torch.randn(1, groups, capacity, size, device=DEVICE) for _ in range(2))
    keys[:, :, position:], values[:, :, position:] = float("nan"), float("nan")
    cos, sin = torch.ones(capacity, size, device=DEVICE), torch.zeros(capacity, size, device=DEVICE)
    where = torch.tensor([position], dtype=torch.int32, device=DEVICE)
    for splits in (1, 4):
        out = torch.zeros(1, heads * size, device=DEVICE)
        partial, stats = torch.empty(2 * 4 * 16 * 16, device=DEVICE), torch.empty(2 * 4 * 16 * 2, device=DEVICE)
        arrived = torch.zeros(groups, dtype=torch.int32, device=DEVICE)
        kernels.attend[(groups, splits)](
            qkv, qkv, qkv, cos, sin, keys, values, where, out, out, partial, stats, arrived, heads, groups, size, capacity,
            0, qkv.stride(0), out.stride(0), 0.0, size**-0.5, QK_NORM=False, PLACED=False, HEADS_A_GROUP=3, R=16, D=16, S=16,
            SPLITS=splits, SHORTEST=16, PLAIN=DEVICE == "cpu", **triton_backend.launch_options(4),
        )  # fmt: skip
        q = qkv[0, : heads * size].view(groups, 3, size).double()
        k, v = (t[0, :, : position + 1].double() for t in (keys, values))
        wanted = ((q @ k.transpose(1, 2)) * size**-0.5).softmax(-1) @ v
        assert torch.allclose(out.view(groups, 3, size).double(), wanted, atol=1e-5)
        assert not arrived.any()
