"""What the first system published, and how it got there: the only place where these figures stand."""

from __future__ import annotations

from dataclasses import dataclass

MODEL = "meta-llama/Llama-3.2-3B"
MACHINE = "one GH200 (H100)"
FLOOR = 0.5  # the accuracy it asks for
QUESTIONS = "first 100 questions of RACE-H"
QUANTIZER = {"group_size": 128, "symmetric": True, "act_order": False, "damping": 0.1, "scale": "minmax"}  # of its GPTQ
SAMPLES = 128  # windows of C4 it calibrates on


@dataclass(frozen=True)
class PublishedModel:
    """A row of its first table. bits None: bf16; pruned: the share of input channels removed; accuracy on RACE-H."""

    bits: int | None
    pruned: float
    latency_ms: float
    tokens_per_s: float
    peak_memory_bytes: float
    accuracy: float


@dataclass(frozen=True)
class PublishedFraction:
    """A cell of its second table: the largest share of inputs or outputs pruned with the accuracy above the floor."""

    bits: int | None
    side: str
    largest: float  # 0: the least it tried, SMALLEST, fell below the floor


SMALLEST = 0.001
MODELS = (
    PublishedModel(4, 0.0, 25.95, 43.2, 2.40e9, 0.626),
    PublishedModel(4, 0.10, 25.93, 43.1, 3.10e9, 0.533),
    PublishedModel(8, 0.0, 25.94, 43.2, 3.82e9, 0.620),
    PublishedModel(8, 0.35, 25.95, 43.5, 4.33e9, 0.528),
    PublishedModel(None, 0.0, 30.78, 38.1, 6.56e9, 0.690),
)
FRACTIONS = (
    PublishedFraction(8, "inputs", 0.35),
    PublishedFraction(8, "outputs", 0.01),
    PublishedFraction(4, "inputs", 0.10),
    PublishedFraction(4, "outputs", 0.01),
    PublishedFraction(None, "inputs", 0.0),
    PublishedFraction(None, "outputs", 0.0),
)
