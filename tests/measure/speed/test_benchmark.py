"""The benchmark: figures against bytes and delays counted independently, and what it refuses or leaves unmeasured."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from halve.checkpoint.reader import load_model
from halve.cli import terminal as show
from halve.errors import HalveError, OutputError
from halve.kernels import cpu
from halve.measure import machine
from halve.measure.kinds import BenchmarkRecord
from halve.measure.records import read_record, write_record
from halve.measure.speed import benchmark as module
from halve.measure.speed import timed_model, timing
from halve.measure.speed.benchmark import benchmark, benchmark_side_by_side
from halve.measure.speed.peak_memory import peak_memory
from halve.measure.speed.profiling import memory_timeline
from halve.measure.speed.timed_model import BenchmarkOptions, ExtraTiming, Placement
from halve.measure.speed.timing import PassTimes, kv_bytes_per_step, random_prompt, spread, time_pass

pytestmark = pytest.mark.slow

CONTRACT = """prefill_tokens_per_s ttft_ms decode_ms_median decode_ms_p10 decode_ms_p90 decode_tokens_per_s weight_bytes
    peak_memory_bytes bandwidth_gb_per_s floor_share kernels device halve_version torch_version machine command model
    recipe""".split()


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """No second process and a bandwidth of 8 GB/s: for tests of everything else."""
    monkeypatch.setattr(module, "bandwidth_gb_per_s", lambda device: 8.0)
    monkeypatch.setattr(timed_model, "peak_memory", lambda *_, **__: {"baseline": 100, "loaded": 150, "peak": 180})


@pytest.fixture(scope="module")
def folder(make_hf: Callable[..., Path]) -> Path:
    """An untied Llama with 256 positions."""
    return make_hf("llama", max_position_embeddings=256, tie_word_embeddings=False)


def file_bytes(folder: Path) -> int:
    """Bytes of all tensors in a folder's one safetensors file, from its header."""
    with open(folder / "model.safetensors", "rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    return max(entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__")


def test_a_real_run_has_every_figure(folder: Path, tmp_path: Path) -> None:
    record = benchmark(folder, prompt_tokens=16, new_tokens=8, runs=5, long_prompt_tokens=200)
    assert record.keys() >= set(CONTRACT)
    assert set(record) <= set(BenchmarkRecord.__annotations__), "a key that records.py does not name"
    assert read_record(write_record(tmp_path / "r.json", record)) == record
    assert record["device"] == "cpu"
    assert sum(record["kernels"].values()) == 3 * 4 + 1  # q/k/v and gate/up are merged: 4 a layer, and the head
    assert record["weight_bytes"] == file_bytes(folder)
    assert record["decode_ms_p10"] <= record["decode_ms_median"] <= record["decode_ms_p90"]
    assert math.isclose(record["prefill_tokens_per_s"], 16_000 / record["ttft_ms"])
    assert record["long_prompt"]["prompt_tokens"] == 200
    assert record["long_prompt"]["ttft_ms"] > 0
    assert record["long_prompt"]["peak_memory_bytes"] >= record["peak_memory_bytes"]
    assert (record["peak_memory_prompt_tokens"], len(record["bandwidths_beside_gb_per_s"])) == (16, 5)
    # Python with PyTorch alone is above 100 MB, this model is below 1 MB
    assert 1e8 < record["baseline_memory_bytes"] <= record["peak_memory_bytes"] < 2e9
    assert 0.2 < record["bandwidth_gb_per_s"] < 5_000
    assert "accuracy" in record["not_measured"] and "system1" not in record


@pytest.mark.usefixtures("quick")
def test_floor_counts_weights_one_embedding_row_keys_and_values(folder: Path) -> None:
    record = benchmark(folder, prompt_tokens=10, new_tokens=4, runs=1, long_prompt_tokens=0)
    # untied: of the 97 x 32 embedding one row is read. 3 layers, 2 heads of 8 for keys and for values, fp32;
    # the three steps see 11, 12 and 13 tokens
    weights = file_bytes(folder) - 96 * 32 * 4
    keys_values = 3 * 2 * 2 * 8 * 4 * 12
    assert record["floor_ms"] == pytest.approx((weights + keys_values) / 8e9 * 1e3)
    assert record["floor_share"] == pytest.approx(record["floor_ms"] / record["decode_ms_median"])
    assert record["not_measured"]["long_prompt"] == "not asked for"
    assert (record["peak_memory_bytes"], record["peak_memory_above_baseline_bytes"]) == (180, 80)


