"""Calibration without text."""

from __future__ import annotations

import pytest
import torch

from halve.compression import compress as compression
from halve.compression.windows import Calibration


@pytest.fixture
def drawn_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Random tokens in place of text: for tests to which it does not matter what is calibrated on."""
    windows = torch.randint(0, 97, (5, 32), generator=torch.Generator().manual_seed(1))
    drawn = Calibration(windows[:4], windows[4:], {"windows": 4, "windows_asked": 4})
    monkeypatch.setattr(compression, "read_documents", lambda _: ["drawn"])
    monkeypatch.setattr(compression, "_windows", lambda *_: drawn)
