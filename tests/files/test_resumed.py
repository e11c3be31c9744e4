"""An interrupted command goes on only where everything it is made from is what it was; each input is changed in turn."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from halve import CalibrationOptions, EvaluationOptions, SearchOptions, search
from halve.compression import compress as compression
from halve.errors import OutputError
from halve.measure.quality import multiple_choice
from halve.measure.quality.evaluate import evaluate
from halve.measure.quality.tasks import perplexity
from halve.studies.search.trial import TrialRunner
from halve.studies.system1 import reproduce as system1
from tests.common import write_word_tokenizer

WORDS = "the cat dog sat ran mat on and red blue bird sang . , A B C D : ) ? Question Answer Article".split()
MODEL = "model.safetensors config.json tokenizer.json tokenizer_config.json generation_config.json".split()


@pytest.fixture(scope="module")
def made(make_hf: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `model`, the folders `text` and `exam`, and `held.jsonl`."""
    folder = tmp_path_factory.mktemp("inputs")
    model = Path(shutil.copytree(make_hf("llama", max_position_embeddings=128), folder / "model"))
    write_word_tokenizer(model, WORDS)
    (folder / "text" / "deep").mkdir(parents=True)
    (folder / "text" / "one.txt").write_text("the cat sat on the mat , the dog ran . " * 20)
    (folder / "text" / "deep" / "two.txt").write_text("a red bird sang and the blue cat ran . " * 20)
    (folder / "exam").mkdir()
    item = {"questions": ["the cat ?"], "options": [["sat", "ran", "mat", "dog"]], "answers": ["A"]}
    for n, beast in enumerate(("cat", "dog", "bird", "mat")):
        text = json.dumps({"id": f"{n}.txt", "article": f"the {beast} sat on the red {beast} " * (n + 1)} | item)
        (folder / "exam" / f"{n}.txt").write_text(text)
    (folder / "held.jsonl").write_text(json.dumps({"id": "h", "article": "blue and red and blue ran on . "} | item))
    return folder


@pytest.fixture
def world(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "world"))


@contextmanager
def changed(path: Path) -> Iterator[None]:
    """One byte of a file is another, its size and the time of its last change are what they were; then all is as before."""
    before, stat = path.read_bytes(), path.stat()
    other = bytearray(before)
    if path.suffix == ".safetensors":
        other[-1] ^= 1
    else:
        texts = {"tokenizer.json": (b"bird", b"bear"), "config.json": (b"1e-06", b"2e-06"), "0.txt": (b"red", b"and")}
        old, new = texts.get(path.name, (b" ", b"\t") if path.suffix == ".json" else (b"cat", b"dog"))
        place = before.index(old)
        other[place : place + len(old)] = new
    try:
        path.write_bytes(other)
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        yield
    finally:
        path.write_bytes(before)


@contextmanager
def moved(path: Path, name: str) -> Iterator[None]:
    path.rename(path.with_name(name))
    yield
    path.with_name(name).rename(path)


@contextmanager
def added(path: Path) -> Iterator[None]:
    path.write_text("the cat")
    yield
    path.unlink()


def refused(run: Callable[..., object], files: dict[Path, str], options: dict[str, tuple[Any, str]]) -> None:
    """Every change alone is refused, by what it is."""
    for path, words in files.items():
        with changed(path), pytest.raises(OutputError) as caught:
            run()
        assert f"another request ({words} has another content)" in str(caught.value) and "--overwrite" in str(
            caught.value
        )
    for name, (value, words) in options.items():
        with pytest.raises(OutputError) as caught:
            run(**{name: value})
        assert "another request" in str(caught.value) and words in str(caught.value), name


def model_files(world: Path) -> dict[Path, str]:
    return {world / "model" / name: f"model/{name}" for name in MODEL}


def text_files(world: Path) -> dict[Path, str]:
    return {world / "text" / name: f"calibration/{name}" for name in ("one.txt", "deep/two.txt")}