def test_the_floor_takes_the_best_bandwidth_and_says_how_it_varied(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Four runs of equal steps, the bandwidth before, between and after them: 4, 8, 2, 2 and 6 GB/s."""
    samples = iter([4.0, 8.0, 2.0, 2.0, 6.0])
    monkeypatch.setattr(module, "bandwidth_gb_per_s", lambda device: next(samples))
    monkeypatch.setattr(timed_model, "peak_memory", lambda *_, **__: {"peak": 180})
    monkeypatch.setattr(timed_model, "time_pass", lambda *_: PassTimes(10.0, [1.0] * 3))
    record = benchmark(folder, prompt_tokens=10, new_tokens=4, runs=4, long_prompt_tokens=0)
    assert record["bandwidth_gb_per_s"] == 8.0
    assert record["bandwidths_beside_gb_per_s"] == [8.0, 8.0, 2.0, 6.0]  # the better one of before and after
    share = record["floor_share"]
    assert share == pytest.approx(record["floor_ms"] / 1.0)
    # the same bytes against 8, 8, 2 and 6 GB/s: 1, 1, 4 and 4/3 times the share; the median is between 1 and 4/3
    assert record["floor_beside_share"] == pytest.approx(share * 7 / 6)
    assert record["floor_beside_share_p10"] == pytest.approx(share)
    assert any(
        note.startswith("the machine was busy: the bandwidth beside the runs was 2.0 to 8.0")
        for note in record["notes"]
    )
    show.benchmark(record)
    assert "of what the bandwidth beside each run allows" in capsys.readouterr().out


def test_sliding_windows_bound_the_keys_read(make_hf: Callable[..., Path]) -> None:
    model = load_model(make_hf("mistral", sliding_window=6))
    per_token = 3 * 2 * 2 * 8 * 4
    assert [kv_bytes_per_step(model, n) for n in (4, 6, 60)] == [4 * per_token, 6 * per_token, 6 * per_token]


def test_prefill_and_decode_are_timed_apart(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a clock that only the model's passes move: 80 ms for one of many tokens, 20 ms for one of a single token."""
    now_ms = 0.0

    def work(_: object, inputs: tuple[torch.Tensor, ...]) -> None:
        nonlocal now_ms
        now_ms += 80.0 if inputs[0].shape[1] > 1 else 20.0

    model = load_model(folder)
    model.blocks[0].register_forward_pre_hook(work)
    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: now_ms / 1e3))
    times = time_pass(model, random_prompt(model, 12, seed=0), 5)
    assert times.ttft_ms == pytest.approx(80.0)
    assert times.steps_ms == pytest.approx([20.0] * 4)


class Twice(ExtraTiming):
    """A study's timing that notes when it is asked."""

    name = "twice"
    new_tokens = 50

    def __init__(self) -> None:
        self.asked = 0

    def time(self, model: object, prompt: list[int]) -> tuple[float, ...]:
        self.asked += 1
        return float(len(prompt)), float(self.asked)

    def figures(self, rounds: Sequence[tuple[float, ...]]) -> dict[str, float]:
        return {"tokens": sum(tokens for tokens, _ in rounds), "first": rounds[0][1]}


@pytest.mark.usefixtures("quick")
def test_a_study_may_time_something_besides_in_every_round(folder: Path, make_hf: Callable[..., Path]) -> None:
    options = BenchmarkOptions(prompt_tokens=8, new_tokens=2, runs=2, long_prompt_tokens=0)
    (record,) = benchmark_side_by_side([folder], options, extra=Twice())
    assert record["twice"] == {"tokens": 16.0, "first": 2.0}  # the warm-up is thrown away
    (record,) = benchmark_side_by_side([make_hf("llama")], BenchmarkOptions(16, 2, 1, 0), extra=Twice())
    assert record["twice"] is None
    assert record["not_measured"]["twice"] == "16 prompt tokens + 50 new tokens exceed the model's context of 64"


def test_percentiles_by_hand() -> None:
    assert spread([float(v) for v in range(11)]) == (1.0, 5.0, 9.0)
    assert spread([4.0]) == (4.0, 4.0, 4.0)


@pytest.mark.usefixtures("quick")
def test_a_short_context_says_what_it_leaves_out(make_hf: Callable[..., Path]) -> None:
    record = benchmark(make_hf("llama"), prompt_tokens=16, new_tokens=8, runs=1)
    assert record["long_prompt"] is None
    assert "context of 64" in record["not_measured"]["long_prompt"]


