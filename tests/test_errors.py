"""Files and folders that cannot be read say which, why, and what to do; wherever they are read."""

from __future__ import annotations

import errno
import io
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from halve import analyse_layers, benchmark, compress, convert, evaluate, load_model, load_tokenizer, write_page
from halve.compression.recipe import read_recipe
from halve.errors import CheckpointError, DataError, HalveError, reading
from halve.measure.quality.race import read_questions
from halve.measure.records import find_records
from halve.texts import read_documents
from tests.common import write_word_tokenizer


def test_an_error_of_the_system_keeps_its_path_and_reason() -> None:
    with (
        pytest.raises(DataError, match=r"there/it: cannot be read: Input/output error; check"),
        reading("x", DataError),
    ):
        raise OSError(errno.EIO, os.strerror(errno.EIO), "there/it")
    with pytest.raises(CheckpointError, match="x: cannot be read: odd; check"), reading("x", CheckpointError):
        raise OSError("odd")


@pytest.fixture
def model(make_hf, tmp_path: Path) -> Path:
    folder = Path(shutil.copytree(make_hf("llama"), tmp_path / "model"))
    write_word_tokenizer(folder, "the cat sat on a mat".split())
    return folder


@pytest.fixture
def refuse(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path, int], None]:
    """Have the system refuse to open or list one path, as it does not for root."""
    really: dict[str, Callable[..., Any]] = {"open": io.open, "scandir": os.scandir, "listdir": os.listdir}

    def start(path: Path, reason: int) -> None:
        def guarded(name: str) -> Callable[..., Any]:
            def call(place: Any = ".", *args: Any, **kwargs: Any) -> Any:
                if not isinstance(place, int) and os.fspath(place) == str(path):
                    raise OSError(reason, os.strerror(reason), str(path))
                return really[name](place, *args, **kwargs)

            return call

        monkeypatch.setattr(io, "open", guarded("open"))
        monkeypatch.setattr(os, "scandir", guarded("scandir"))
        monkeypatch.setattr(os, "listdir", guarded("listdir"))

    return start


NOT_LOADED = ["LICENSE", "additional_chat_templates/tools.jinja"]
REASONS = [errno.EACCES, errno.EIO]


@pytest.mark.parametrize("reason", REASONS)
@pytest.mark.parametrize(
    "name", ["config.json", "model.safetensors", "tokenizer.json", "generation_config.json", *NOT_LOADED]
)
def test_a_file_of_the_model(refuse, model: Path, tmp_path: Path, name: str, reason: int) -> None:
    if name in NOT_LOADED:
        (model / name).parent.mkdir(exist_ok=True)
        (model / name).write_text("of the model")
    refuse(model / name, reason)
    said = f"{model / name}: cannot be read: {os.strerror(reason)}; check"
    with pytest.raises(CheckpointError, match=said):
        compress(model, tmp_path / "out", ["rtn:bits=8"])
    assert os.listdir(tmp_path) == ["model"]
    uses = [load_model] if name in ("config.json", "model.safetensors") else []
    uses += [load_tokenizer] if name in ("tokenizer.json", "generation_config.json") else []
    for use in uses:
        with pytest.raises(CheckpointError, match=said):
            use(model)


def test_a_folder_where_a_file_should_be(model: Path) -> None:
    for name, instead_of in (
        ("config.json", "config.json"),
        ("model.safetensors", "model.safetensors"),
        ("model.safetensors.index.json", "model.safetensors"),
    ):
        kept = (model / instead_of).rename(model / "kept")
        (model / name).mkdir()
        with pytest.raises(CheckpointError, match=f"{name}: cannot be read: Is a directory"):
            load_model(model)
        (model / name).rmdir()
        kept.rename(model / instead_of)
    load_model(model)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model.bin.index.json"])
def test_weights_to_be_converted(refuse, model: Path, tmp_path: Path, name: str) -> None:
    (model / name).write_text("{}")
    refuse(model / name, errno.EACCES)
    with pytest.raises(CheckpointError, match=f"{name}: cannot be read: Permission denied"):
        convert(model, tmp_path / "out")


@pytest.mark.parametrize("reason", REASONS)
@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("text.txt", read_documents),
        ("questions.jsonl", read_questions),
        ("record.json", lambda path: find_records([path])),
        ("recipe.yaml", read_recipe),
        ("folder", read_documents),
        ("folder", read_questions),
        ("folder", lambda path: find_records([path])),
        ("folder", write_page),
    ],
)
def test_a_file_or_folder_of_data(refuse, tmp_path: Path, name: str, read: Callable, reason: int) -> None:
    path = tmp_path / name
    path.mkdir() if name == "folder" else path.write_text("{}")
    refuse(path, reason)
    with pytest.raises(HalveError, match=f"{path}: cannot be read: {os.strerror(reason)}; check"):
        read(path)


def test_a_name_too_long_for_the_system(tmp_path: Path) -> None:
    name = "n" * 300
    for read in (load_model, load_tokenizer, read_documents, read_questions):
        with pytest.raises(HalveError, match="cannot be read: File name too long"):
            read(tmp_path / name)


DEVICES = ["mps", "xpu", "meta", "hpu", "privateuseone", "cuda:99", "nonsense", "", "cuda:x", "cpu:-1"]


@pytest.mark.parametrize("device", DEVICES)
def test_a_device_is_refused_before_any_work(model: Path, tmp_path: Path, device: str) -> None:
    text = tmp_path / "text.txt"
    text.write_text("the cat sat on a mat " * 50)
    for use in (
        lambda: load_model(model, device=device),
        lambda: compress(model, tmp_path / "out", ["rtn:bits=8"], device=device),
        lambda: evaluate(model, task="perplexity", data=text, device=device),
        lambda: benchmark(model, device=device),
        lambda: analyse_layers(model, text, tmp_path / "layers", device=device),
    ):
        with pytest.raises(HalveError, match=f"device '{device}' .*: use cpu"):
            use()
    assert sorted(os.listdir(tmp_path)) == ["model", "text.txt"]
