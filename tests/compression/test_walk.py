"""Calibration text becomes windows without losing any of it in silence."""

from __future__ import annotations

import json
import random
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

from halve.checkpoint.reader import open_checkpoint
from halve.checkpoint.tokenizer import load_tokenizer
from halve.compression.walk import Walk
from halve.compression.windows import CalibrationOptions, make_windows
from halve.errors import DataError
from halve.model.decoder import Block
from halve.texts import read_documents


class Letters:
    """One token a letter; 0 is BOS."""

    bos_ids = (0,)

    def encode(self, text: str, bos: bool) -> list[int]:
        return [0] * bos + [ord(c) for c in text]


def windows(documents: list[str], samples: int, window: int, seed: int = 0):
    return make_windows(documents, Letters(), CalibrationOptions("text.txt", samples, window, seed), 5000)  # type: ignore[arg-type]


def test_short_documents_are_packed_with_bos_between() -> None:
    calibration = windows(["ab", "cd", "ef"], 4, 3)
    rows = torch.cat([calibration.windows, calibration.held_out]).tolist()
    # 2+1+2+1+2 tokens in windows of BOS + 2: every letter of the stream is there, in order
    assert all(row[0] == 0 for row in rows)
    stream = [t for row in rows for t in row[1:]]
    text = "".join("|" if t == 0 else chr(t) for t in stream)
    assert sorted(text.split("|")) == ["ab", "cd", "ef"]
    assert calibration.origin["documents_used"] == 3 and calibration.origin["windows"] == 3
    assert calibration.origin["windows_asked"] == 4  # and the shortfall is on record


def test_calibration_and_held_out_never_overlap_and_the_seed_decides() -> None:
    documents = ["".join(chr(1000 + 50 * i + j) for j in range(50)) for i in range(20)]
    a, b, c = windows(documents, 16, 26), windows(documents, 16, 26), windows(documents, 16, 26, seed=1)
    assert a.windows.shape == (16, 26) and a.held_out.shape == (1, 26)
    assert torch.equal(a.windows, b.windows) and not torch.equal(a.windows, c.windows)
    assert not set(a.windows[:, 1:].flatten().tolist()) & set(a.held_out[:, 1:].flatten().tolist()) - {0}


def test_calibration_options_are_checked_when_made() -> None:
    for wrong in ({"samples": 0}, {"window": 1}):
        with pytest.raises(DataError, match="need at least 1 sample and 2 tokens a window"):
            CalibrationOptions("text.txt", **wrong)


def test_too_little_text_says_how_much_there_is() -> None:
    with pytest.raises(DataError, match="has 5 tokens: two windows of 10 need 18"):
        windows(["abcde"], 4, 10)


def test_documents_of_every_kind_of_file(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\n<|endoftext|>\ntwo")
    (tmp_path / "b.jsonl").write_text('{"text": "three"}\n\n{"article": "four", "questions": []}\n')
    race = tmp_path / "race"
    race.mkdir()
    (race / "1.txt").write_text(json.dumps({"article": "five", "questions": [], "options": [], "answers": []}))
    assert read_documents(tmp_path / "a.txt") == ["one", "two"]
    assert read_documents(tmp_path / "b.jsonl") == ["three", "four"]
    assert read_documents(race) == ["five"]
    (tmp_path / "hub.jsonl").write_text(
        "".join(json.dumps({"article": a, "question": q}) + "\n" for a, q in ("xy", "xz", "wz"))
    )
    assert read_documents(tmp_path / "hub.jsonl") == ["x", "w"]  # a question a line: the article is there once


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.txt", b"  \n", "holds no text"),
        ("a.txt", b"\xff\xfe\xfa", "line 1: not UTF-8 text"),
        ("a.jsonl", b'{"text": "x"}\nnonsense\n', r"a\.jsonl, line 2: not JSON .* needs a JSON object"),
        ("a.jsonl", b'{"body": "x"}\n', r"a\.jsonl, line 1: it needs"),
        ("a.jsonl", b'{"text": null}\n', r"a\.jsonl, line 1: .* must be a string, not NoneType"),
    ],
)
def test_bad_files(tmp_path: Path, name: str, content: bytes, words: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=words):
        read_documents(tmp_path / name)


