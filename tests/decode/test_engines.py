"""Which engine runs a model's steps, and what is said about those that do not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from halve.checkpoint.reader import load_model
from halve.decode import engines
from halve.decode.engines import ENGINES, Engine
from halve.decode.generate import Decoder, generate
from halve.decode.sampling import Sampling
from halve.decode.torch_step import TorchStep
from halve.model.decoder import Model


class Toy(TorchStep):
    """Serves models of one prompt, slowly."""

    kernel = "toy"

    @classmethod
    def serves(cls, model: Model, batch: int) -> str | None:
        return None if batch == 1 else "one prompt at a time"


class Elsewhere(Toy):
    @classmethod
    def runs_on(cls, device: torch.device) -> bool:
        return False


@pytest.fixture
def model(make_hf: Callable[..., Path]) -> Model:
    return load_model(make_hf("llama"), backend="reference")


def use(monkeypatch: pytest.MonkeyPatch, chosen: dict[str, type[Engine]]) -> None:
    monkeypatch.setattr(engines, "ENGINES", chosen)


def test_the_first_that_serves_runs(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = generate(model, [[5, 9, 3]], max_new_tokens=4)
    use(monkeypatch, {"elsewhere": Elsewhere, "toy": Toy, "torch": TorchStep})
    decoder = Decoder(model, [[5, 9, 3]], 8, Sampling())
    assert isinstance(decoder.engine, Toy) and decoder.kernel == "toy" and decoder.passed_over == {}
    assert generate(model, [[5, 9, 3]], max_new_tokens=4) == expected


def test_reasons_are_kept_and_named_unless_the_engine_is_for_another_device(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, {"elsewhere": Elsewhere, "toy": Toy, "other": Toy, "torch": TorchStep})
    decoder = Decoder(model, [[5], [9]], 8, Sampling())
    assert type(decoder.engine) is TorchStep
    assert decoder.passed_over == {"toy": "one prompt at a time", "other": "one prompt at a time"}
    assert decoder.kernel == "torch (one prompt at a time; one prompt at a time)"


def test_the_last_serves_every_model_on_every_device(model: Model) -> None:
    last = list(ENGINES.values())[-1]
    assert last.runs_on(torch.device("meta")) and last.serves(model, 10_000) is None
