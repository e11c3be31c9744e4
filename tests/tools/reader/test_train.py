"""The training script on a tiny reader: it learns, resumes exactly, and exports what transformers reads."""

import json
import random
import shutil

import pytest
import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer

from tools.reader import exam, export, stories
from tools.reader.tokens import BOS, EOS
from tools.reader.train import (
    EARLY,
    LATE,
    UNMARKED_WEIGHT,
    WARM_UP,
    Phase,
    Reader,
    ReaderConfig,
    Run,
    TrainConfig,
    draw_pool,
    encode,
    learning_rate_factor,
    orthogonalize,
)

TINY = ReaderConfig(
    hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=16, intermediate_size=64
)
SHORT = TrainConfig(
    n_steps=24,
    rise_steps=4,
    muon_lr=0.05,
    adam_lr=0.02,
    decay_steps=8,
    tokens_per_step=400,
    eval_every=1000,
    checkpoint_every=8,
    curriculum=(
        Phase("warm-up", 8, 1, 0.0, WARM_UP),
        Phase("three", 16, 3, 0.5, EARLY),
        Phase("six", 24, 6, 1.0, LATE),
    ),
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    run = Run(tmp_path_factory.mktemp("run"), TINY, SHORT)
    run.until(SHORT.n_steps)
    return run


def mean_loss(run: Run) -> float:
    rows = [encode(stories.story_text(random.Random(i), 2, "dev"), run.ids)[0] for i in range(4)]
    with torch.no_grad():
        losses = [
            functional.cross_entropy(run.model(torch.tensor([row]))[0, :-1], torch.tensor(row[1:])) for row in rows
        ]
    return float(torch.stack(losses).mean())


def test_the_loss_falls_from_that_of_a_uniform_guess(trained, tmp_path):
    untrained = mean_loss(Run(tmp_path, TINY, SHORT))
    assert untrained == pytest.approx(6.64, abs=0.3)  # ln 768
    assert mean_loss(trained) < untrained - 0.5


def test_a_stopped_run_ends_with_the_same_weights(trained, tmp_path):
    Run(tmp_path, TINY, SHORT).until(11)
    resumed = Run(tmp_path, TINY, SHORT)
    assert resumed.step == 11
    resumed.until(SHORT.n_steps)
    for name, tensor in trained.model.state_dict().items():
        torch.testing.assert_close(resumed.model.state_dict()[name], tensor, rtol=0, atol=0)
    assert resumed.tokens_seen == trained.tokens_seen
    events = [json.loads(line)["event"] for line in (tmp_path / "train_log.jsonl").read_text().splitlines()]
    assert events.count("start") == 2


def test_a_checkpoint_of_another_shape_is_refused(trained):
    with pytest.raises(ValueError, match="another shape"):
        Run(trained.out, ReaderConfig(), SHORT)


def test_only_marked_words_have_full_weight():
    ids = {" a": 10, " b": 11}
    assert encode(" a ^b", ids) == ([BOS, 10, 11, EOS], [0.0, UNMARKED_WEIGHT, 1.0, UNMARKED_WEIGHT])


def test_the_curriculum_goes_from_warm_up_to_six_people(trained):
    names = set(stories.WORDS["name"])
    inverse = {i: token for token, i in trained.ids.items()}

    def most_names(pool: int) -> int:
        rows = [row.tolist() for ids, _ in draw_pool(SHORT, pool, trained.ids) for row in ids]
        words = [{inverse[i].strip() for i in row if i > EOS} for row in rows if trained.ids["."] in row]
        return max((len(names & w) for w in words), default=0)

    # pools of eight steps: 0 warm-up (no sentences), 1 up to three people, 2 up to six; options add three names
    assert most_names(0) == 0
    assert 1 <= most_names(1) <= 3 + 3
    assert most_names(2) >= 5


def test_training_goes_on_from_an_exported_folder(trained, tmp_path):
    folder = tmp_path / "exported"
    folder.mkdir()
    export.write_model(trained.model, folder)
    (folder / "measured.json").write_text(json.dumps({"steps": 6, "tokens": 1234}))
    shutil.copyfile(trained.log_path, folder / "train_log.jsonl")
    run = Run(tmp_path / "on", TINY, trained.train, weights=folder)
    assert (run.step, run.tokens_seen) == (6, 1234)
    for name, tensor in trained.model.state_dict().items():
        torch.testing.assert_close(run.model.state_dict()[name], tensor.to(torch.bfloat16).float(), rtol=0, atol=0)
    assert run.log_path.read_text().startswith(trained.log_path.read_text())  # one log tells the whole story
    run.until(8)
    assert Run(tmp_path / "on", TINY, trained.train, weights=folder).step == 8  # its own checkpoint goes first


def test_orthogonalize_brings_singular_values_near_one():
    matrices = torch.randn(3, 24, 48, generator=torch.Generator().manual_seed(0))
    for stack in (matrices, matrices.mT):
        values = torch.linalg.svdvals(orthogonalize(stack))
        assert values.min() > 0.6 and values.max() < 1.3  # the quintic's fixed band is about 0.7 to 1.2


def test_learning_rate_rises_stays_falls_and_follows_the_phase():
    phases = (Phase("a", 600, 1, 1.0, WARM_UP), Phase("b", 700, 1, 1.0, WARM_UP, rate=0.6))
    train = TrainConfig(n_steps=1000, decay_steps=200, curriculum=phases)
    factors = [learning_rate_factor(step, train) for step in (0, 99, 500, 600, 900, 999)]
    assert factors == pytest.approx([0.01, 1.0, 1.0, 0.6, 0.3, 0.012])


def test_a_decay_longer_than_the_run_is_refused():
    with pytest.raises(ValueError, match="decay_steps is 20"):
        TrainConfig(n_steps=10, decay_steps=20)


def test_transformers_computes_the_same_logits(trained, tmp_path):
    export.write_model(trained.model, tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    stored = Reader(TINY)
    stored.load_state_dict({n: t.to(torch.bfloat16).float() for n, t in trained.model.state_dict().items()})
    text = "It was a warm day. Anna went to the market."
    ids = AutoTokenizer.from_pretrained(tmp_path)(text, return_tensors="pt").input_ids
    assert ids[0].tolist() == [BOS, *trained.encode(text)]
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids).logits, stored(ids), rtol=1e-4, atol=1e-4)


