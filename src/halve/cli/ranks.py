"""A command that several processes run together: the first speaks for all."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from halve.ranks.collective import Ranks
from halve.ranks.job import check_ranks, device_of_rank, job


@contextmanager
def together(tp: int, device: str) -> Iterator[tuple[Ranks, str]]:
    """The ranks of a command with `--tp tp`, and the device of this one; all but the first print nothing to stdout.

    Raises HalveError unless as many processes were started, with the same arguments.
    """
    from halve.checkpoint.reader import check_device

    check_ranks(tp)
    own_device = device_of_rank(device)
    if tp > 1:
        check_device(own_device)  # ranks meet through it
    with job(tp, own_device) as ranks:
        if ranks.rank:
            sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - as long as the process
        ranks.agree({"command": shlex.join(sys.argv[1:])})
        yield ranks, own_device