@pytest.mark.usefixtures("quick")
def test_a_long_prompt_that_takes_too_long_is_left_out_unless_asked_for(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(timed_model, "LONG_PROMPT_TOKENS", 128)
    # 8 tokens take 3 s, so 128 take 48 s, and the warm-up and 9 runs 480 s = 8 minutes
    monkeypatch.setattr(timed_model, "time_pass", lambda model, prompt, new: PassTimes(3000.0, [1.0] * (new - 1)))
    measure = partial(benchmark, folder, prompt_tokens=8, new_tokens=3)
    record = measure(runs=9)
    assert record["long_prompt"] is None
    assert "would take about 8 minutes" in record["not_measured"]["long_prompt"]
    assert measure(runs=2)["long_prompt"]["prompt_tokens"] == 128
    assert measure(runs=9, long_prompt_tokens=128)["long_prompt"]["prompt_tokens"] == 128


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({}, "200 prompt tokens \\+ 64 new tokens exceed the context of .*, 256: lower --prompt-tokens"),
        ({"new_tokens": 1}, "new_tokens=1 is too small: use at least 2"),
        ({"runs": 0}, "runs=0"),
        ({"prompt_tokens": 0}, "prompt_tokens=0"),
        ({"device": "tpu9"}, "tpu9"),
        ({"prompt_tokens": 8, "new_tokens": 2, "backend": "none"}, "unknown backend 'none'"),
    ],
)
@pytest.mark.usefixtures("quick")
def test_wrong_requests_are_refused(folder: Path, options: dict[str, object], says: str) -> None:
    with pytest.raises(HalveError, match=says):
        benchmark(folder, **({"prompt_tokens": 200} | options))  # type: ignore[arg-type]


def test_a_bad_plot_path_is_found_before_the_work(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="there is no folder"):
        benchmark(folder, profile_plot=tmp_path / "none" / "plot.png")


