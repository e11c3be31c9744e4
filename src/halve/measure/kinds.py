"""What each kind of record holds: a TypedDict per kind, which `read_record` holds every file against.

NotRequired is what not every run has; what records of earlier versions lack besides is in LATER.
"""

from __future__ import annotations

from typing import Annotated, Any, NotRequired, TypedDict

Share = Annotated[float, (0, 1)]
Amount = Annotated[float, (0, 1e18)]
Count = Annotated[int, (0, 2**63)]
Change = Annotated[float, (-1e18, 1e18)]
Interval = tuple[Share, Share]
Bounds = tuple[float | None, float | None]


class Machine(TypedDict, total=False):
    """Where it ran, as far as the system tells (`describe_machine`)."""

    cpu: str | None
    cores: int
    threads: int
    ram_bytes: Count | None
    system: str
    gpu: str | None


class Step(TypedDict):
    """A step of a recipe: its name, and its options beside it."""

    step: str


class Circumstances(TypedDict):
    """On what, with what and how a figure was obtained: the keys of every record."""

    kind: str
    model: str
    command: str
    recipe: list[Step | str]
    date: str
    halve_version: str
    torch_version: str
    versions: dict[str, str]
    commit: str | None
    machine: Machine
    not_finite: NotRequired[dict[str, str]]


class BaseModel(TypedDict):
    """What a model was compared with. `kept`: tokens of a file of predictions, None for whole distributions."""

    model: str
    fingerprint: str
    dtype: str
    recipe: list[Step | str]
    kept: int | None


class EvaluationRecord(Circumstances):
    """One task asked of one model; docs/evaluation.md explains the figures. What a task does not measure is None."""

    model_sha256: NotRequired[str]
    device: str
    dtype: str
    bos_ids: NotRequired[list[int]]
    weight_bytes: NotRequired[Count]
    disk_bytes: NotRequired[Count]
    task: str
    protocol: str
    data: str
    data_sha256: str
    limit: int | None
    not_measured: dict[str, str]
    # questions
    template: NotRequired[str | None]
    accuracy: Share | None
    accuracy_ci95: Interval | None
    questions: Count | None
    articles: NotRequired[Count]
    answered: Count | None
    correct: NotRequired[int]
    chance: NotRequired[Share | None]
    overflow: NotRequired[int]
    cut: NotRequired[int]  # articles, or documents
    log_likelihood: NotRequired[dict[str, Any]]
    sampling: NotRequired[dict[str, Any]]
    by_kind: NotRequired[dict[str, Any]]
    answers: NotRequired[dict[str, str]]
    # text
    perplexity: float | None
    nll_nats_per_token: float | None
    bits_per_byte: NotRequired[float | None]
    tokens: Count | None
    window: NotRequired[int]
    windows: NotRequired[int]
    documents: NotRequired[int]
    # against a base
    base: NotRequired[BaseModel]
    positions: NotRequired[Count]
    kl_nats_per_token: NotRequired[float | None]
    kl_nats_per_token_interval: NotRequired[Bounds | None]
    kl_nats_percentiles: NotRequired[dict[str, float | None]]
    same_top_share: NotRequired[Share]
    same_top_share_interval: NotRequired[Interval | None]
    expected_acceptance: NotRequired[Share]
    right_token_probability_change: NotRequired[dict[str, Any]]
    kl_gap_of_kept_tokens: NotRequired[dict[str, Any] | None]
    base_nll_nats_per_token: NotRequired[float | None]
    base_perplexity: NotRequired[float | None]
    perplexity_ratio: NotRequired[float | None]
    perplexity_ratio_interval: NotRequired[Bounds | None]
    perplexity_difference: NotRequired[float | None]
    perplexity_difference_interval: NotRequired[Bounds | None]
    base_accuracy: NotRequired[Share]
    agreement: NotRequired[Share]
    right_to_wrong: NotRequired[Count]
    wrong_to_right: NotRequired[Count]
    accuracy_difference: NotRequired[float]
    accuracy_difference_interval: NotRequired[Bounds]
    accuracy_difference_p_value: NotRequired[Share]


