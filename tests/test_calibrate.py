"""Calibration text becomes windows without losing any of it in silence."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from halve.calibrate import Walk, make_windows, read_documents
from halve.checkpoint import open_checkpoint
from halve.errors import DataError


class Letters:
    """One token a letter; 0 is BOS."""

    bos_id = 0

    def encode(self, text: str, bos: bool) -> list[int]:
        return [0] * bos + [ord(c) for c in text]


def windows(documents: list[str], samples: int, window: int, seed: int = 0):
    return make_windows(documents, Letters(), samples, window, seed, "text.txt")  # type: ignore[arg-type]


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


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.txt", b"  \n", "holds no text"),
        ("a.txt", b"\xff\xfe\xfa", "not readable as UTF-8"),
        ("a.jsonl", b'{"text": "x"}\nnonsense\n', r"a\.jsonl:2: needs a JSON object"),
        ("a.jsonl", b'{"body": "x"}\n', r"a\.jsonl:1"),
    ],
)
def test_bad_files(tmp_path: Path, name: str, content: bytes, words: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=words):
        read_documents(tmp_path / name)


def test_unknown_name() -> None:
    with pytest.raises(DataError, match="no such file, and not a named set"):
        read_documents("c5")


def test_real_c4_sample_fills_its_windows(assets: Path) -> None:
    from halve.tokenizer import load_tokenizer

    documents = read_documents(assets / "data" / "c4_sample_1000.jsonl")
    tokenizer = load_tokenizer(assets / "models" / "stories260K")
    calibration = make_windows(documents, tokenizer, 32, 512, 0, "c4")
    assert calibration.windows.shape == (32, 512) and calibration.held_out.shape == (1, 512)
    assert (calibration.windows[:, 0] == tokenizer.bos_id).all()


@torch.inference_mode()
def test_the_walk_sees_what_the_model_sees(make_hf) -> None:
    """States after all blocks are the model's own, and collected inputs are those that really reach a linear."""
    from halve.calibrate import Calibration
    from halve.checkpoint import load_model

    checkpoint = open_checkpoint(make_hf("qwen3"))
    tokens = torch.randint(0, 97, (3, 10), generator=torch.Generator().manual_seed(0))
    walk = Walk(checkpoint, Calibration(tokens[:2], tokens[2:], {}), torch.float32, torch.float32, "cpu")
    for index in range(3):
        view = walk.block(index)
        seen: dict[str, list[torch.Tensor]] = {"down_proj": []}
        view.collect(["down_proj"], lambda role, x, seen=seen: seen[role].append(x))
        assert torch.cat(seen["down_proj"]).shape == (20, 48)
        assert view.block is not None
        walk.advance(view.block)
    walk.finish_states()
    model = load_model(checkpoint.folder)
    expected = model.hidden(tokens)
    torch.testing.assert_close(torch.cat(walk.states[0]), expected[:2], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(torch.cat(walk.states[1]), expected[2:], rtol=1e-4, atol=1e-5)