def interrupt(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


def test_compress(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(**changes: Any) -> None:
        asked = {"steps": ["gptq:bits=4,group_size=16"], "calibration": world / "text", "samples": 3, "window": 12}
        compression.compress(world / "model", world / "out", **asked | changes)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(compression, "_verify", interrupt)
        run()
    options = {
        "steps": (["gptq:bits=8,group_size=16"], "steps/1/bits was 4 and is 8"),
        "samples": (4, "samples was 3 and is 4"),
        "window": (13, "window was 12 and is 13"),
        "seed": (1, "seed was 0 and is 1"),
        "dtype": (torch.bfloat16, 'dtype was "None" and is "torch.bfloat16"'),
        "calibration": (world / "text" / "one.txt", "calibration/deep/two.txt is gone"),
    }
    refused(run, model_files(world) | text_files(world), options)
    with added(world / "text" / "new.txt"), pytest.raises(OutputError, match=r"\(calibration/new.txt is new\)"):
        run()
    with added(world / "model" / "merges.txt"), pytest.raises(OutputError, match=r"\(model/merges.txt is new\)"):
        run()
    monkeypatch.setattr(compression, "__version__", "0")  # of the manifest alone
    with monkeypatch.context() as patch, pytest.raises(OutputError, match=r"versions/halve was .* and is \"99\""):
        patch.setattr("halve.checkpoint.identity.__version__", "99")
        run()
    monkeypatch.setattr(compression, "run_step", lambda *_: pytest.fail("done already"))
    with added(world / "model" / "notes.md"), moved(world / "text", "text2"):  # neither read, nor where it lies
        run(calibration=world / "text2")
    assert (world / "out" / "config.json").exists()


def test_search(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(**changes: Any) -> None:
        evaluation = {
            "task": "multiple-choice",
            "data": world / "exam",
            "protocol": "continuation",
            "template": "plain",
        }
        calibration = {"source": str(world / "text"), "samples": 3, "window": 12, "seed": 0}
        asked = {"steps": ["gptq:group_size=16"], "vary": ["gptq.bits=4|8"], "floor": 0.01}
        options: dict[str, Any] = {"held_out_data": world / "held.jsonl"}
        for group in (evaluation, calibration, asked):
            group |= {key: value for key, value in changes.items() if key in group}
        rest = {"limit", "seed"} & changes.keys()
        options |= {k: v for k, v in changes.items() if k not in evaluation | calibration | asked and k not in rest}
        limit = changes.get("limit")
        search(world / "model", world / "out", **asked, evaluation=EvaluationOptions(**evaluation, limit=limit),
               calibration=CalibrationOptions(**calibration), options=SearchOptions(**options))  # fmt: skip

    monkeypatch.setattr("halve.studies.search.search.check_overlaps", lambda *_: None)
    monkeypatch.setattr(TrialRunner, "dense", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run()
    files = model_files(world) | text_files(world)
    files |= {world / "exam" / "0.txt": "questions/0.txt", world / "held.jsonl": "held-out questions/held.jsonl"}
    options = {
        "steps": (["gptq:group_size=8"], "steps/1/group_size was 16 and is 8"),
        "vary": (["gptq.bits=3|8"], "varied/1/low was 4 and is 3"),
        "floor": (0.02, "floor/value was 0.01 and is 0.02"),
        "protocol": ("pmi", 'evaluation/protocol was "continuation" and is "pmi"'),
        "template": ("race", 'evaluation/template was "plain" and is "race"'),
        "limit": (1, "evaluation/limit was null and is 1"),
        "samples": (4, "samples was 3 and is 4"),
        "window": (13, "window was 12 and is 13"),
        "seed": (1, "seed/1 was 0 and is 1"),
        "minimise": ("memory", 'minimise was "bytes" and is "memory"'),
        "leave_out_shared": (True, "division/2 was false and is true"),
    }
    refused(run, files, options)
    with (
        moved(world / "exam" / "3.txt", "4.txt"),
        pytest.raises(OutputError, match=r"questions/4.txt is new; .*3.txt is gone"),
    ):
        run()
    with pytest.raises(KeyboardInterrupt):  # unchanged, it gets as far as before
        run()


def test_reproduce(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(**changes: Any) -> None:
        asked = {"data": world / "exam", "calibration": world / "text", "samples": 3, "protocol": "letter", "limit": 3}
        system1.reproduce_system1(world / "model", world / "out", **asked | changes)

    monkeypatch.setattr(system1.Study, "timing", lambda self: system1.BenchmarkOptions(8, 3, self.runs, 0))
    monkeypatch.setattr(system1.System1Timing, "new_tokens", 5)
    monkeypatch.setattr("halve.studies.system1.needs.bandwidth_gb_per_s", lambda device: 10.0)
    monkeypatch.setattr(system1._Run, "run", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run()
    options = {
        "samples": (4, "samples was 3 and is 4"),
        "protocol": ("pmi", 'protocol was "letter" and is "pmi"'),
        "own_protocol": ("pmi", 'own_protocol was "system1" and is "pmi"'),
        "limit": (2, "limit was 3 and is 2"),
        "runs": (2, "runs was 5 and is 2"),
        "dtype": (torch.bfloat16, "dtype was"),
        "random_weights": (True, "random_weights was false and is true"),
    }
    refused(run, model_files(world) | text_files(world) | {world / "exam" / "0.txt": "questions/0.txt"}, options)
    with pytest.raises(KeyboardInterrupt), moved(world / "exam", "exam2"):
        run(data=world / "exam2", floor=0.3)


@pytest.mark.parametrize("task", ["multiple-choice", "perplexity"])
def test_evaluate(world: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, task: str) -> None:
    module: Any = perplexity if task == "perplexity" else multiple_choice
    asked: dict[str, Any] = {"task": task, "batch_tokens": 1, "progress_file": world / "kept.progress.jsonl"}
    if task == "perplexity":
        asked |= {"data": world / "text" / "one.txt", "window": 32}
    else:
        asked |= {"data": world / "exam", "protocol": "continuation", "template": "plain"}
    score, calls = module.score, []

    def run(upto: int | None, **changes: Any) -> int:
        """Batches computed until the one that is cut off."""
        calls.clear()

        def cut_off(*arguments: Any) -> torch.Tensor:
            calls.append(0)
            if len(calls) == upto:
                raise KeyboardInterrupt
            return score(*arguments)

        monkeypatch.setattr(module, "score", cut_off)
        evaluate(world / "model", **asked | changes)
        return len(calls)

    whole = run(None)
    with pytest.raises(KeyboardInterrupt):
        run(3)
    kept = asked["progress_file"].read_bytes()
    assert kept.count(b"\n") == 3
    data = {world / "text" / "one.txt": "one.txt"} if task == "perplexity" else {world / "exam" / "0.txt": "0.txt"}
    for path, words in (model_files(world) | {file: f"data/{name}" for file, name in data.items()}).items():
        caplog.clear()
        with changed(path), pytest.raises(KeyboardInterrupt), caplog.at_level(logging.WARNING):
            run(1)
        assert f"another run ({words} has another content" in caplog.text and "begins anew" in caplog.text
        assert asked["progress_file"].read_bytes().count(b"\n") == 1
        asked["progress_file"].write_bytes(kept)
    options = {
        "limit": (3, "limit was"),
        "batch_tokens": (2, "batch_tokens was 1"),
        "dtype": (torch.bfloat16, "a probe"),
    }
    options |= (
        {"window": (33, "window was 32 and is 33")} if task == "perplexity" else {"template": ("race", "template was")}
    )
    for name, (value, words) in options.items():
        caplog.clear()
        with pytest.raises(KeyboardInterrupt), caplog.at_level(logging.WARNING):
            run(1, **{name: value})
        assert words in caplog.text
        asked["progress_file"].write_bytes(kept)
    caplog.clear()
    assert run(None) == whole - 2 and not caplog.text