def test_unknown_name() -> None:
    with pytest.raises(DataError, match="no such file, and not a named set"):
        read_documents("c5")


@pytest.mark.parametrize("name", ["c4", "wikitext2"])
def test_named_sets_come_from_the_hub(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Streamed from the training split of the set that is meant; empty rows, which wikitext is full of, are left out."""
    asked: list[Any] = []

    def load_dataset(*args: Any, **options: Any) -> list[dict[str, Any]]:
        asked.append((args, options))
        return [{"text": "one"}, {"text": " "}, {"text": "two"}]

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    assert read_documents(name) == ["one", "two"]
    ((hub_id,), options) = asked[0]
    assert hub_id in ("allenai/c4", "Salesforce/wikitext") and options["split"] == "train" and options["streaming"]


def test_a_named_set_that_cannot_be_had_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: Any, **__: Any) -> None:
        raise ConnectionError("no route\nand much more")

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=unreachable))
    with pytest.raises(DataError, match=r"allenai/c4 .* cannot be fetched: no route.* give a local file"):
        read_documents("c4")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match="needs the package 'datasets'; pip install"):
        read_documents("c4")


@pytest.mark.parametrize(
    ("source", "available"),
    [
        ("c4_sample_1000.jsonl", 1000),
        ("tinystories_317.txt", 317),
        ("race/race_high_dev.jsonl", 1021),
        ("race/test_high_txt_sample", 40),
    ],
)
def test_real_files_fill_their_windows(assets: Path, source: str, available: int) -> None:
    """The record counts what was used: the documents drawn hold the tokens of the windows, one fewer would not."""
    documents = read_documents(assets / "data" / source)
    tokenizer = load_tokenizer(assets / "models" / "stories260K")
    calibration = make_windows(documents, tokenizer, CalibrationOptions(source, 32, 256), 512)
    assert calibration.windows.shape == (32, 256) and calibration.held_out.shape == (1, 256)
    assert (calibration.windows[:, 0] == tokenizer.bos_ids[0]).all()
    origin = calibration.origin
    assert (origin["documents_available"], origin["windows"], origin["tokens"]) == (available, 32, 32 * 256)
    order = list(range(available))
    random.Random(0).shuffle(order)
    used = order[: int(str(origin["documents_used"]))]
    lengths = [len(tokenizer.encode(documents[i], bos=True)) for i in used]
    assert sum(lengths[:-1]) - 1 < 33 * 255 <= sum(lengths) - 1  # the first BOS belongs to the window, not to the text


def reaching_down_proj(block: Block, states: torch.Tensor, walk: Walk) -> torch.Tensor:
    """What down_proj reads when the block runs as a whole, [rows, in]."""
    inputs: list[torch.Tensor] = []
    handle = block.linears["down_proj"].register_forward_pre_hook(lambda _, args: inputs.append(args[0].flatten(0, -2)))
    block(states, walk.span(states.shape[1]))
    handle.remove()
    return torch.cat(inputs)


@torch.inference_mode()
def test_the_walk_sees_what_the_model_sees(make_hf) -> None:
    """States after all blocks are the model's own, and the inputs of a stage are those that really reach its linears."""
    from halve.checkpoint.reader import load_model
    from halve.compression.windows import Calibration

    checkpoint = open_checkpoint(make_hf("qwen3"))
    tokens = torch.randint(0, 97, (3, 10), generator=torch.Generator().manual_seed(0))
    walk = Walk(checkpoint, Calibration(tokens[:2], tokens[2:], {}), torch.float32, "cpu")
    for index in range(3):
        view = walk.block(index)
        assert view.block is not None
        reaching = reaching_down_proj(view.block, torch.cat(walk.states[0]), walk)
        (stage,) = [stage for stage in view.stages() if "down_proj" in stage.roles]
        seen = torch.cat(list(stage.inputs(False)))
        assert seen.shape == (20, 48)
        torch.testing.assert_close(seen, reaching, rtol=1e-4, atol=1e-5)
        walk.advance(view.block)
    walk.finish_states()
    model = load_model(checkpoint.folder)
    expected = model.hidden(tokens)
    torch.testing.assert_close(torch.cat(walk.states[0]), expected[:2], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(torch.cat(walk.states[1]), expected[2:], rtol=1e-4, atol=1e-5)
