"""Real commands on drawn layouts, killed and run twice at once: what is not OUT stays as it was."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from halve.checkpoint.convert import convert
from halve.checkpoint.reader import open_checkpoint
from halve.compression.compress import compress
from halve.errors import OutputError
from tests.files.test_work import OURS, content, make

SLOW = """
import sys, time
from halve.compression import compress as module
real = module.run_step
def run_step(*rest):
    print("at work", flush=True)
    time.sleep(float(sys.argv[4]))
    return real(*rest)
module.run_step = run_step
module.compress(sys.argv[1], sys.argv[2], [sys.argv[3]], overwrite=True)
"""


@pytest.fixture(scope="module")
def tiny(make_hf: Callable[..., Path]) -> Path:
    """One small model, its weights in both forms: `compress` reads the one, `convert` the other."""
    folder = make_hf("llama", num_hidden_layers=1)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    return folder


@settings(max_examples=40, derandomize=True, deadline=None)
@given(
    command=st.sampled_from(["compress", "convert"]),
    source=st.sampled_from(["m", "m.old", "out.old", "out.partial", "above/m"]),
    out=st.sampled_from(["out", "m", "m.old", "above", "above/out", "link", "m/inside"]),
    users=st.sets(st.sampled_from(["out", "out.old", "out.partial", "m.partial"])),
    replaceable=st.booleans(),
    overwrite=st.booleans(),
)
def test_real_commands_change_nothing_outside_of_out(tiny, command, source, out, users, replaceable, overwrite) -> None:
    root = Path(tempfile.mkdtemp()).resolve()
    try:
        for name in users:
            make(root / name, OURS if replaceable and name == "out" else {"notes.txt": "mine"})
        shutil.copytree(tiny, root / source, dirs_exist_ok=True)
        (root / "link").symlink_to(root / "disk")
        place = (root / out).resolve()
        kept = {
            p: h for p, h in content(root, root / "nowhere").items() if "notes.txt" in p or f"{root / source}/" in p
        }
        before, everything = content(root, place), content(root, root / "nowhere")
        try:
            if command == "compress":
                compress(root / source, root / out, ["rtn:bits=8"], overwrite=overwrite)
            else:
                convert(root / source, root / out, overwrite=overwrite)
            open_checkpoint(place)
        except OutputError:
            assert content(root, root / "nowhere") == everything
        assert content(root, place) == before
        after = content(root, root / "nowhere")
        assert {p: after.get(p) for p in kept} == kept
    finally:
        shutil.rmtree(root)


def begin(model: Path, out: Path, step: str, wait: float) -> subprocess.Popen[str]:
    """A process that compresses with `--overwrite`; it is at work when this returns, for `wait` seconds or more."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-c", SLOW, str(model), str(out), step, str(wait)]
    process = subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "at work\n"
    return process


def bits(folder: Path) -> set[int]:
    return {scheme.bits for scheme in open_checkpoint(folder).schemes.values()}


@pytest.mark.slow
@pytest.mark.parametrize("step", ["rtn:bits=4", "rtn:bits=8"], ids=["another request", "the same request"])
def test_two_processes_with_overwrite_never_mix(tiny: Path, tmp_path: Path, step: str) -> None:
    out = make(tmp_path / "out", OURS)
    first = begin(tiny, out, "rtn:bits=8", 3)
    with pytest.raises(OutputError, match=rf"in use by process {first.pid} on .* since 20"):
        compress(tiny, out, [step], overwrite=True)
    assert first.wait(120) == 0
    assert bits(out) == {8} and [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.slow
def test_after_a_kill_out_is_the_old_one_and_the_same_request_goes_on(tiny: Path, tmp_path: Path) -> None:
    out = make(tmp_path / "out", OURS)
    old = content(out, out / "nowhere")
    process = begin(tiny, out, "rtn:bits=8", 60)
    process.send_signal(signal.SIGKILL)
    process.wait(60)
    assert content(out, out / "nowhere") == old
    for _ in range(50):  # the lock goes with the process
        try:
            compress(tiny, out, ["rtn:bits=8"], overwrite=True)
            break
        except OutputError:
            time.sleep(0.1)
    assert bits(out) == {8} and [path.name for path in tmp_path.iterdir()] == ["out"]