@pytest.mark.usefixtures("quick")
def test_random_weights_need_a_config_only(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    record = benchmark(
        tmp_path, prompt_tokens=8, new_tokens=4, runs=1, random_weights=True, dtype=torch.float32, long_prompt_tokens=0
    )
    assert record["weight_bytes"] == file_bytes(folder)
    assert record["not_measured"]["accuracy"] == "the weights are random"
    assert record["command"].endswith("--device cpu --dtype fp32 --random-weights")


SHORT: dict[str, Any] = {
    "prompt_tokens": 8, "new_tokens": 4, "long_prompt_tokens": 0, "long_budget_s": 0.0, "dtype": "float32", "backend": "auto",
    "random_weights": True, "threads": 1,
}  # fmt: skip


def test_peak_memory_counts_the_model_and_not_the_caller(folder: Path, tmp_path: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    wide = {"vocab_size": 12_000, "hidden_size": 512, "intermediate_size": 1024}
    (tmp_path / "config.json").write_text(json.dumps(config | wide))
    weights = (2 * 12_000 * 512 + 3 * (2 * 512 * 32 + 2 * 512 * 16 + 3 * 512 * 1024)) * 4  # 4 heads of 8, 2 of them k/v
    ballast = torch.ones(256 << 20, dtype=torch.uint8)
    held = peak_memory(tmp_path, **SHORT | {"long_prompt_tokens": 120, "long_budget_s": None})
    above = held["peak"] - held["baseline"]
    assert weights < above < 2 * weights + 50e6
    assert held["baseline"] <= held["loaded"] <= held["peak"]
    assert held["peak_loading"] <= held["peak"] <= held["peak_long"] < held["peak"] + 100e6
    assert ballast.sum() > 0  # kept alive until here


@pytest.mark.usefixtures("quick")
def test_a_failed_memory_measurement_is_said_and_costs_nothing_else(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: object, **__: object) -> None:
        raise HalveError("the memory measurement ended with code -9")

    monkeypatch.setattr(timed_model, "peak_memory", killed)
    record = benchmark(folder, prompt_tokens=8, new_tokens=4, runs=1, long_prompt_tokens=0)
    assert record["peak_memory_bytes"] is None
    assert "code -9" in record["not_measured"]["peak_memory_bytes"]
    assert record["decode_ms_median"] > 0


def test_a_failing_worker_gives_its_last_line(tmp_path: Path) -> None:
    with pytest.raises(HalveError, match=r"ended with code 1: .*no such folder"):
        peak_memory(tmp_path / "none", **SHORT)


@pytest.mark.usefixtures("quick")
def test_side_by_side_takes_turns_and_gives_ratios(
    folder: Path, make_hf: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    other = make_hf("llama", max_position_embeddings=256, num_hidden_layers=1)
    order: list[int] = []

    def timed(model: object, prompt: list[int], new_tokens: int) -> object:
        layers = len(model.blocks)  # type: ignore[attr-defined]
        order.append(layers)
        return PassTimes(1.0, [2.0 * layers] * (new_tokens - 1))

    monkeypatch.setattr(timed_model, "time_pass", timed)
    options = BenchmarkOptions(prompt_tokens=8, new_tokens=4, runs=2, long_prompt_tokens=0)
    first, second = benchmark_side_by_side([folder, other], options, Placement())
    assert order == [3, 3, 1, 1] + [3, 1] * 2  # the warm-up of each, then two rounds
    assert first["side_by_side"]["decode_speed_to_first"] == 1.0
    assert second["side_by_side"]["decode_speed_to_first"] == pytest.approx(3.0)
    assert second["side_by_side"]["models"] == [str(folder), str(other)]
    with pytest.raises(HalveError, match="single model, 2 were given"):
        benchmark_side_by_side([folder, other], options, profile_plot=Path("x.png"))


@pytest.mark.usefixtures("quick")
def test_it_says_when_there_are_no_c_kernels(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cpu.load_library.cache_clear()
    monkeypatch.setenv("HALVE_NO_C", "1")
    try:
        record = benchmark(folder, prompt_tokens=8, new_tokens=3, runs=1, long_prompt_tokens=0)
    finally:
        cpu.load_library.cache_clear()
    assert record["kernels"] == {"torch.linear": 13} and record["decode_kernel"].startswith("torch (")
    show.benchmark(record)
    lines = [line for line in capsys.readouterr().out.splitlines() if "PyTorch's own operations ran" in line]
    assert lines == ["  PyTorch's own operations ran: the C kernels are switched off by HALVE_NO_C"]


@pytest.mark.usefixtures("quick")
def test_the_profile_names_operations_and_draws_the_memory(folder: Path, tmp_path: Path) -> None:
    plot = tmp_path / "plot.png"
    record = benchmark(folder, prompt_tokens=32, new_tokens=6, runs=1, long_prompt_tokens=0, profile_plot=plot)
    profile = record["profile"]
    calls = {row["operation"]: row["calls"] for row in profile["operations"]}
    (kernel,) = record["kernels"]
    assert calls[f"linear ({kernel})"] == 13 * 6  # every linear once a pass: a prefill and 5 steps
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert profile["memory_timeline"] == "plot.png"
    assert profile["phase_ms"].keys() == {"prefill", "decode"}
    # at least the cache: 3 layers, keys and values, 2 heads of 8, 37 slots of 4 bytes
    assert profile["peak_above_weights_bytes"] > 3 * 2 * 2 * 8 * 37 * 4


def test_the_memory_timeline_adds_up_allocations() -> None:
    def memory(ts: float, count: int, device: int = 0) -> dict[str, object]:
        return {"name": "[memory]", "ph": "i", "ts": ts, "args": {"Bytes": count, "Device Type": device}}

    events = [{"name": "op", "ph": "X", "ts": 1000.0}, memory(4000, -30), memory(2000, 50), memory(3000, 7, device=1)]
    assert memory_timeline(events, on_cuda=False) == [(1.0, 50), (3.0, 20)]
    assert memory_timeline(events, on_cuda=True) == [(2.0, 7)]


def test_bandwidth_is_that_of_memory_and_not_of_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    monkeypatch.setattr(machine, "_REPEATS", 1)
    monkeypatch.setattr(machine, "_READ_BUFFER_BYTES", 1 << 20)
    monkeypatch.setattr(machine, "last_level_cache_bytes", lambda: 24 << 20)
    ones = torch.ones
    monkeypatch.setattr(torch, "ones", lambda size, **options: sizes.append(4 * size) or ones(size, **options))
    assert machine.bandwidth_gb_per_s("cpu") > 0.1
    assert sizes[0] == 96 << 20  # four times the cache, however small the default


def test_this_process_is_seen_growing() -> None:
    before = machine.resident_bytes()
    held = torch.ones(64 << 20, dtype=torch.uint8)
    grown = machine.resident_bytes()["peak"] - before.get("now", before["peak"])
    assert grown > 0.9 * held.nbytes
