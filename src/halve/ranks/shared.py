"""Memory that the ranks of one machine share, in which compiled code adds up their vectors (kernels/csrc/ranks.h)."""

from __future__ import annotations

import ctypes
import mmap
import os
from pathlib import Path
from tempfile import mkstemp

from halve.ranks.board import RankBoard, RankLostError

_LINE = 64  # bytes: of each rank the sums it has come to
_FOLDER = Path("/dev/shm")
_Lost = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_double)


class SharedMemory:
    """Room for `room` floats of every rank, twice, zeroed; gone with the last process that has it."""

    def __init__(self, board: RankBoard, room: int, mapped: mmap.mmap) -> None:
        self.board, self.room, self.sums = board, room, 0
        self._waited_s = 0.0
        self._view = ctypes.c_char.from_buffer(mapped)
        self.address = ctypes.addressof(self._view)
        self._lost = _Lost(self._given_up)
        self.lost_address = ctypes.cast(self._lost, ctypes.c_void_p).value

    @classmethod
    def make(cls, board: RankBoard, room: int) -> SharedMemory | None:
        """The same memory on all ranks; None, on all, where they are not on one machine that can."""
        path = _new_file(_LINE * board.size + 8 * board.size * room) if board.rank == 0 else None
        (path, *_) = board.gather(path)
        mapped = None if path is None else _map(Path(path))
        everywhere = all(board.gather(mapped is not None))
        if path is not None and board.rank == 0:
            Path(path).unlink()
        return cls(board, room, mapped) if everywhere and mapped is not None else None

    def lost(self) -> RankLostError:
        """Why the last sum has not come about."""
        return self.board.lost(ConnectionError("a rank has ended"), self._waited_s)

    def _given_up(self, waited_s: float) -> int:
        self._waited_s = waited_s
        try:
            return int(waited_s > self.board.timeout_s or self.board.has_ended())
        except Exception:  # nobody could be told: C has called
            return 1


def _new_file(size: int) -> str | None:
    """A file of zeros in memory, for this user alone."""
    if not _FOLDER.is_dir():
        return None
    try:
        number, path = mkstemp(prefix="halve-", dir=_FOLDER)
        with os.fdopen(number, "wb") as file:
            os.posix_fallocate(file.fileno(), 0, size)  # a write beyond what the system has would end the process
    except OSError:
        return None
    return path


def _map(path: Path) -> mmap.mmap | None:
    try:
        with path.open("r+b") as file:
            return mmap.mmap(file.fileno(), 0)
    except OSError:
        return None
