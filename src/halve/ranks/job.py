"""START HERE: the ranks of one command, from where they meet to where they end together; torchrun starts them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from halve.errors import HalveError
from halve.ranks.board import RankBoard, RankLostError
from halve.ranks.collective import ALONE, Ranks
from halve.ranks.group import RankGroup

TIMEOUT_S = 300.0
_TIMEOUT = "HALVE_RANK_TIMEOUT_S"


def started_ranks() -> int:
    """How many processes torchrun has started for this command; 1 without it."""
    text = os.environ.get("WORLD_SIZE", "1") if "TORCHELASTIC_RUN_ID" in os.environ or "RANK" in os.environ else "1"
    return int(text) if text.isdecimal() else 1


def check_ranks(wanted: int) -> None:
    """HalveError unless as many ranks as are wanted have been started."""
    if wanted < 1:
        raise HalveError(f"--tp {wanted}: must be at least 1")
    started = started_ranks()
    if started != wanted:
        raise HalveError(
            f"--tp {wanted}, and {started} process{'es were' if started > 1 else ' was'} started: "
            f"run torchrun --nproc-per-node {max(wanted, started)} -m halve ... --tp {max(wanted, started)}"
        )


def device_of_rank(device: str) -> str:
    """The device of this rank: of GPUs one each."""
    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if device == "cuda" and started_ranks() > 1 else device


@contextmanager
def job(size: int, device: str = "cpu", timeout_s: float | None = None) -> Iterator[Ranks]:
    """The ranks that share the work of the block, `size` processes in the environment that torchrun makes.

    Where one of them fails all end: with HalveError, which names it and its reason, within `timeout_s` (default: 300, or
    HALVE_RANK_TIMEOUT_S), or with exit code 2 and no word where rank 0 says the same.
    """
    check_ranks(size)
    if size == 1:
        yield ALONE
        return
    board = _meet(size, device, _timeout_s() if timeout_s is None else timeout_s)
    try:
        yield RankGroup(board)
    except BaseException as error:
        if board.leave(str(error) or type(error).__name__, isinstance(error, RankLostError)) and isinstance(
            error, HalveError
        ):
            raise SystemExit(2) from error
        raise
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _meet(size: int, device: str, timeout_s: float) -> RankBoard:
    """Find the other ranks, under the address that the environment names."""
    timeout = timedelta(seconds=timeout_s)
    kind = "nccl" if device.startswith("cuda") else "gloo"
    if kind == "nccl":
        torch.cuda.set_device(torch.device(device))
    try:
        store, rank, _ = next(rendezvous("env://", timeout=timeout))
        dist.init_process_group(kind, store=PrefixStore("group", store), rank=rank, world_size=size, timeout=timeout)
    except (RuntimeError, ValueError, OSError) as error:
        raise HalveError(
            f"the {size} ranks did not meet within {timeout_s:g} s: start all of them with torchrun"
        ) from error
    return RankBoard(PrefixStore("board", store), rank, size, timeout_s)


def _timeout_s() -> float:
    text = os.environ.get(_TIMEOUT, "")
    try:
        seconds = float(text) if text else TIMEOUT_S
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < 1e6:
        raise HalveError(f"{_TIMEOUT}={text!r} is no number of seconds: use one above 0, such as {TIMEOUT_S:g}")
    return seconds
