"""The model card: what the hub reads of it, what a page shows, whose figures it gives and whose file it replaces."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
from collections.abc import Callable
from html import unescape
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt

from halve import compress, evaluate, write_card
from halve.checkpoint.identity import model_sha256
from halve.errors import DataError, HalveError, OutputError
from halve.escapes import plain
from halve.files.contents import CHECK, is_card
from halve.measure.records import new_record, write_record
from tests.common import BENCHMARK, write_word_tokenizer

HOSTILE = [
    "plain",
    "a|b`c`<script>alert(1)</script>",
    "---\nlicense: stolen\n---\n# no",
    "name: [x, *y, &z !!python/object:os.system]",
    "``` \n</code><img src=x onerror=y>",
    "yes", "null", "1e3", "#", "-", "'\"", "\u202eevil", "é 日本",
]  # fmt: skip


@pytest.fixture(scope="module")
def dense(make_hf: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = Path(shutil.copytree(make_hf("llama"), tmp_path_factory.mktemp("card") / "dense"))
    write_word_tokenizer(folder, "the a cat dog sat ran on mat .".split())
    return folder


@pytest.fixture(scope="module")
def compressed(dense: Path) -> Path:
    return compress(dense, dense.parent / "int8", ["rtn:bits=8"]).out


@pytest.fixture
def model(compressed: Path, tmp_path: Path) -> Path:
    """A copy to write into."""
    return Path(shutil.copytree(compressed, tmp_path / "int8"))


def evaluation(model: Path, **more: Any) -> dict[str, Any]:
    """A record of a comparison by hand, of this very model."""
    figures: dict[str, Any] = {
        "task": "perplexity", "protocol": "windows", "data": "wiki.txt", "data_sha256": "00", "limit": None, "window": 64,
        "device": "cpu", "dtype": "float32", "not_measured": {}, "accuracy": None, "accuracy_ci95": None, "questions": None,
        "answered": None, "tokens": 99, "nll_nats_per_token": 1.0, "perplexity": 7.0, "base_perplexity": 6.5,
        "base": {"model": "some/DENSE", "fingerprint": "f", "dtype": "float32", "recipe": [], "kept": None},
        "kl_nats_per_token": 0.01234, "kl_nats_per_token_interval": [0.0111, 0.0135], "same_top_share": 0.9512,
        "same_top_share_interval": [0.94, 0.96], "expected_acceptance": 0.97, "perplexity_ratio": 1.0769,
        "perplexity_ratio_interval": [1.05, 1.1],
    }  # fmt: skip
    figures |= {"model_sha256": model_sha256(model)} | more
    return new_record("evaluation", "int8", command="halve evaluate", recipe=[], **figures)


def metadata(card: Path) -> dict[str, Any]:
    return ModelCard.load(card).data.to_dict()


def shown(card: Path) -> str:
    """The page that a reader sees, as HTML."""
    return MarkdownIt("commonmark").enable("table").render(ModelCard.load(card).text)


def cells(card: Path) -> dict[str, tuple[str, str]]:
    """Figure -> value and interval."""
    rows = re.findall(r"<tr>\s*(.*?)\s*</tr>", shown(card), re.DOTALL)
    found = [[unescape(cell) for cell in re.findall(r"<td[^>]*>(.*?)</td>", row)] for row in rows]
    return {row[1]: (row[2], row[3]) for row in found if len(row) == 4 and not row[0].startswith("rtn")}


def test_front_matter_and_text(model: Path) -> None:
    card = write_card(model)
    assert card == model / "README.md" and is_card(card)
    assert metadata(card) == {"library_name": "transformers", "tags": ["halve", "compressed-tensors"]}
    page = unescape(shown(card))
    assert "This is dense, made smaller" in page and "rtn:bits=8" in page and "Not measured yet" in page
    assert "halve compress dense int8 --step rtn:bits=8" in page
    manifest = json.loads((model / "halve.json").read_text())
    held = sum(t.stat().st_size for t in model.glob("*.safetensors"))
    before, after = (float(n) for n in re.findall(r"([\d.]+) kB of weights became ([\d.]+) kB", page)[0])
    assert before == pytest.approx(manifest["weight_bytes_before"] / 1e3, rel=5e-3)
    assert 0.5 * held / 1e3 < after < held / 1e3 < before  # headers are no weights
    first = card.read_bytes()
    assert write_card(model).read_bytes() == first


@pytest.mark.parametrize(
    "steps",
    [
        ["rtn:bits=8"],
        ["rtn:bits=8,symmetric=false"],
        ["rtn:bits=4,group_size=16,targets=*_proj", "rtn:bits=8,targets=lm_head,untie=true"],
        ["rtn:bits=8,targets=Linear|Embedding"],
        ["drop-layers:layers=1"],
    ],
)
def test_what_the_card_says_is_how_it_loads(dense: Path, tmp_path: Path, steps: list[str]) -> None:
    model = compress(dense, tmp_path / "out", steps).out
    page = unescape(shown(write_card(model)))
    code = re.findall(r"<pre><code>(from transformers.*?)</code></pre>", page, re.DOTALL)[0]
    scope: dict[str, Any] = {}
    here = Path.cwd()
    os.chdir(model.parent)
    try:
        exec(code, scope)
    finally:
        os.chdir(here)
    assert scope["model"].config.vocab_size == 97 and scope["tokenizer"]("cat")["input_ids"]


@pytest.mark.parametrize(
    "steps",
    [
        ["l1-inputs:fraction=0.25"],
        ["rtn:bits=4,group_size=16", "rtn:bits=8,targets=embed_tokens"],
        ["rtn:bits=4,group_size=16,targets=*q_proj", "rtn:bits=8,symmetric=false,targets=*v_proj"],
    ],
)
def test_a_model_that_is_halves_alone(dense: Path, tmp_path: Path, steps: list[str]) -> None:
    out = compress(dense, tmp_path / "out", steps).out
    card = write_card(out)
    assert metadata(card)["library_name"] == "halve"
    assert "loads in halve alone" in shown(card) and "from transformers" not in shown(card)


def test_figures_are_those_of_the_records(model: Path, tmp_path: Path) -> None:
    write_record(tmp_path / "kl.json", evaluation(model))
    speed = BENCHMARK | {"decode_tokens_per_s": 123.4, "model_sha256": model_sha256(model)}
    write_record(tmp_path / "speed.json", new_record("benchmark", "int8", command="x", recipe=[], **speed))
    found = cells(write_card(model, [tmp_path / "kl.json", tmp_path / "speed.json"]))
    assert found["KL divergence from DENSE, nats a token"] == ("0.0123", "0.0111 to 0.0135")
    assert found["same top token as DENSE"] == ("95.1 %", "94.0 % to 96.0 %")
    assert found["perplexity / that of DENSE"] == ("1.077", "1.05 to 1.1")
    assert found["perplexity of DENSE"][0] == "6.500" and found["decode, tokens/s"][0] == "123.4"


def test_figures_of_questions(model: Path, tmp_path: Path) -> None:
    changed = {"right_to_wrong": 44, "wrong_to_right": 49, "base_accuracy": 0.541, "agreement": 0.79}
    asked = {
        "task": "multiple-choice",
        "protocol": "pmi",
        "accuracy": 0.55,
        "accuracy_ci95": [0.51, 0.59],
        "questions": 615,
    }
    write_record(tmp_path / "exam.json", evaluation(model, **asked, **changed))
    found = cells(write_card(model, [tmp_path / "exam.json"]))
    assert found["accuracy"] == ("55.0 %", "51.0 % to 59.0 %") and found["accuracy of DENSE"][0] == "54.1 %"
    assert found["right to wrong, questions"][0] == "44" and found["wrong to right, questions"][0] == "49"
    assert "perplexity" not in found


def test_a_record_without_a_base_has_no_rows_of_it(model: Path, tmp_path: Path) -> None:
    record = evaluation(model)
    against = ("base", "kl_", "same_", "expected", "perplexity_ratio", "base_")
    write_record(tmp_path / "ppl.json", {k: v for k, v in record.items() if not k.startswith(against)})
    assert cells(write_card(model, [tmp_path / "ppl.json"])) == {"perplexity": ("7.000", "-")}


def test_what_is_no_number_is_said(model: Path, tmp_path: Path) -> None:
    broken = evaluation(model, perplexity=float("inf"), perplexity_ratio=float("inf"), perplexity_ratio_interval=None)
    broken["base"] = broken["base"] | {"kept": 1024}
    write_record(tmp_path / "kl.json", broken)
    found = cells(write_card(model, [tmp_path / "kl.json"]))
    assert found["perplexity"][0] == "inf" and found["perplexity / that of DENSE"] == ("inf", "-")
    assert "KL divergence from DENSE, nats a token (at least)" in found


def test_the_newest_of_equal_measurements_counts(model: Path, tmp_path: Path) -> None:
    for name, date, kl in (("a", "2026-01-02", 0.5), ("b", "2026-01-01", 0.25)):
        write_record(tmp_path / f"{name}.json", evaluation(model, kl_nats_per_token=kl) | {"date": date})
    found = cells(write_card(model, [tmp_path / "a.json", tmp_path / "b.json"]))
    assert found["KL divergence from DENSE, nats a token"][0] == "0.5"


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"model_sha256": "0" * 64}, "another model"),
        ({"model_sha256": None}, "by content"),
        ({"kind": "notes"}, "of one model"),
    ],
)
def test_records_of_another_model(model: Path, tmp_path: Path, change: dict[str, Any], why: str) -> None:
    record = evaluation(model) | change
    if record["model_sha256"] is None:
        del record["model_sha256"]
    folder = tmp_path / "records"
    folder.mkdir()
    (folder / "kl.json").write_text(json.dumps(record))
    with pytest.raises(DataError, match=why):
        write_card(model, [folder / "kl.json"])
    assert not (model / "README.md").exists()
    write_record(folder / "own.json", evaluation(model))
    told: list[str] = []
    found = cells(write_card(model, [folder], on_left_out=told.append))
    assert len(told) == 1 and why in told[0] and found["perplexity"][0] == "7.000"


def test_the_record_of_the_check_counts_only_while_it_is_of_this_model(
    dense: Path, model: Path, tmp_path: Path
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("the cat sat on the mat . a dog ran . " * 20)
    record = evaluate(model, task="perplexity", data=text, base=dense)
    write_record(model / CHECK, record)
    told: list[str] = []
    found = cells(write_card(model, on_left_out=told.append))
    assert not told and found["same top token as dense"][0] == f"{100 * record.get('same_top_share', 0):.1f} %"
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.1}))
    assert not cells(write_card(model, on_left_out=told.append)) and CHECK in told[0] and "another model" in told[0]


@pytest.mark.parametrize("name", HOSTILE)
def test_names_do_nothing_but_stand_there(model: Path, tmp_path: Path, name: str) -> None:
    folder = model.rename(tmp_path / name.replace("/", "_").replace("\n", " ")) if name != "plain" else model
    path = folder / "halve.json"
    manifest = json.loads(path.read_text())
    origin = {"source": name, "windows": 3, "windows_asked": 4, "window_tokens": 8, "seed": 1}
    manifest |= {"base_model": name, "calibration": origin, "recipe": [{"step": name}]}
    manifest["steps"] = [step | {"step": name, "resolved": {"step": name}} for step in manifest["steps"]]
    path.write_text(json.dumps(manifest))
    record = evaluation(folder, data=name)
    record["base"] = record["base"] | {"model": name}
    write_record(tmp_path / "kl.json", record)
    card = write_card(folder, [tmp_path / "kl.json"])
    assert metadata(card) == {"library_name": "transformers", "tags": ["halve", "compressed-tensors"]}
    html = shown(card)
    assert set(re.findall(r"<(\w+)", html)) <= set("h1 h2 p table thead tbody tr th td pre code".split())
    assert unescape(re.findall("<h1>(.*)</h1>", html)[0]) == plain(folder.name)
    assert len(re.findall("<h2>", html)) == 3
    blocks = [unescape(block) for block in re.findall(r"<pre><code>(.*?)\n</code></pre>", html, re.DOTALL)]
    command, load, run = blocks
    asked = ["halve", "compress", name, folder.name, "--step", name, "--calibration", name]
    assert command == plain(shlex.join([*asked, "--samples", "4", "--window", "8", "--seed", "1"]))
    assert json.dumps(plain(folder.name), ensure_ascii=False) in load and plain(folder.name) in shlex.split(run)
    assert all(len(re.findall("<t[hd]", row)) == 4 for row in re.findall(r"<tr>.*?</tr>", html, re.DOTALL))


SOURCE = """---
license: llama3.2
license_link: https://example.org/licence
language: [no, en]
base_model: owner/parent
tags:
- stories
- halve
extra_gated_prompt: sign here
---
# Theirs
"""


def test_what_the_source_says_stays_through_every_step(dense: Path, model: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(dense, tmp_path / "source"))
    (source / "README.md").write_text(SOURCE)
    told = metadata(write_card(model, source=source))
    assert told["license"] == "llama3.2" and told["license_link"] == "https://example.org/licence"
    assert told["language"] == ["no", "en"], "Norwegian is no truth value"
    assert told["base_model"] == "owner/parent" and told["base_model_relation"] == "quantized"
    assert told["tags"] == ["halve", "compressed-tensors", "stories"] and "extra_gated_prompt" not in told
    again = metadata(write_card(model))  # remade without the source
    assert again == told
    further = tmp_path / "further"
    shutil.copytree(model, further)
    (further / "README.md").unlink()
    assert metadata(write_card(further, source=model)) == told


def test_the_model_that_it_was_made_from_goes_before_that_ones_base(dense: Path, model: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(dense, tmp_path / "source"))
    (source / "README.md").write_text(SOURCE)
    manifest = json.loads((model / "halve.json").read_text()) | {"base_model": "owner/Model-1.5_b"}
    (model / "halve.json").write_text(json.dumps(manifest))
    card = write_card(model, source=source)
    assert metadata(card)["base_model"] == "owner/Model-1.5_b"
    assert '<a href="https://huggingface.co/owner/Model-1.5_b">owner/Model-1.5_b</a>' in shown(card)


@pytest.mark.parametrize(
    "text",
    [
        "# no front matter",
        "---\n: [broken\n---\n",
        "---\n- a list\n---\n",
        "---\nlicense: {a: b}\nlanguage: [[en]]\nbase_model:\ntags: []\n---\n",
        "---\n" + "\n".join([f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9 if n else ['x'])}]" for n in range(30)]) + "\n---\n",
        "---\nx: " + "[" * 20_000 + "\n---\n",
        b"---\nname: \xff\xfe\n---\n",
        "---\nnever closed: " + "x" * 100,
    ],
)  # fmt: skip
def test_a_source_card_that_cannot_be_read_says_nothing(
    dense: Path, model: Path, tmp_path: Path, text: str | bytes
) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "README.md").write_bytes(text if isinstance(text, bytes) else text.encode())
    card = write_card(model, source=source)
    assert metadata(card) == {"library_name": "transformers", "tags": ["halve", "compressed-tensors"]}


def test_a_source_card_elsewhere_is_not_read(model: Path, tmp_path: Path) -> None:
    (tmp_path / "other.md").write_text(SOURCE)
    source = tmp_path / "source"
    source.mkdir()
    (source / "README.md").symlink_to(tmp_path / "other.md")
    assert "license" not in metadata(write_card(model, source=source))


@pytest.mark.parametrize("kind", ["notes", "changed", "empty", "cut"])
def test_a_readme_of_somebody_else_stays(model: Path, kind: str) -> None:
    target = model / "README.md"
    if kind in ("changed", "cut"):
        write_card(model)
        whole = target.read_text()
        target.write_text(whole.replace("What it cost", "What I think") if kind == "changed" else whole[:-20])
    else:
        target.write_text("---\nlicense: mit\n---\nmy notes" if kind == "notes" else "")
    before = target.read_bytes()
    with pytest.raises(OutputError, match="--overwrite"):
        write_card(model)
    assert target.read_bytes() == before
    write_card(model, overwrite=True)
    assert is_card(target) and metadata(target).get("license") == ("mit" if kind == "notes" else None)


def test_a_readme_that_is_no_file(model: Path) -> None:
    (model / "README.md").mkdir()
    with pytest.raises(OutputError, match="folder"):
        write_card(model, overwrite=True)
    (model / "README.md").rmdir()
    os.mkfifo(model / "README.md")
    with pytest.raises(OutputError, match="pipe"):
        write_card(model, overwrite=True)


def test_only_what_halve_compressed_has_a_card(dense: Path, model: Path) -> None:
    with pytest.raises(DataError, match=r"halve\.json"):
        write_card(dense)
    (model / "halve.json").write_text("{}")
    with pytest.raises(DataError, match=r"halve\.json"):
        write_card(model)
    assert not (dense / "README.md").exists() and not (model / "README.md").exists()


@pytest.mark.parametrize("value", [[], "x", {"config_groups": []}, {"config_groups": {"a": 1}}])
def test_a_model_that_cannot_be_opened_has_no_card(model: Path, value: Any) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"quantization_config": value}))
    with pytest.raises(HalveError, match="quant"):
        write_card(model)
    assert not (model / "README.md").exists()


def test_a_model_with_a_card_is_replaced_and_with_notes_is_not(dense: Path, model: Path) -> None:
    write_card(model)
    compress(dense, model, ["rtn:bits=4"], overwrite=True)
    assert not (model / "README.md").exists()
    (model / "README.md").write_text("notes")
    with pytest.raises(OutputError, match=r"README\.md"):
        compress(dense, model, ["rtn:bits=8"], overwrite=True)
