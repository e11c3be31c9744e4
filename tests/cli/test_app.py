"""The command line end to end: what it prints, what it writes, how it fails."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from halve.cli.app import main
from tests.common import write_word_tokenizer

pytestmark = pytest.mark.slow


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Run the command line in this process: (exit code, stdout, stderr)."""

    def call(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()  # what fixtures printed
        monkeypatch.setattr(sys, "argv", ["halve", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            main()
        output = capsys.readouterr()
        code = stop.value.code
        return (code if isinstance(code, int) else 0), output.out, output.err

    return call


@pytest.fixture
def model(make_hf, tmp_path: Path) -> Path:
    """A small model with a word tokenizer."""
    folder = Path(shutil.copytree(make_hf("llama"), tmp_path / "model"))
    words = "the a cat dog sat ran on mat and then . , A B C D : Question Answer Article"
    write_word_tokenizer(folder, words.split())
    return folder


def test_compress_evaluate_benchmark_compare(run, model: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("the cat sat on the mat and then a dog ran . " * 40)
    out, records = tmp_path / "out", tmp_path / "records"
    code, printed, _ = run("compress", model, out, "--step", "rtn:bits=8", "--dry-run")
    assert code == 0 and "int8 per channel" in printed and "lm_head" in printed and not out.exists()
    told = "".join(printed.split())  # lines break where the terminal ends
    assert "model.embed_tokensandlm_headstaydense" in told and "--steprtn:bits=8,targets=embed_tokens|lm_head" in told
    code, printed, _ = run("compress", model, out, "--step", "rtn:bits=8")
    assert code == 0 and f"wrote {out}" in printed
    (done,) = json.loads((out / "halve.json").read_text())["steps"]
    assert f"parameters {done['parameters_before']:,} -> {done['parameters_after']:,}" in printed
    records.mkdir()
    for folder in (model, out):
        target = records / f"{folder.name}-ppl.json"
        code, printed, error = run("evaluate", folder, "--task", "perplexity", "--data", text, "--json", target)
        assert code == 0 and "perplexity" in printed, error
        speed = records / f"{folder.name}-speed.json"
        code, printed, error = run(
            "benchmark", folder, "--prompt-tokens", 8, "--new-tokens", 4, "--runs", 5, "--json", speed
        )
        assert code == 0 and "floor" in printed, error
    code, printed, _ = run("compare", records, "--csv")
    header, *rows = printed.splitlines()
    assert code == 0 and len(rows) == 2 and "perplexity" in header
    evaluation = json.loads((records / "out-ppl.json").read_text())
    speed = json.loads((records / "out-speed.json").read_text())
    always = {"halve_version", "torch_version", "machine", "command", "model", "recipe"}
    assert always | {"task", "protocol", "nll_nats_per_token", "perplexity", "tokens"} <= set(evaluation)
    assert set(
        "prefill_tokens_per_s ttft_ms decode_ms_median decode_ms_p10 decode_ms_p90 decode_tokens_per_s weight_bytes "
        "peak_memory_bytes bandwidth_gb_per_s floor_share kernels device".split()
    ) | always <= set(speed)
    assert speed["recipe"][0]["step"] == "rtn" and sum(speed["kernels"].values()) == 3 * 4 + 1
    dense = json.loads((records / "model-speed.json").read_text())
    assert speed["weight_bytes"] < dense["weight_bytes"]


@pytest.mark.parametrize(("name", "protocol"), [("text.txt", "windows"), ("text.jsonl", "documents")])
def test_compress_ends_with_the_check_that_evaluate_makes(
    run, model: Path, tmp_path: Path, name: str, protocol: str
) -> None:
    text, out = tmp_path / name, tmp_path / "out"
    words = "the cat sat on the mat and then a dog ran . " * 10
    text.write_text("".join(json.dumps({"text": words}) + "\n" for _ in range(3)) if ".jsonl" in name else words)
    step = ("--step", "rtn:bits=4")
    code, printed, _ = run("compress", model, out, *step, "--check", text, "--dry-run")
    assert code == 0 and "KL" not in printed and not out.exists()
    code, printed, error = run("compress", model, out, *step, "--check", text)
    assert code == 0 and f"against {model}: KL " in printed, error
    assert printed.index(f"wrote {out}\n") < printed.index("KL ") < printed.index(f"wrote {out / 'halve-check.json'}")
    record = json.loads((out / "halve-check.json").read_text())
    assert record["protocol"] == protocol and record["kl_nats_per_token"] > 0 and record["recipe"][0]["bits"] == 4
    asked = ("--task", "perplexity", "--data", text, "--protocol", protocol, "--base", model)
    run("evaluate", out, *asked, "--json", tmp_path / "own.json")
    apart = {"date", "command"}
    own = json.loads((tmp_path / "own.json").read_text())
    assert {k: v for k, v in own.items() if k not in apart} == {k: v for k, v in record.items() if k not in apart}
    assert run("compare", out, "--csv")[1].count("kl_nats_per_token (") == 1 and run("report", out)[0] == 0
    (out / "report.html").unlink()
    code, _, error = run("compress", model, out, *step, "--overwrite")
    assert code == 0 and not (out / "halve-check.json").exists(), error


def test_compress_leaves_a_card_which_takes_the_records_of_its_model(run, model: Path, tmp_path: Path) -> None:
    text, out = tmp_path / "text.txt", tmp_path / "out"
    text.write_text("the cat sat on the mat and then a dog ran . " * 20)
    (model / "README.md").write_text("---\nlicense: mit\n---\ntheirs\n")
    code, printed, error = run("compress", model, out, "--step", "rtn:bits=8", "--check", text)
    assert code == 0 and f"wrote {out / 'README.md'}" in printed, error
    card = (out / "README.md").read_text()
    assert "license: mit" in card and "theirs" not in card
    kl = json.loads((out / "halve-check.json").read_text())["kl_nats_per_token"]
    assert f"KL divergence from model, nats a token | {kl:.3g} |" in card
    records = tmp_path / "records"
    records.mkdir()
    for folder in (model, out):
        asked = ("--task", "perplexity", "--data", text, "--window", 32, "--json", records / f"{folder.name}.json")
        assert run("evaluate", folder, *asked)[0] == 0
    code, _, error = run("card", out, records / "model.json")
    assert code == 2 and "another model" in error and (out / "README.md").read_text() == card
    code, printed, error = run("card", out, records)
    assert code == 0 and "left out" in error and "another model" in error
    assert "window 32" in (out / "README.md").read_text() and "license: mit" in (out / "README.md").read_text()
    (out / "README.md").write_text("my own words")
    code, _, error = run("card", out)
    assert code == 2 and "--overwrite" in error and run("card", out, "--overwrite")[0] == 0
    code, _, error = run("card", model)
    assert code == 2 and "halve.json" in error


@pytest.mark.parametrize("dry_run", [(), ("--dry-run",)])
@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("none.txt", None, "none.txt"),
        ("empty.txt", " ", "holds no text"),
        ("short.jsonl", '{"text": "cat"}', "fewer than 2 tokens"),
        ("text.csv", "the cat", "unknown kind of text"),
        ("rows.jsonl", '{"words": "the cat sat"}', "no 'text' field"),
        ("out/LICENSE.txt", "the cat sat", "text of --check"),
    ],
)
def test_a_text_that_cannot_be_checked_on_is_found_before_any_work(
    run, model: Path, tmp_path: Path, name: str, content: str | None, words: str, dry_run: tuple[str, ...]
) -> None:
    text, out = tmp_path / name, tmp_path / "out"
    text.parent.mkdir(exist_ok=True)
    if content is not None:
        text.write_text(content)
    tokenizer = json.loads((model / "tokenizer.json").read_text())  # one that puts nothing before a text
    (model / "tokenizer.json").write_text(json.dumps(tokenizer | {"post_processor": None}))
    before = sorted(tmp_path.rglob("*"))
    code, printed, error = run("compress", model, out, "--step", "rtn:bits=4", "--check", text, *dry_run)
    assert code == 2 and words in error and error.count("\n") == 1 and not printed
    assert sorted(tmp_path.rglob("*")) == before


def test_multiple_choice_record(run, model: Path, tmp_path: Path) -> None:
    data = tmp_path / "q.jsonl"
    item = {
        "article": "the cat sat .",
        "questions": ["the cat ?"],
        "options": [["sat", "ran", "mat", "dog"]],
        "answers": ["A"],
    }
    data.write_text(json.dumps(item) + "\n")
    target = tmp_path / "r.json"
    code, printed, error = run("evaluate", model, "--task", "multiple-choice", "--data", data, "--json", target)
    assert code == 0 and "accuracy" in printed, error
    record = json.loads(target.read_text())
    assert {"accuracy", "accuracy_ci95", "questions", "answered", "protocol"} <= set(record)
    assert record["protocol"] == "letter" and record["questions"] == 1
    words = ("--task", "multiple-choice", "--data", data, "--protocol", "system1")
    code, printed, error = run("evaluate", model, *words)  # a study's protocol, by its name
    assert code == 0 and "[multiple-choice, system1]" in printed, error


def test_generate_streams_the_prompt_and_more(run, model: Path) -> None:
    code, printed, error = run("generate", model, "--prompt", "the cat", "--max-new-tokens", 5)
    assert code == 0 and printed.startswith("the cat") and len(printed) > len("the cat\n"), error


def test_random_weights_from_a_config_alone(run, model: Path, tmp_path: Path) -> None:
    shutil.copyfile(model / "config.json", tmp_path / "config.json")
    target = tmp_path / "r.json"
    code, _, error = run(
        "benchmark",
        tmp_path / "config.json",
        "--random-weights",
        "--prompt-tokens",
        4,
        "--new-tokens",
        2,
        "--json",
        target,
    )
    assert code == 0, error
    assert "random" in json.loads(target.read_text())["not_measured"]["accuracy"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["compress", "nowhere", "OUT", "--step", "rtn"], "no such folder"),
        (["compress", "MODEL", "OUT"], "no step given"),
        (["compress", "MODEL", "OUT", "--step", "rtn:bits=5"], "bits=5"),
        (["compress", "MODEL", "OUT", "--step", "rtn", "--recipe", "r.yaml"], "use one of them"),
        (["compress", "MODEL", "OUT", "--recipe", "none.yaml"], "none.yaml"),
        (["compress", "MODEL", "OUT", "--step", "rtn", "--dtype", "int9"], "int9"),
        (["compress", "MODEL", "OUT", "--step", "rtn", "--device", "tpu9"], "tpu9"),
        (["compress", "MODEL", "MODEL", "--step", "rtn", "--overwrite"], "own folder"),
        (["compress", "MODEL", "OUT", "--step", "gptq:group_size=16", "--calibration", "none.txt"], "none.txt"),
        (["evaluate", "MODEL", "--task", "chess"], "chess"),
        (["evaluate", "MODEL", "--task", "perplexity"], "--data"),
        (["evaluate", "MODEL", "--task", "perplexity", "--data", "EMPTY"], "empty.txt"),
        (["benchmark", "MODEL", "--prompt-tokens", "100"], "exceed the context"),
        (["generate", "MODEL", "--prompt", "x", "--top-p", "2"], "top_p=2.0"),
        (["compare", "none.json"], "none.json"),
        (["fetch", "noslash"], "not a hub id"),
        (["reproduce", "system9", "--model", "MODEL"], "system9"),
        (["reproduce", "system1", "--model", "MODEL", "--out", "OUT"], "a context of 64 is too short"),
        (["report", "none"], "no such folder"),
        (["frobnicate"], "frobnicate"),
        (["compress", "MODEL", "OUT", "--samples", "many"], "--samples"),
    ],
)
def test_wrong_requests_are_one_line_and_exit_code_2(
    run, model: Path, tmp_path: Path, arguments: list[str], words: str
) -> None:
    (tmp_path / "empty.txt").touch()
    before = sorted(p.name for p in tmp_path.iterdir())
    places = {"MODEL": model, "OUT": tmp_path / "out", "EMPTY": tmp_path / "empty.txt"}
    code, printed, error = run(*(places.get(a, a) for a in arguments))
    assert code == 2 and words in error, (code, error)
    assert error.startswith("halve: ") and error.count("\n") == 1 and not printed
    assert sorted(p.name for p in tmp_path.iterdir()) == before


