"""A model against its base: the same figures as a loop over transformers, at hand or from a file, and nothing else compared."""

from __future__ import annotations

import math
import random
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load, save

import halve
from halve.checkpoint.tokenizer import load_tokenizer
from halve.errors import DataError, HalveError
from halve.measure.quality import divergence
from halve.measure.quality.base import BaseComparison, Layout
from halve.measure.quality.base_file import BaseFile, BaseWriter, KeptItem
from halve.measure.quality.divergence import Distribution, log_softmax
from halve.measure.quality.evaluate import LoadedModel
from halve.measure.quality.scoring import question_nodes, sequence_node
from tests.common import write_lines, write_word_tokenizer

WORDS = "the a cat dog sat ran on under mat tree and then it was big small red blue he she saw house".split()
TEXTS = [" ".join(random.Random(seed).choices(WORDS, k=40 + seed)) for seed in range(6)]
OPTIONS = [["a cat", "a dog", "she"], ["the mat", "a big tree"]]
LETTERED = [
    "Article: {}\nQuestion: he saw\nA) a cat\nB) a dog\nC) she\nAnswer:",
    "Article: {}\nQuestion: it sat on\nA) the mat\nB) a big tree\nAnswer:",
]
KEYS = ("kl_nats_per_token", "same_top_share", "expected_acceptance", "perplexity_ratio", "base_perplexity")


def model_folder(make_hf: Callable[..., Path], change: float, words: list[str] = WORDS) -> Path:
    """A random model that reads words; `change` moves its weights away from those of the model at 0."""
    from transformers import AutoModelForCausalLM

    folder = make_hf("llama", seed=3, vocab_size=len(WORDS) + 8, max_position_embeddings=128)
    write_word_tokenizer(folder, words)
    if change:
        model = AutoModelForCausalLM.from_pretrained(folder)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += change * torch.randn(parameter.shape, generator=generator)
        model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def dense(make_hf: Callable[..., Path]) -> Path:
    return model_folder(make_hf, 0)


@pytest.fixture(scope="module")
def changed(make_hf: Callable[..., Path]) -> Path:
    return model_folder(make_hf, 0.03)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_lines(tmp_path_factory.mktemp("text") / "text.jsonl", *({"text": t} for t in TEXTS))


