"""What a measurement ran on: the machine's description and the memory bandwidth it reaches."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

MIB = 1 << 20
_READ_BUFFER_BYTES = 512 * MIB
_COPY_BUFFER_BYTES = 1024 * MIB
_REPEATS = 5


def ask_for_huge_pages() -> None:
    """Let torch take memory for large tensors in pages of 2 MB where Linux grants them: far fewer page faults and misses.

    An environment variable of torch's, read at its first large tensor; what the user has set stays. For programs, which
    own their process: a library must not decide this.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


def describe_machine() -> dict[str, object]:
    """CPU model, cores this process may use, torch threads, RAM in bytes, system, and the GPU's name or None."""
    return {
        "cpu": cpu_model(),
        "cores": usable_cores(),
        "threads": torch.get_num_threads(),
        "ram_bytes": ram_bytes(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def describe_device(device: torch.device | str) -> str:
    """What a table calls the device: the GPU's name, or the CPU's."""
    device = torch.device(device)
    return torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_model()


def dtype_name(dtype: torch.dtype) -> str:
    """bfloat16, float32, ..."""
    return str(dtype).removeprefix("torch.")


def cpu_model() -> str:
    """The processor's marketing name, as far as the system tells."""
    info = _read("/proc/cpuinfo")
    for line in info.splitlines():
        name, _, value = line.partition(":")
        if name.strip() == "model name" and value.strip():
            return value.strip()
    return platform.processor() or platform.machine() or "unknown CPU"


def usable_cores() -> int:
    """Cores this process is allowed to run on."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def ram_bytes() -> int:
    """Physical memory of the machine, 0 where the system does not tell."""
    names = getattr(os, "sysconf_names", {})
    if "SC_PHYS_PAGES" not in names or "SC_PAGE_SIZE" not in names:
        return 0
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def available_bytes() -> int:
    """Memory that can be taken now without swapping; all of it where the system does not tell."""
    for line in _read("/proc/meminfo").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return ram_bytes()


def last_level_cache_bytes() -> int:
    """Size of the largest cache of the first core, 0 where the system does not tell (Linux only)."""
    sizes = [0]
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = _read(path).strip()
        if text[:-1].isdigit():
            sizes.append(int(text[:-1]) * {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}.get(text[-1], 0))
    return max(sizes)


def bandwidth_gb_per_s(device: torch.device | str) -> float:
    """The best memory bandwidth this machine shows now, in 10^9 bytes per second.

    CPU: reading a buffer several times the cache, with torch's threads, by the fastest of a few ops (none of them is
    fastest for every thread count). CUDA: copying a buffer, reads and writes both counted.
    """
    device = torch.device(device)
    return _copy_bandwidth(device) if device.type == "cuda" else _read_bandwidth()


@torch.inference_mode()
def _read_bandwidth() -> float:
    size = max(_READ_BUFFER_BYTES, 4 * last_level_cache_bytes())
    available = available_bytes()
    size = (min(size, available // 4) if available else size) // (4 * 4096) * (4 * 4096)
    # ones, not empty: pages that were never written all map to one page of zeros, which stays in the cache
    numbers = torch.ones(size // 4, dtype=torch.float32)
    rows, vector, codes = numbers.view(-1, 4096), torch.ones(4096), numbers.view(torch.int8)
    reads: list[Callable[[], Tensor]] = [numbers.sum, codes.amax, lambda: functional.linear(vector, rows)]
    best = float("inf")
    for read in reads:
        read()
        for _ in range(_REPEATS):
            start = time.perf_counter()
            read()
            best = min(best, time.perf_counter() - start)
    return size / best / 1e9


@torch.inference_mode()
def _copy_bandwidth(device: torch.device) -> float:
    free, _ = torch.cuda.mem_get_info(device)
    size = min(_COPY_BUFFER_BYTES, free // 4)
    stream = torch.cuda.current_stream(device)
    source = torch.ones(size, dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    best_ms = float("inf")
    for _ in range(4 * _REPEATS):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record(stream)
        target.copy_(source)
        end.record(stream)
        end.synchronize()
        best_ms = min(best_ms, begin.elapsed_time(end))
    del source, target
    torch.cuda.empty_cache()  # or it would count as memory reserved for a model
    return 2 * size / best_ms / 1e6


def resident_bytes() -> dict[str, int]:
    """Resident memory of this process in bytes: `now`, and `peak` since its start; empty where the system is silent.

    Linux tells both in /proc. The fallback, ru_maxrss, knows the peak only, and a child inherits its parent's on Linux.
    """
    fields = {"VmRSS:": "now", "VmHWM:": "peak"}
    resident = {}
    for line in _read("/proc/self/status").splitlines():
        words = line.split()
        if words and words[0] in fields:
            resident[fields[words[0]]] = int(words[1]) * 1024
    if resident or platform.system() != "Darwin":
        return resident
    import resource

    return {"peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss}  # bytes on macOS


def _read(path: str | Path) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
