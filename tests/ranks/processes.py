"""Ranks for tests: real processes over Gloo, forked, so that they start in moments."""

from __future__ import annotations

import os
import socket
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp

from halve.ranks.collective import Ranks
from halve.ranks.job import job

PATIENCE_S = 120.0  # for a machine with many other things to do; nothing waits so long unless it hangs


def free_port() -> int:
    """A port that nobody listens at."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def on_ranks(
    size: int, work: Callable[..., Any], *arguments: Any, timeout_s: float = PATIENCE_S, ends_the_rest: bool = False
) -> list[Any]:
    """What `work(ranks, *arguments)` returns on each of `size` ranks; of a rank that fails the exception, of one that was
    killed the signal's negative number, as an exit code. ends_the_rest: once one has ended, the others are killed."""
    with tempfile.TemporaryDirectory() as folder:
        environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(size)}
        context = mp.get_context("fork")
        processes = [
            context.Process(target=_rank, args=(rank, environment, Path(folder), timeout_s, work, arguments))
            for rank in range(size)
        ]
        for process in processes:
            process.start()
        end = time.monotonic() + PATIENCE_S
        while (alive := [p for p in processes if p.is_alive()]) and time.monotonic() < end:
            if len(alive) < size and ends_the_rest:
                break  # as torchrun ends those that are left
            alive[0].join(0.05)
        for process in alive:
            process.kill()
            process.join()
        results = [Path(folder) / str(rank) for rank in range(size)]
        return [
            torch.load(path, weights_only=False) if path.exists() else process.exitcode
            for path, process in zip(results, processes, strict=True)
        ]


def _rank(
    rank: int, environment: dict[str, str], folder: Path, timeout_s: float, work: Callable[..., Any], arguments: Any
) -> None:
    os.environ.update(environment, RANK=str(rank), LOCAL_RANK=str(rank))
    torch.set_num_threads(1)
    result: Any
    try:
        with job(int(environment["WORLD_SIZE"]), timeout_s=timeout_s) as ranks, torch.inference_mode():
            result = work(ranks, *arguments)
    except (Exception, SystemExit) as error:
        result = error
    torch.save(result, folder / f"part-{rank}")
    (folder / f"part-{rank}").rename(folder / str(rank))


__all__ = ["PATIENCE_S", "Ranks", "on_ranks"]