class SideBySide(TypedDict):
    """The models whose runs took turns, and how fast this one decodes as a multiple of the first."""

    models: list[str]
    decode_speed_to_first: Amount


class System1Times(TypedDict):
    """What the study `system1` has timed besides; no other key of a study is read."""

    latency_ms: Amount | None
    tokens_per_s: Change | None  # by a difference of two times, which noise can turn


class LongPrompt(TypedDict):
    """The figures of a benchmark with its long prompt, and the peak memory with that prompt included."""

    prompt_tokens: int
    ttft_ms: Amount
    decode_ms_median: Amount
    peak_memory_bytes: NotRequired[Count]


class BenchmarkRecord(Circumstances):
    """Speed and memory of one model; docs/benchmark.md explains the figures."""

    model_sha256: NotRequired[str]
    device: str
    device_name: str
    dtype: str
    backend: str
    kernels: dict[str, int]
    decode_kernel: str
    random_weights: bool
    batch: int
    seed: int
    runs: int
    prompt_tokens: int
    new_tokens: int
    long_prompt_tokens: int
    ttft_ms: Amount
    ttft_ms_p10: Amount
    ttft_ms_p90: Amount
    prefill_tokens_per_s: Amount
    decode_ms_median: Amount
    decode_ms_p10: Amount
    decode_ms_p90: Amount
    decode_tokens_per_s: Amount
    floor_ms: Amount
    floor_share: Amount
    bandwidth_gb_per_s: Amount
    bandwidth_kind: str
    bandwidths_beside_gb_per_s: list[Amount]
    floor_beside_share_p10: NotRequired[Amount]
    floor_beside_share: NotRequired[Amount]
    floor_beside_share_p90: NotRequired[Amount]
    peak_memory_prompt_tokens: int
    long_prompt: LongPrompt | None
    weight_bytes: Count
    step_weight_bytes: Count
    peak_memory_bytes: Count | None
    peak_memory_loading_bytes: NotRequired[Count]
    peak_memory_running_bytes: NotRequired[Count]
    peak_memory_reserved_bytes: NotRequired[Count]
    peak_memory_above_baseline_bytes: NotRequired[Count]
    loaded_memory_bytes: NotRequired[Count]
    baseline_memory_bytes: NotRequired[Count]
    side_by_side: NotRequired[SideBySide]
    system1: NotRequired[System1Times | None]
    profile: NotRequired[dict[str, Any]]
    notes: list[str]
    not_measured: dict[str, str]


# the figures of quality that a search keeps within a limit or makes the best of, and their keys in its trials
QUALITIES = {"accuracy": "accuracy", "kl": "kl_nats_per_token", "same-top": "same_top_share"}


class Quality(TypedDict):
    """How good a model of a search is: by questions, or on a text against the dense model."""

    accuracy: NotRequired[Share]
    accuracy_ci95: NotRequired[Interval | None]
    kl_nats_per_token: NotRequired[Amount]
    kl_nats_per_token_interval: NotRequired[Bounds | None]
    same_top_share: NotRequired[Share]
    same_top_share_interval: NotRequired[Interval | None]


class HeldOutQuality(TypedDict):
    """The same on what no trial has seen."""

    held_out_accuracy: NotRequired[Share | None]
    held_out_accuracy_ci95: NotRequired[Interval | None]
    held_out_kl_nats_per_token: NotRequired[Amount]
    held_out_kl_nats_per_token_interval: NotRequired[Bounds | None]
    held_out_same_top_share: NotRequired[Share]
    held_out_same_top_share_interval: NotRequired[Interval | None]


class Trial(Quality):
    """A model that a search has measured."""

    parameters: dict[str, Change]
    objective: Amount
    bytes: Count
    feasible: bool
    records: NotRequired[list[str]]


