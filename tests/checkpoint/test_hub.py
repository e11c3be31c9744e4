"""Fetching from the hub: once, whole, then without a network; everything that can fail is one clear error."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)

from halve.checkpoint.hub import cached, fetch
from halve.checkpoint.reader import open_checkpoint
from halve.errors import CheckpointError, HalveError, OutputError
from tests.common import COMPANIONS, add_companions, companions

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """Stands in for the network: `files` are what the hub has of owner/tiny, `failure` is what asking it raises."""

    def __init__(self, cache: Path, files: Path) -> None:
        from huggingface_hub import snapshot_download

        self.cache, self.files, self.local = cache, files, snapshot_download
        self.failure: Exception | None = None
        self.asked: list[str] = []
        self.sizes: dict[str, int] = {}
        self.stop_before = ""

    def snapshot_download(self, model: str, **options: Any) -> Any:
        if options.get("local_files_only"):
            return self.local(model, cache_dir=self.cache, **options)
        self.asked.append(model)
        if self.failure is not None:
            raise self.failure
        names = [path.relative_to(self.files).as_posix() for path in sorted(self.files.rglob("*")) if path.is_file()]
        allowed = [n for n in names if any(fnmatch(n, p) for p in options["allow_patterns"])]
        wanted = [n for n in allowed if not any(fnmatch(n, p) for p in options["ignore_patterns"])]
        if options.get("dry_run"):
            sizes = {n: self.sizes.get(n, (self.files / n).stat().st_size) for n in wanted}
            return [SimpleNamespace(filename=n, file_size=size, will_download=True) for n, size in sizes.items()]
        repo = self.cache / "models--owner--tiny"
        (repo / "refs").mkdir(parents=True, exist_ok=True)
        (repo / "refs" / "main").write_text(COMMIT)
        folder = repo / "snapshots" / COMMIT
        folder.mkdir(parents=True, exist_ok=True)
        for name in wanted:
            if name == self.stop_before:
                raise OSError("the connection was reset")
            (folder / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(self.files / name, folder / name)
        return str(folder)


@pytest.fixture
def hub(make_hf: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    from huggingface_hub import constants

    files = Path(shutil.copytree(make_hf("llama"), tmp_path / "hub"))
    fake = Hub(tmp_path / "cache", files)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(fake.cache))
    monkeypatch.setattr("huggingface_hub.snapshot_download", fake.snapshot_download)
    return fake


def response(status: int) -> Any:
    return SimpleNamespace(status_code=status, headers={}, request=None, text="")


def test_a_model_is_downloaded_once_and_then_read_without_the_hub(hub: Hub) -> None:
    (hub.files / "original").mkdir()
    (hub.files / "original" / "consolidated.safetensors").write_bytes(b"the same weights again")
    (hub.files / "consolidated.safetensors").write_bytes(b"and again")
    (hub.files / "pytorch_model.bin").write_bytes(b"pickled")
    assert cached("owner/tiny") is None
    folder = fetch("owner/tiny")
    assert hub.asked == ["owner/tiny"] * 2  # what it has, then the files
    names = {path.name for path in folder.iterdir()}
    assert names == {"config.json", "generation_config.json", "model.safetensors"}
    hub.failure = OfflineModeIsEnabled("offline")
    assert fetch("owner/tiny") == folder == cached("owner/tiny")
    assert open_checkpoint("owner/tiny").config.hidden_size == 32
    assert len(hub.asked) == 2


def test_what_goes_with_the_weights_is_fetched(hub: Hub) -> None:
    add_companions(hub.files)
    folder = fetch("owner/tiny")
    assert companions(folder).keys() == {*COMPANIONS, "README.md"}  # the card says under which licence


def test_a_gptq_model_of_the_old_kind_is_fetched(hub: Hub) -> None:
    (hub.files / "model.safetensors").rename(hub.files / "gptq_model-4bit-128g.safetensors")
    (hub.files / "quantize_config.json").write_text("{}")
    folder = fetch("owner/tiny")
    assert (folder / "quantize_config.json").is_file() and cached("owner/tiny") == folder


def test_a_download_that_was_cut_off_is_not_taken_for_whole(hub: Hub) -> None:
    index = {"weight_map": {"a": "model-1-of-2.safetensors", "b": "model-2-of-2.safetensors"}}
    (hub.files / "model.safetensors").unlink()
    (hub.files / "model.safetensors.index.json").write_text(json.dumps(index))
    for name in ("model-1-of-2.safetensors", "model-2-of-2.safetensors"):
        (hub.files / name).write_bytes(b"weights")
    hub.stop_before = "model-2-of-2.safetensors"
    with pytest.raises(CheckpointError, match=r"connection was reset.*again"):
        fetch("owner/tiny")
    assert cached("owner/tiny") is None
    hub.stop_before = ""
    assert (fetch("owner/tiny") / "model-2-of-2.safetensors").is_file()


def test_random_weights_ask_for_no_weights(hub: Hub) -> None:
    checkpoint = open_checkpoint("owner/tiny", random_weights=True)
    assert checkpoint.config.hidden_size == 32
    assert not list(checkpoint.folder.glob("*.safetensors"))
    assert cached("owner/tiny") is None and cached("owner/tiny", weights=False) == checkpoint.folder


@pytest.mark.parametrize(
    ("failure", "kind", "words"),
    [
        (RepositoryNotFoundError("404", response=response(404)), CheckpointError, "no such model on the hub.*spelling"),
        (GatedRepoError("403", response=response(403)), CheckpointError, "gated: accept its licence.*auth login"),
        (LocalEntryNotFoundError("no route"), CheckpointError, "cannot be reached: check the network"),
        (OfflineModeIsEnabled("offline"), CheckpointError, "cannot be reached"),
        (HfHubHTTPError("500 server error", response=response(500)), CheckpointError, "500 server error.*again"),
        (HfHubHTTPError.__mro__[1]("timed out"), CheckpointError, "timed out.*again"),
        (OSError(errno.ENOSPC, "No space left on device"), OutputError, "disk is full.*fetch owner/tiny again"),
    ],
)
def test_every_failure_is_one_line_with_its_remedy(
    hub: Hub, failure: Exception, kind: type[HalveError], words: str
) -> None:
    hub.failure = failure
    with pytest.raises(kind, match=words) as caught:
        fetch("owner/tiny")
    assert "owner/tiny" in str(caught.value) and "\n" not in str(caught.value)


def test_weights_of_another_kind_and_too_large_ones_are_refused_before_the_download(hub: Hub) -> None:
    hub.sizes["model.safetensors"] = 1 << 60
    with pytest.raises(OutputError, match=r"needs 1,152,921,504,60.* bytes .*HF_HOME"):
        fetch("owner/tiny")
    (hub.files / "model.safetensors").unlink()
    (hub.files / "pytorch_model.bin").write_bytes(b"pickled")
    with pytest.raises(CheckpointError, match=r"no safetensors.*halve convert"):
        fetch("owner/tiny")
    assert cached("owner/tiny", weights=False) is None


@pytest.mark.parametrize("name", ["noslash", "a/b/c", "./here", "~/models", "owner/"])
def test_what_is_no_hub_id_is_not_asked_for(hub: Hub, name: str) -> None:
    with pytest.raises(CheckpointError, match="not a hub id"):
        fetch(name)
    assert not hub.asked
