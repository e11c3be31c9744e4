"""Peak resident memory of loading and running a model on the CPU, measured in a process of its own.

The process imports, loads, prefills, decodes and reports; nothing of the caller (its imports, a model it holds) is in
the figure. `python -m halve.measure.speed.peak_memory JSON` is that process; `peak_memory` starts it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from halve.errors import HalveError

_ANSWER = "peak-memory: "  # libraries may print to stdout as well


def peak_memory(
    model: str | os.PathLike[str],
    *,
    prompt_tokens: int,
    new_tokens: int,
    long_prompt_tokens: int,
    long_budget_s: float | None,
    dtype: str | None,
    backend: str,
    random_weights: bool,
    threads: int,
) -> dict[str, int]:
    """Bytes of resident memory of a fresh process at its stages.

    baseline (after the imports), loaded (after loading), peak_loading (highest until then), peak (highest of all), peak_long
    (highest with the long prompt after the other; not there for 0 tokens, and where it would take longer than the budget).
    Raises HalveError with the last line the process wrote when it fails, for example when it is killed for memory.
    """
    request = {
        "model": os.fspath(model),
        "prompt_tokens": prompt_tokens,
        "new_tokens": new_tokens,
        "long_prompt_tokens": long_prompt_tokens,
        "long_budget_s": long_budget_s,
        "dtype": dtype,
        "backend": backend,
        "random_weights": random_weights,
        "threads": threads,
    }
    package_parent = str(Path(__file__).resolve().parents[3])
    inherited = os.environ.get("PYTHONPATH")
    search = package_parent if not inherited else os.pathsep.join((package_parent, inherited))
    done = subprocess.run(
        [sys.executable, "-m", "halve.measure.speed.peak_memory", json.dumps(request)],
        env={**os.environ, "PYTHONPATH": search},
        capture_output=True,
        text=True,
    )
    for line in done.stdout.splitlines():
        if line.startswith(_ANSWER) and done.returncode == 0:
            return json.loads(line.removeprefix(_ANSWER))
    said = done.stderr.strip().splitlines()
    raise HalveError(f"the memory measurement ended with code {done.returncode}: {said[-1] if said else 'no message'}")


def _work(request: dict[str, Any]) -> dict[str, int]:
    import torch

    from halve.checkpoint.reader import load_model
    from halve.decode.generate import generate
    from halve.measure.machine import resident_bytes

    if "peak" not in resident_bytes():
        raise HalveError("this system does not tell a process's peak memory")
    torch.set_num_threads(request["threads"])
    stages = {"baseline": resident_bytes()}
    model = load_model(
        request["model"],
        dtype=getattr(torch, request["dtype"]) if request["dtype"] else None,
        backend=request["backend"],
        random_weights=request["random_weights"],
    )
    stages["loaded"] = resident_bytes()
    prompt, long, new, budget_s = (
        request[k] for k in ("prompt_tokens", "long_prompt_tokens", "new_tokens", "long_budget_s")
    )
    start = time.perf_counter()
    generate(model, [[0] * prompt], max_new_tokens=new)
    long_s = (time.perf_counter() - start) * long / prompt
    figures = {name: stage["now"] for name, stage in stages.items() if "now" in stage}
    figures |= {"peak_loading": stages["loaded"]["peak"], "peak": resident_bytes()["peak"]}
    if long and (budget_s is None or long_s <= budget_s):
        generate(model, [[0] * long], max_new_tokens=new)
        figures["peak_long"] = resident_bytes()["peak"]
    return figures


if __name__ == "__main__":
    print(_ANSWER + json.dumps(_work(json.loads(sys.argv[1]))), flush=True)