class Copier(torch.nn.Module):
    """Logits that favour the token two positions back, whatever else is in the row."""

    def forward(self, ids_BT):
        previous = torch.roll(ids_BT, 1, dims=1)
        return functional.one_hot(previous, 768).float()


def test_log_likelihoods_of_rows_of_different_lengths():
    pairs = [([5, 6], [5]), ([5, 6], [7]), ([5, 6, 7], [6, 7, 6])]
    favoured, other = 1 - torch.log(torch.exp(torch.tensor(1.0)) + 767), -torch.log(torch.exp(torch.tensor(1.0)) + 767)
    expected = [favoured, other, 3 * favoured]
    assert exam.log_likelihoods(Copier(), pairs) == pytest.approx([float(e) for e in expected], abs=1e-4)


def test_examine_reports_every_protocol_by_people(trained):
    items = exam.dev_items(n_cloze=12, n_questions=12)
    accuracies = exam.examine(trained.model, items, trained.encode, BOS)
    assert set(accuracies) == {f"{kind}_{protocol}" for kind, ps in exam.PROTOCOLS.items() for protocol in ps}
    for row in accuracies.values():
        assert list(row) == ["all", "1", "2", "3", "4", "5", "6"]
        assert row["all"] == pytest.approx(sum(row[str(n)] for n in range(1, 7)) / 6, abs=1e-3)


def test_the_model_card_holds_the_measured_figures(trained):
    row = {"all": 0.5, **{str(n): n / 10 for n in range(1, 7)}}
    measured = {
        "steps": 24,
        "tokens": 9600,
        "parameters": 1234567,
        "items": {"cloze": 500, "question": 500},
        "accuracy": {"cloze_pmi": row},
        "accuracy_without_story": {"cloze_pmi": {"all": 0.251}},
        "held_out_stories": {"perplexity": 7.25, "tokens": 1000, "window": 512},
    }
    card = export.model_card(trained.model, measured)
    assert "1,234,567 parameters" in card
    assert "| cloze | pmi | 50.0 | 10.0 | 20.0 | 30.0 | 40.0 | 50.0 | 60.0 | 25.1 |" in card
    assert "7.25 (1,000 tokens, windows of 512)" in card
    assert "24 steps, 9,600 tokens" in card