@pytest.fixture(scope="module")
def exam(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = [
        {
            "id": f"{n}",
            "article": t,
            "questions": ["he saw", "it sat on"],
            "options": OPTIONS,
            "answers": ["BCA"[n % 3], "AB"[n % 2]],
        }
        for n, t in enumerate(TEXTS[:3])
    ]
    return write_lines(tmp_path_factory.mktemp("exam") / "exam.jsonl", *rows)


class Loop:
    """Log-probabilities in float64, through transformers, a sequence at a time."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoModelForCausalLM

        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()

    def __call__(self, tokens: list[int]) -> torch.Tensor:
        with torch.no_grad():
            return self.model(torch.tensor([tokens])).logits[0].log_softmax(1)


def loop_over_text(dense: Path, changed: Path, sequences: list[list[int]]) -> dict[str, float]:
    base, model = Loop(dense), Loop(changed)
    kl, same, least, nll, base_nll = [], [], [], [], []
    for tokens in sequences:
        p, q = base(tokens)[:-1], model(tokens)[:-1]
        right = torch.tensor(tokens[1:]).unsqueeze(1)
        kl += (p.exp() * (p - q)).sum(1).tolist()
        same += (p.argmax(1) == q.argmax(1)).tolist()
        least += torch.minimum(p.exp(), q.exp()).sum(1).tolist()
        nll += (-q.gather(1, right)).flatten().tolist()
        base_nll += (-p.gather(1, right)).flatten().tolist()
    count = len(kl)
    ratio = math.exp((sum(nll) - sum(base_nll)) / count)
    return dict(
        zip(
            KEYS,
            (sum(kl) / count, sum(same) / count, sum(least) / count, ratio, math.exp(sum(base_nll) / count)),
            strict=True,
        )
    )


@pytest.mark.parametrize("protocol", ["documents", "windows", "joined"])
@pytest.mark.parametrize("batch_tokens", [1, 4096])
def test_text_by_a_float64_loop(dense: Path, changed: Path, text: Path, protocol: str, batch_tokens: int) -> None:
    record = halve.evaluate(
        changed, task="perplexity", data=text, protocol=protocol, window=32, base=dense, batch_tokens=batch_tokens
    )
    tokenizer = load_tokenizer(str(dense))
    if protocol == "documents":
        sequences = [tokenizer.encode(t, bos=True)[:32] for t in TEXTS]
    elif protocol == "windows":
        tokens, bos = tokenizer.encode("\n\n".join(TEXTS), bos=False), list(tokenizer.bos_ids)
        body = 32 - len(bos)
        sequences = [bos + tokens[i : i + body] for i in range(0, len(tokens), body)]
    else:
        tokens = tokenizer.encode("\n\n".join(TEXTS), bos=True)
        sequences = [tokens[i : i + 32] for i in range(0, len(tokens), 32)]
    expected = loop_over_text(dense, changed, [s for s in sequences if len(s) > 1])
    assert {key: record[key] for key in KEYS} == pytest.approx(expected, abs=1e-6, rel=1e-5)
    plain = halve.evaluate(
        changed, task="perplexity", data=text, protocol=protocol, window=32, batch_tokens=batch_tokens
    )
    assert record["nll_nats_per_token"] == pytest.approx(plain["nll_nats_per_token"], abs=1e-6)
    assert record["base"]["model"] == str(dense) and record["base"]["kept"] is None


@pytest.mark.parametrize("protocol", ["letter", "continuation", "pmi"])
def test_questions_by_a_float64_loop(dense: Path, changed: Path, exam: Path, protocol: str) -> None:
    asked: dict[str, Any] = {"task": "multiple-choice", "data": exam, "protocol": protocol}
    if protocol != "letter":
        asked["template"] = "plain"
    record = halve.evaluate(changed, **asked, base=dense)
    plain, base = halve.evaluate(changed, **asked), halve.evaluate(dense, **asked)
    assert record["accuracy"] == plain["accuracy"] and record["answers"] == plain["answers"]
    assert record["base_accuracy"] == base["accuracy"]
    pairs = [
        (a, b) for key in base["answers"] for a, b in zip(base["answers"][key], plain["answers"][key], strict=True)
    ]
    assert (record["right_to_wrong"], record["wrong_to_right"]) == (pairs.count(("1", "0")), pairs.count(("0", "1")))
    tokenizer, base_loop, model_loop = load_tokenizer(str(dense)), Loop(dense), Loop(changed)
    after: dict[Any, float] = {}  # what is predicted after the same tokens of a question counts once
    for article, number in ((t, n) for t in TEXTS[:3] for n in range(2)):
        context = article if protocol != "letter" else LETTERED[number].format(article)
        for option in OPTIONS[number] if protocol != "letter" else "ABC"[: len(OPTIONS[number])]:
            begin = len(tokenizer.encode(context, bos=True))
            tokens = tokenizer.encode(f"{context} {option}", bos=True)
            p, q = (loop(tokens) for loop in (base_loop, model_loop))
            kl = (p.exp() * (p - q)).sum(1)
            after |= {(number, *tokens[:t]): kl[t - 1].item() for t in range(begin, len(tokens))}
    assert record["positions"] == len(after)
    assert record["kl_nats_per_token"] == pytest.approx(sum(after.values()) / len(after), rel=1e-5, abs=1e-6)


def run(text: Path, model: Path, **options: Any) -> dict[str, Any]:
    return dict(halve.evaluate(model, task="perplexity", data=text, protocol="documents", **options))


def test_a_dense_model_against_itself(dense: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from halve.measure.quality import evaluate

    loaded, real = [], evaluate.load_model
    monkeypatch.setattr(
        evaluate, "load_model", lambda *given, **options: loaded.append(given) or real(*given, **options)
    )
    record = run(text, dense, base=dense)
    assert len(loaded) == 1  # no second copy in memory
    assert (record["kl_nats_per_token"], record["same_top_share"], record["expected_acceptance"]) == (0, 1, 1)
    assert record["perplexity_ratio_interval"] == [1, 1] and record["perplexity_difference"] == 0


def test_a_file_stands_for_its_model(tmp_path: Path, dense: Path, changed: Path, text: Path) -> None:
    whole, few = tmp_path / "whole.base", tmp_path / "few.base"
    exact = run(text, changed, base=dense, save_base=whole)
    assert exact["kl_gap_of_kept_tokens"]["mean"] == pytest.approx(0, abs=1e-6)
    run(text, dense, save_base=few, base_tokens=5)
    by_file = run(text, changed, base=whole)
    same = (*KEYS, "base_nll_nats_per_token", "perplexity_ratio_interval", "kl_nats_per_token_interval")
    for key in same:
        assert by_file[key] == pytest.approx(exact[key], rel=1e-4), key
    bound = run(text, changed, base=few)
    assert 0 < bound["kl_nats_per_token"] < exact["kl_nats_per_token"]
    assert bound["base"] == exact["base"] | {"kept": 5} and bound["base"]["fingerprint"]
    gap = run(text, changed, base=dense, save_base=few, base_tokens=5)["kl_gap_of_kept_tokens"]
    exact_gap = exact["kl_nats_per_token"] - bound["kl_nats_per_token"]
    assert gap["mean"] == pytest.approx(exact_gap, abs=1e-4 * exact["kl_nats_per_token"])


@pytest.mark.parametrize("protocol", ["letter", "pmi"])
def test_a_file_of_questions(tmp_path: Path, dense: Path, changed: Path, exam: Path, protocol: str) -> None:
    asked: dict[str, Any] = {"task": "multiple-choice", "data": exam, "protocol": protocol}
    exact = halve.evaluate(changed, **asked, base=dense, save_base=tmp_path / "exam.base")
    for batch_tokens in (1, 4096):
        by_file = halve.evaluate(changed, **asked, base=tmp_path / "exam.base", batch_tokens=batch_tokens)
        for key in ("kl_nats_per_token", "base_accuracy", "agreement", "right_to_wrong", "accuracy_difference"):
            # levels of 16 bit change a probability by up to 1e-4 of it
            assert by_file.get(key) == pytest.approx(exact.get(key), rel=1e-4), key


def test_what_was_not_asked_the_same_is_refused(
    tmp_path: Path,
    make_hf: Callable[..., Path],
    dense: Path,
    changed: Path,
    text: Path,
    exam: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    base = tmp_path / "text.base"
    run(text, dense, save_base=base)
    other = write_lines(tmp_path / "other.jsonl", *({"text": t} for t in reversed(TEXTS)))
    renamed = model_folder(make_hf, 0.03, list(reversed(WORDS)))
    smaller = make_hf("llama", vocab_size=20)
    write_word_tokenizer(smaller, WORDS[:10])
    for options, message in (
        ({"data": other}, "another text"),
        ({"window": 16}, "other tokens"),
        ({"limit": 2}, "other tokens"),
        ({"protocol": "windows"}, "another protocol"),
        ({"model": renamed}, "other tokens"),
        ({"model": smaller}, "another vocabulary"),
        ({"task": "multiple-choice", "data": exam, "protocol": None}, "another task"),
    ):
        asked = {"model": changed, "task": "perplexity", "data": text, "protocol": "documents"} | options
        with pytest.raises(HalveError, match=message):
            halve.evaluate(**asked, base=base)
    with pytest.raises(HalveError, match="its tokenizer makes other tokens"):
        run(text, renamed, base=dense)
    with pytest.raises(HalveError, match="has a vocabulary of 30 tokens, the model one of 20"):
        run(text, smaller, base=dense)
    with pytest.raises(HalveError, match="is a file of predictions already"):
        run(text, changed, base=base, save_base=tmp_path / "again.base")
    with monkeypatch.context() as patch:
        patch.setattr(LoadedModel, "load", lambda *_, **__: pytest.fail("weights were loaded first"))
        with pytest.raises(HalveError, match="nowhere"):
            run(text, changed, base=tmp_path / "nowhere")
    with pytest.raises(HalveError, match="base_tokens 0: must be at least 1"):
        run(text, changed, base=dense, save_base=tmp_path / "again.base", base_tokens=0)
    with pytest.raises(HalveError, match="predicts nothing to compare"):
        halve.evaluate(changed, task="multiple-choice", data=exam, protocol="generate", base=dense)
    assert [path.name for path in tmp_path.glob("*.base")] == ["text.base"]


def test_a_file_of_the_users_stays(tmp_path: Path, dense: Path, text: Path) -> None:
    theirs = tmp_path / "notes.base"
    theirs.write_text("mine")
    with pytest.raises(HalveError, match="notes"):
        run(text, dense, save_base=theirs)
    assert theirs.read_text() == "mine"
    base = tmp_path / "text.base"
    run(text, dense, save_base=base)
    run(text, dense, save_base=base, base_tokens=3)  # its own is replaced
    assert BaseFile(base).about["kept"] == 3


def test_a_failed_run_leaves_no_file(tmp_path: Path, dense: Path, text: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in dense.iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    weights = load((broken / "model.safetensors").read_bytes())
    weights["model.norm.weight"] *= 1e38
    (broken / "model.safetensors").write_bytes(save(weights, {"format": "pt"}))
    with pytest.raises(HalveError, match="not finite"):
        run(text, broken, save_base=tmp_path / "out.base")
    assert [path.name for path in tmp_path.iterdir()] == ["broken"]


@pytest.fixture
def kept(tmp_path: Path) -> tuple[Path, list[tuple[int, int]]]:
    """A base of one item with two positions of 50 tokens, 8 of them kept."""
    generator = torch.Generator().manual_seed(0)
    path, targets = tmp_path / "small.base", [(0, 7), (1, 9), (1, 11)]
    top = Distribution(log_softmax(5 * torch.randn(2, 50, generator=generator))).kept(8)
    writer = BaseWriter(path, 8)
    writer.add("0", KeptItem(top, torch.tensor([-1.0, -2.0, -3.0], dtype=torch.float64)), targets)
    writer.finish({"vocabulary": 50}, {"model": "m"})
    back = BaseFile(path).read("0", targets, 50)
    assert back.top.tokens is not None and top.tokens is not None
    assert torch.equal(back.top.tokens, top.tokens) and back.log_probs.tolist() == [-1, -2, -3]
    spread = top.log_probs.amax(1) - top.log_probs.amin(1)
    error = (back.top.log_probs - top.log_probs).abs().amax(1)
    assert bool((error <= spread * 2**-16).all())
    return path, targets


def replaced(path: Path, **changes: Any) -> None:
    """Put other tensors into the item of a base."""
    with zipfile.ZipFile(path) as archive:
        info, item = archive.read("base.json"), load(archive.read("0.safetensors"))
    item |= changes
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("base.json", info)
        archive.writestr("0.safetensors", save({k: v.contiguous() for k, v in item.items()}))


@pytest.mark.parametrize(
    "changes",
    [
        {"tokens": torch.full((2, 8), 50, dtype=torch.int32)},
        {"tokens": torch.full((2, 8), -1, dtype=torch.int32)},
        {"tokens": torch.zeros(2, 8, dtype=torch.int64)},
        {"tokens": torch.zeros(2, 7, dtype=torch.int32)},
        {"levels": torch.zeros(1, 8, dtype=torch.uint16)},
        {"tail": torch.zeros(3)},
        {"targets": torch.zeros(3, 2, dtype=torch.int32)},
        {"target_log_probs": torch.zeros(2, dtype=torch.float64)},
        {"more": torch.zeros(1)},
    ],
)
def test_damaged_items_are_named(kept: tuple[Path, list[tuple[int, int]]], changes: dict[str, torch.Tensor]) -> None:
    path, targets = kept
    replaced(path, **changes)
    with pytest.raises(DataError, match=r"small\.base: item 0: damaged"):
        BaseFile(path).read("0", targets, 50)


def test_files_that_are_no_base_are_named(kept: tuple[Path, list[tuple[int, int]]], tmp_path: Path) -> None:
    path, _ = kept
    content = path.read_bytes()
    for number, damaged in enumerate((b"", b"PK", content[: len(content) // 2], content[:-1])):
        file = tmp_path / f"{number}.base"
        file.write_bytes(damaged)
        with pytest.raises(DataError, match="is no base, or cut off"):
            BaseFile(file)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("base.json", '{"format": "halve base 1", "asked": {}, "model": {}}' + " " * 10**6)
    with pytest.raises(DataError, match="is no base"):
        BaseFile(path)


@pytest.mark.parametrize("seed", range(3))
def test_positions_of_an_item_do_not_depend_on_how_the_tree_is_cut(seed: int) -> None:
    rng = random.Random(seed)
    stem = [rng.randrange(9) for _ in range(rng.randint(3, 30))]
    options = [[rng.randrange(3) for _ in range(rng.randint(1, 5))] for _ in range(4)]
    sequences = [stem + option for option in options]
    tree = question_nodes([(sequences, [len(stem)] * 4, 0)])
    apart = [sequence_node(tokens, slot, len(stem)) for slot, tokens in enumerate(sequences)]
    expected = {tuple(s[:t]) for s in sequences for t in range(len(stem), len(s))}
    for roots in (tree, apart):
        layout = Layout.of(roots, ["q"] * 4)
        assert len(layout.places) == len(expected)
        assert sorted((token, slot) for _, token, slot in layout.targets) == sorted(
            (token, slot) for slot, option in enumerate(options) for token in option
        )


def test_a_run_that_was_cut_off_goes_on(
    tmp_path: Path, dense: Path, changed: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(text, changed, base=dense)
    calls = 0
    original = BaseComparison.run

    def stops(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        return original(*arguments)

    monkeypatch.setattr(BaseComparison, "run", stops)
    progress = tmp_path / "run.progress.jsonl"
    with pytest.raises(KeyboardInterrupt):
        run(text, changed, base=dense, batch_tokens=1, progress_file=progress)
    resumed = run(text, changed, base=dense, batch_tokens=1, progress_file=progress)
    assert calls == 7  # six documents, one of them twice
    assert {key: resumed[key] for key in KEYS} == pytest.approx({key: whole[key] for key in KEYS}, rel=1e-5)
    monkeypatch.setattr(BaseComparison, "run", original)


@pytest.mark.parametrize(("name", "window"), [("stories260K", 512), ("babyllama-tok361", 256)])
def test_real_models_by_a_float64_loop(tmp_path: Path, assets: Path, name: str, window: int) -> None:
    dense, out = assets / "models" / name, tmp_path / "pruned"
    stories = (assets / "data" / "tinystories_317.txt").read_text().split("<|endoftext|>")[:5]
    text = write_lines(tmp_path / "stories.jsonl", *({"text": story.strip()} for story in stories))
    halve.compress(dense, out, ["prune-mlp:fraction=0.25"], calibration=str(text), samples=4)
    record = run(text, out, base=dense)
    tokenizer = load_tokenizer(str(dense))
    expected = loop_over_text(dense, out, [tokenizer.encode(s.strip(), bos=True)[:window] for s in stories])
    assert {key: record[key] for key in KEYS} == pytest.approx(expected, abs=1e-6, rel=1e-5)


def test_the_interval_is_that_of_drawn_documents(tmp_path: Path, assets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bootstrap by document of real ones, 2,000 draws: its own error is 2 %, and it lacks t's and G/(G-1)'s widening."""
    dense = assets / "models" / "stories260K"
    stories = (assets / "data" / "tinystories_317.txt").read_text().split("<|endoftext|>")
    text = write_lines(tmp_path / "stories.jsonl", *({"text": s.strip()[:300]} for s in stories if s.strip()))
    halve.compress(dense, tmp_path / "out", ["rtn:bits=4,group_size=-1"])
    collected: list[Any] = []
    original = divergence.figures
    monkeypatch.setattr(divergence, "figures", lambda *given: collected.append(given[0]) or original(*given))
    record = run(text, tmp_path / "out", base=dense)
    sums = torch.tensor([[sum(row["kl"]), len(row["kl"])] for row in collected[0]], dtype=torch.float64)
    draws = torch.randint(len(sums), (2000, len(sums)), generator=torch.Generator().manual_seed(0))
    means = sums[draws].sum(1)
    low, high = torch.quantile(means[:, 0] / means[:, 1], torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    assert record["kl_nats_per_token_interval"] == pytest.approx([low, high], abs=0.1 * (high - low))