def test_help_and_version(run) -> None:
    code, printed, _ = run("--help")
    assert code == 0
    for command in (
        *("compress", "evaluate", "benchmark", "generate", "compare", "demo", "convert", "steps", "layers"),
        *("fetch", "reproduce", "report", "export"),
    ):
        assert command in printed
        assert run(command, "--help")[0] == 0
    assert run("--version")[1].strip() == __import__("halve").__version__
    assert run()[0] == 0


def test_steps_lists_every_method(run) -> None:
    from halve.compression.methods import METHODS

    printed = run("steps")[1]
    for name in METHODS:
        assert name in printed


@pytest.mark.parametrize(
    ("raised", "code", "said"),
    [
        (PermissionError(13, "Permission denied", "there/it"), 2, "halve: there/it: Permission denied; check the path"),
        (OSError("odd"), 2, "halve: odd; check the path"),
        (MemoryError("16 TB"), 2, "halve: out of memory (16 TB): use a smaller model"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: not enough memory"), 2, "halve: out of memory ([enforce"),
        (KeyError("x"), 1, "halve: this is a fault of halve itself: please report it with the text above"),
    ],
)
def test_what_a_command_raises(run, monkeypatch: pytest.MonkeyPatch, raised: Exception, code: int, said: str) -> None:
    def fail(*arguments: object) -> None:
        raise raised

    monkeypatch.setattr("halve.checkpoint.hub.fetch", fail)
    ended, _, error = run("fetch", "owner/name")
    assert ended == code and error.splitlines()[-1].startswith(said)
    assert ("Traceback" in error) == (code == 1) and (code == 1 or len(error.splitlines()) == 1)


def test_whoever_reads_the_output_may_stop(model: Path) -> None:
    command = [sys.executable, "-c", "from halve.cli.app import main; main()", "steps"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    assert process.wait() == 1 and not process.stderr.read()
    process.stderr.close()


def test_a_token_without_an_embedding_is_named(run, model: Path, tmp_path: Path) -> None:
    words = [f"w{index}" for index in range(93)]
    write_word_tokenizer(model, [*words, "<extra>", "new"])  # ids 96 and 97 of 97 entries
    text, fine = tmp_path / "text.txt", tmp_path / "fine.txt"
    text.write_text("w1 new w2 " * 200)
    fine.write_text("w1 w92 w2 " * 200)
    data = tmp_path / "q.jsonl"
    asked = {"article": "w1 w2", "questions": ["new"], "options": [["w1", "w2"]], "answers": ["A"]}
    data.write_text(json.dumps(asked) + "\n")
    gptq = ("--step", "gptq:bits=8,group_size=-1", "--samples", 2, "--window", 16)
    for words in (
        ("compress", model, tmp_path / "out", *gptq, "--calibration", text),
        ("evaluate", model, "--task", "perplexity", "--data", text),
        ("evaluate", model, "--task", "multiple-choice", "--data", data),
        ("generate", model, "--prompt", "w1 new"),
        ("layers", model, "--data", text, "--out", tmp_path / "layers", "--samples", 2, "--window", 16),
    ):
        code, _, error = run(*words)
        assert code == 2 and "token 'new' (id 97) is outside of the model's vocabulary of 97" in error.splitlines()[-1]
    assert not (tmp_path / "out").exists() and not (tmp_path / "layers").exists()
    assert run("compress", model, tmp_path / "out", *gptq, "--calibration", fine)[0] == 0


@pytest.mark.parametrize("begins", [True, False])
def test_records_say_what_a_text_begins_with(run, model: Path, tmp_path: Path, begins: bool) -> None:
    if not begins:
        path = model / "tokenizer.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"post_processor": None}))
    text = tmp_path / "text.txt"
    text.write_text("the cat sat on the mat . " * 4)
    assert run("evaluate", model, "--task", "perplexity", "--data", text, "--json", tmp_path / "r.json")[0] == 0
    record = json.loads((tmp_path / "r.json").read_text())
    assert record["bos_ids"] == ([1] if begins else []) and record["tokens"] == 4 * 7 - (not begins)