class Winner(Trial, HeldOutQuality):
    """The trial that a search has chosen, examined again on what no trial has seen."""

    checkpoint: NotRequired[str]
    held_out_difference_to_dense: NotRequired[Change | None]
    held_out_difference_p_value: NotRequired[Share | None]
    bytes_share: NotRequired[Amount | None]
    confirmed: NotRequired[bool]


class DenseModel(Quality, HeldOutQuality):
    """The model that a search began with."""

    objective: Amount
    bytes: Count
    records: NotRequired[list[str]]


class VariedOption(TypedDict):
    """An option that a search varied, and within what."""

    name: str
    low: Change
    high: Change


class FloorRecord(Quality, HeldOutQuality):
    """What a search had to keep, a figure of quality, the worse end of its interval, or bytes; an accuracy where no figure
    is named."""

    figure: NotRequired[str]
    bytes: NotRequired[Amount]
    lower_bound: NotRequired[bool]


class AskedRecord(TypedDict):
    """The questions or the text of one part of a search."""

    name: str
    questions: NotRequired[Count]
    documents: NotRequired[Count]
    windows: NotRequired[Count]


class SearchRecord(Circumstances):
    """All trials of one search; docs/search.md explains the figures."""

    varied: list[VariedOption]
    floor: FloorRecord
    objective: str
    task: str
    protocol: str
    template: str | None
    search_data: AskedRecord | None
    held_out_data: AskedRecord | None
    kept_tokens: NotRequired[Count | None]
    dense: DenseModel
    trials: list[Trial]
    winner: Winner | None
    pareto: list[Trial]
    notes: list[str]


class ReproducedFigures(TypedDict):
    """A model of a published table, measured here in one of two ways."""

    latency_ms: Amount | None
    tokens_per_s: Change | None
    peak_memory_bytes: Amount | None
    weight_bytes: Amount | None
    accuracy: NotRequired[Share | None]
    accuracy_ci95: NotRequired[Interval | None]
    answered: NotRequired[Count | None]
    questions: NotRequired[Count | None]


class PublishedFigures(TypedDict, total=False):
    """What was published of a model."""

    latency_ms: Amount | None
    tokens_per_s: Change | None
    peak_memory_bytes: Amount | None
    accuracy: Share | None


class ReproducedModel(TypedDict):
    """A row of the published table of models."""

    bits: int | None
    pruned: Share
    published: PublishedFigures
    own: ReproducedFigures
    right: ReproducedFigures


class TriedFraction(TypedDict):
    """An accuracy after so much was pruned."""

    fraction: Share
    accuracy: Share | None


class LargestFraction(TypedDict):
    """The largest fraction above the floor, None where the model is below it unpruned, and all that were tried."""

    largest: Share | None
    tried: list[TriedFraction]


class ReproducedFraction(TypedDict):
    """A cell of the published table of fractions."""

    bits: int | None
    side: str
    largest: Share | None
    own: LargestFraction
    right: LargestFraction


class PublishedCircumstances(TypedDict):
    """On what the published figures were measured."""

    model: str
    machine: str
    questions: str


class ExamRecord(TypedDict):
    """What models were asked in one of the two ways."""

    protocol: str
    data: str | None
    limit: int | None


class ReproductionRecord(Circumstances):
    """A published study made again; docs/reproduce.md explains the figures."""

    random_weights: bool
    floor: Share
    device_name: str
    published: PublishedCircumstances
    exams: dict[str, ExamRecord]
    models: list[ReproducedModel]
    fractions: list[ReproducedFraction]
    notes: list[str]


KINDS: dict[str, type] = {
    "evaluation": EvaluationRecord,
    "benchmark": BenchmarkRecord,
    "search": SearchRecord,
    "reproduction": ReproductionRecord,
}
# what records have only since a later version than the first, by kind
LATER = {
    "evaluation": frozenset({"device"}),
    "benchmark": frozenset(
        "backend kernels decode_kernel seed long_prompt_tokens ttft_ms_p10 ttft_ms_p90 long_prompt peak_memory_bytes "
        "bandwidth_kind notes not_measured bandwidths_beside_gb_per_s peak_memory_prompt_tokens".split()
    ),
}
