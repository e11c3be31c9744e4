"""One decode step on a GPU as a fixed sequence of fused kernels on fixed buffers, captured once and replayed per token.

What changes from token to token lies in memory on the device: the token, its position, how many were made. So a captured
step serves every length and nothing waits for the host. `cuda_plan` says which kernels they are.

`acquire` gives a Decoder such a step, or None with the reason in `describe`. Models are Llama-like (see `_unsupported`).

Shape legend: B prompts, D hidden size, V vocabulary.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable

import torch
from torch import Tensor

from halve.decode import gpu_launches as cuda_plan
from halve.kernels import triton_backend
from halve.kernels.triton_backend import launch_options
from halve.model.decoder import KVCache, Model

MAX_BATCH = triton_backend.MAX_ROWS
_CAPACITY_STEP = 256  # slots; a cache is made somewhat larger, so that the next prompt can use the same captured step


def acquire(model: Model, batch: int, capacity: int) -> CapturedStep | None:
    """The step that decodes `batch` rows of up to `capacity` tokens, or None where the model's own forward has to.

    A model keeps its last step; it is used again when it is large enough and no other decoder holds it.
    """
    reason = _unsupported(model, batch)
    if reason is not None:
        _STEPS[model] = reason
        return None
    held = _STEPS.get(model)
    if isinstance(held, CapturedStep):
        if held.batch == batch and held.cache.capacity >= capacity and held.free():
            return held
        del _STEPS[model], held  # its memory goes before the new one is made
    most = max(capacity, min(model.config.max_positions, -(-capacity // _CAPACITY_STEP) * _CAPACITY_STEP))
    step = _STEPS[model] = CapturedStep(model, batch, most)
    return step


def describe(model: Model) -> str:
    """How this model's last decoder made its steps: a name, or the reason for the ordinary forward."""
    held = _STEPS.get(model)
    if isinstance(held, CapturedStep):
        return held.kind
    return "module by module" if held is None else f"module by module ({held})"


def _unsupported(model: Model, batch: int) -> str | None:
    """Why the fused step cannot run this model, None when it can."""
    if model.device.type != "cuda" and not triton_backend.ON_CPU:
        return f"the model is on {model.device}"
    if triton_backend.missing():
        return triton_backend.missing()
    if batch > MAX_BATCH:
        return f"{batch} prompts at once, the fused kernels take {MAX_BATCH}"
    return cuda_plan.unsupported(model)


# the last step of every model that is alive, or why it has none
_STEPS: weakref.WeakKeyDictionary[Model, CapturedStep | str] = weakref.WeakKeyDictionary()


class CapturedStep:
    """The buffers and launches of one model, batch size and capacity. See the module's docstring."""

    def __init__(self, model: Model, batch: int, capacity: int) -> None:
        self.batch, self.kind = batch, "fused kernels"
        self.device = model.device
        self._owner: Callable[[], object | None] = lambda: None
        self._graphs: dict[bool, torch.cuda.CUDAGraph | None] = {}
        with torch.inference_mode(False):  # these outlive the inference mode they are made in
            self.cache: KVCache = model.new_cache(batch, capacity)
            self.token = torch.zeros(batch, dtype=torch.int64, device=self.device)
            self.position = torch.zeros(batch, dtype=torch.int32, device=self.device)
            self.turn = torch.zeros(batch, dtype=torch.int32, device=self.device)
            self.history = torch.zeros(batch, capacity, dtype=torch.int64, device=self.device)
            self._plan = cuda_plan.Plan(model, self.cache, self.token, self.position)
        self.logits = self._plan.logits
        self._made = 0  # columns of the history filled since `begin`
        self._last: Tensor | None = None

    def free(self) -> bool:
        """Whether no decoder uses this step."""
        return self._owner() is None

    def hold(self, owner: object) -> None:
        """Belong to `owner` as long as it lives."""
        self._owner = weakref.ref(owner)
        self.cache.lengths = 0
        self._last = None

    def step(self, tokens_B1: Tensor, choose: Callable[[Tensor], Tensor] | None) -> Tensor:
        """Feed tokens int64 [B, 1], return the next ones: by `choose` from logits [B, V], or greedily (None).

        What greedy steps return stays as it is until another decoder takes over this step.
        """
        if self._last is None:
            self._begin()
        if tokens_B1 is not self._last:
            self.token.copy_(tokens_B1[:, 0])
        self._replay(choose is None)
        if choose is None:
            chosen = self.history[:, self._made : self._made + 1]
        else:
            chosen = choose(self.logits)
            self.token.copy_(chosen[:, 0])
            self.position.add_(1).clamp_(max=self.cache.capacity - 1)
        self._made += 1
        lengths = self.cache.lengths
        self.cache.lengths = lengths + 1 if isinstance(lengths, int) else self.position.long()
        self._last = chosen
        return chosen

    def _begin(self) -> None:
        """Take over from a prefill that filled the cache."""
        lengths = self.cache.lengths
        if isinstance(lengths, int):
            self.position.fill_(lengths)
        else:
            self.position.copy_(lengths)
        # only a row that will not be asked again can stand at the end: its last slot is then rewritten
        self.position.clamp_(max=self.cache.capacity - 1)
        self.turn.zero_()
        self._made = 0

    def _replay(self, greedy: bool) -> None:
        if self.device.type != "cuda":
            self._run(greedy)
            return
        if greedy not in self._graphs:
            self._graphs[greedy] = self._capture(greedy)
        graph = self._graphs[greedy]
        if graph is None:
            self._run(greedy)
        else:
            graph.replay()

    def _capture(self, greedy: bool) -> torch.cuda.CUDAGraph | None:
        """Record the step, None where that cannot be; the state that compiling its kernels changes is put back."""
        state = (self.token, self.position, self.turn, self.history)
        saved = [t.clone() for t in state]
        current, aside = torch.cuda.current_stream(self.device), torch.cuda.Stream(self.device)
        aside.wait_stream(current)
        with torch.cuda.stream(aside):
            self._run(greedy)  # compiles; what it stores at this position is stored again by the replay
        current.wait_stream(aside)
        for tensor, before in zip(state, saved, strict=True):
            tensor.copy_(before)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=aside, capture_error_mode="thread_local"):
                self._run(greedy)
        except RuntimeError as error:
            torch.cuda.set_stream(current)  # a failed capture leaves its own stream behind
            self.kind = f"fused kernels, launched one by one (no CUDA graph: {str(error).splitlines()[0]})"
            return None
        self.kind = "fused kernels in a CUDA graph"
        return graph

    def _run(self, greedy: bool) -> None:
        with triton_backend.current(self.device):
            for launch in self._plan.launches:
                launch()
            if greedy:
                self._choose()

    def _choose(self) -> None:
        kernels, plan = triton_backend.load_kernels("triton_attention"), self._plan
        if not plan.whole_head:
            torch.amax(self.logits.float(), 1, keepdim=True, out=plan.best[:, :1])
            plan.best_row[:, :1] = self.logits.argmax(1, keepdim=True)
        kernels.choose[(self.batch,)](
            plan.best, plan.best_row, self.token, self.history, self.position, self.turn, plan.best.shape[1],
            self.history.stride(0), self.cache.capacity - 1, self.logits.shape[1] - 1,
            BLOCK=2048 if self.device.type == "cuda" else 64, **launch_options(8),
        )  # fmt: skip
