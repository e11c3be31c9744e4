"""Commands that torchrun starts: the first rank speaks, and all end together."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.common import write_word_tokenizer
from tests.ranks.processes import free_port

WORDS = [f"w{number}" for number in range(94)]


def torchrun(arguments: list[str], ranks: int = 2) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks)]
    command += ["--master-port", str(free_port()), "-m", "halve", *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


@pytest.fixture(scope="module")
def folder(make_hf: Callable[..., Path]) -> Path:
    model = make_hf("llama", max_position_embeddings=2048)
    write_word_tokenizer(model, WORDS)
    return model


def test_generate(folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from halve.cli.app import main

    arguments = ["generate", str(folder), "--prompt", "w1 w2", "--max-new-tokens", "8", "--temperature", "1"]
    monkeypatch.setattr(sys, "argv", ["halve", *arguments])
    with pytest.raises(SystemExit, match="0"):
        main()
    alone = capsys.readouterr().out
    with torchrun([*arguments, "--tp", "2"]) as process:
        out, errors = process.communicate()
    assert process.returncode == 0, errors
    assert out == alone


def test_a_killed_rank_ends_the_command(folder: Path) -> None:
    arguments = ["generate", str(folder), "--prompt", "w1", "--max-new-tokens", "2000", "--tp", "2"]
    with torchrun(arguments) as process:
        assert process.stdout is not None
        process.stdout.read(8)  # it generates
        workers = children(process.pid)
        assert len(workers) == 2
        os.kill(workers[-1], signal.SIGKILL)
        _, errors = process.communicate()
    assert process.returncode != 0
    assert "SIGKILL" in errors
    assert not [worker for worker in workers if Path(f"/proc/{worker}").exists() and running(worker)]


def children(process: int) -> list[int]:
    return sorted(map(int, Path(f"/proc/{process}/task/{process}/children").read_text().split()))


def running(process: int) -> bool:
    return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")


def test_what_one_process_runs_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from halve.cli.app import main

    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    for arguments, said in [
        (["steps"], "steps is run by one process"),
        (["generate", "x", "--prompt", "y"], "--tp 1, and 2 processes were started"),
        (["benchmark", "x", "--tp", "3"], "--tp 3, and 2 processes were started"),
    ]:
        monkeypatch.setattr(sys, "argv", ["halve", *arguments])
        with pytest.raises(SystemExit, match="2"):
            main()
        assert capsys.readouterr().err.startswith(f"halve: rank 1: {said}")


def test_a_plan_says_what_ranks_can_share(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from halve.cli.app import main

    step = ["--step", "prune-heads:widths=1|2|1", "--calibration", str(tmp_path / "none.txt"), "--dry-run"]
    for ranks, code, said in [
        (2, 0, "2 ranks can share the result"),
        (4, 2, "layer 0 has 2 query heads on 1 key/value head,"),
    ]:
        monkeypatch.setattr(
            sys, "argv", ["halve", "compress", str(folder), str(tmp_path / "out"), *step, "--tp", str(ranks)]
        )
        with pytest.raises(SystemExit, match=str(code)):
            main()
        captured = capsys.readouterr()
        assert said in captured.out + captured.err
    assert not list(tmp_path.iterdir())
