"""How ranks begin and end together: what is not the same is refused, and no rank waits for one that is gone."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from halve.checkpoint.reader import load_model
from halve.decode.generate import generate
from halve.errors import HalveError
from halve.kernels.cpu import load_library
from halve.ranks.board import RankLostError
from halve.ranks.collective import Ranks
from halve.ranks.group import RankGroup
from halve.ranks.job import check_ranks, device_of_rank, job
from tests.ranks.processes import on_ranks


def generate_until(ranks: Ranks, folder: Path, end: Callable[[], None]) -> None:
    """Every rank generates; the last one ends in the middle of it."""
    model = load_model(folder, ranks=ranks)

    def on_token(row: int, token: int) -> None:
        if ranks.rank == ranks.size - 1:
            end()

    generate(model, [[1, 2, 3]], max_new_tokens=50, on_token=on_token)


def killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def out_of_memory() -> None:
    raise MemoryError("no room for 7 bytes")


@pytest.mark.parametrize("ranks", [2, 3])
def test_a_rank_that_is_killed_ends_the_job(make_hf: Callable[..., Path], ranks: int) -> None:
    folder = make_hf("llama", num_attention_heads=6, num_key_value_heads=3 if ranks == 3 else 2, hidden_size=48)
    *others, gone = on_ranks(ranks, generate_until, folder, killed)
    assert gone == -signal.SIGKILL
    first, *quiet = others
    assert isinstance(first, RankLostError)
    assert f"rank {ranks - 1} ended without a word" in str(first)
    # they would say the same, and say nothing where they hear so in time
    assert all(isinstance(error, SystemExit | RankLostError) for error in quiet)


def test_a_rank_without_memory_ends_the_job_with_its_reason(make_hf: Callable[..., Path]) -> None:
    other, own = on_ranks(2, generate_until, make_hf("llama"), out_of_memory)
    assert isinstance(own, MemoryError)
    assert isinstance(other, RankLostError)
    assert str(other) == "rank 1 ended: no room for 7 bytes"


def wait_for_one_that_hangs(ranks: Ranks, folder: Path) -> None:
    """The last rank waits for nothing in the middle; from then on the others have little patience."""
    model = load_model(folder, ranks=ranks)

    def on_token(row: int, token: int) -> None:
        if ranks.rank == ranks.size - 1:
            signal.pause()
        assert isinstance(ranks, RankGroup)
        ranks._board.timeout_s = 2.0

    generate(model, [[1, 2, 3]], max_new_tokens=50, on_token=on_token)


def test_nobody_waits_for_ever_for_a_rank_that_hangs(make_hf: Callable[..., Path]) -> None:
    if isinstance(missing := load_library(), str):
        pytest.skip(missing)  # Gloo's patience is that of the start
    other, own = on_ranks(2, wait_for_one_that_hangs, make_hf("llama"), ends_the_rest=True)
    assert own == -signal.SIGKILL
    assert isinstance(other, RankLostError)
    assert "rank 1 did not answer for 2 s" in str(other)


def wait_in_gather(ranks: Ranks) -> None:
    assert isinstance(ranks, RankGroup)
    ranks.gather("here")
    if ranks.rank:
        signal.pause()
    ranks._board.timeout_s = 1.0
    ranks.gather("and here")


def test_nor_for_its_word() -> None:
    other, own = on_ranks(2, wait_in_gather, ends_the_rest=True)
    assert own == -signal.SIGKILL
    assert "rank 1 did not answer for 1 s" in str(other)


def agree(ranks: Ranks, facts: list[dict[str, str]]) -> str:
    ranks.agree(facts[ranks.rank])
    return "agreed"


def test_ranks_agree() -> None:
    assert on_ranks(2, agree, [{"a": "1"}, {"a": "1"}]) == ["agreed", "agreed"]
    first, second = on_ranks(2, agree, [{"a": "1", "b": "2"}, {"a": "1", "b": "3"}])
    assert isinstance(first, HalveError)
    assert "rank 1 has another b than rank 0" in str(first)
    assert isinstance(second, SystemExit | HalveError)
    missing, _ = on_ranks(2, agree, [{"a": "1"}, {}])
    assert "rank 1 has another a than rank 0" in str(missing)


def load(ranks: Ranks, folders: list[Path], dtypes: list[torch.dtype]) -> str:
    load_model(folders[ranks.rank], dtype=dtypes[ranks.rank], ranks=ranks)
    return "loaded"


def test_other_files_and_options_are_refused(make_hf: Callable[..., Path], tmp_path: Path) -> None:
    folder = make_hf("llama")
    same, other = tmp_path / "same", tmp_path / "other"
    shutil.copytree(folder, same)
    shutil.copytree(folder, other)
    content = bytearray((other / "model.safetensors").read_bytes())
    content[-100] ^= 1
    (other / "model.safetensors").write_bytes(content)
    both = [torch.float32] * 2
    assert on_ranks(2, load, [folder, same], both) == ["loaded", "loaded"]
    for folders, dtypes, name in [
        ([folder, other], both, "model.safetensors"),
        ([folder, same], [torch.float32, torch.bfloat16], "dtype"),
    ]:
        error, _ = on_ranks(2, load, folders, dtypes)
        assert isinstance(error, HalveError)
        assert f"rank 1 has another {name} than rank 0" in str(error)


def load_without(ranks: Ranks, folder: Path) -> None:
    if ranks.rank:
        os.environ["HALVE_NO_C"] = "1"
        load_library.cache_clear()
    load_model(folder, ranks=ranks)


def test_compiled_kernels_on_some_ranks_alone_are_refused(make_hf: Callable[..., Path]) -> None:
    """They would add up in other places, and wait for each other."""
    if isinstance(missing := load_library(), str):
        pytest.skip(missing)
    error, _ = on_ranks(2, load_without, make_hf("llama"))
    assert "rank 1 has another state of compiled kernels than rank 0" in str(error)


def test_a_rank_without_the_model_ends_the_job(make_hf: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    error, own = on_ranks(2, load, [make_hf("llama"), tmp_path / "empty"], [torch.float32] * 2)
    assert isinstance(own, HalveError)
    assert isinstance(error, RankLostError)
    assert str(error).startswith("rank 1 ended: ")
    assert str(own) in str(error)


def test_what_was_not_started(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(HalveError, match="1 process was started: run torchrun --nproc-per-node 2"):
        check_ranks(2)
    with pytest.raises(HalveError, match="must be at least 1"):
        check_ranks(0)
    assert device_of_rank("cuda") == "cuda"
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(HalveError, match="--tp 1, and 2 processes were started"):
        check_ranks(1)
    assert (device_of_rank("cuda"), device_of_rank("cuda:0"), device_of_rank("cpu")) == ("cuda:1", "cuda:0", "cpu")
    monkeypatch.setenv("HALVE_RANK_TIMEOUT_S", "soon")
    with pytest.raises(HalveError, match="HALVE_RANK_TIMEOUT_S='soon' is no number of seconds"), job(2):
        pass
