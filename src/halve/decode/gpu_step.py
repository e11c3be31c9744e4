"""One decode step on a GPU as a fixed sequence of fused kernels on fixed buffers, captured once and replayed per token.

What changes from token to token lies in memory on the device: the token, its position, how many were made. So a captured
step serves every length and nothing waits for the host. `gpu_launches` says which kernels they are.

Models are Llama-like (see `gpu_launches.unsupported`).

Shape legend: B prompts, D hidden size, V vocabulary.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable

import torch
from torch import Tensor

from halve.decode import gpu_launches
from halve.decode.sampling import TokenChooser
from halve.kernels import triton_backend
from halve.kernels.triton_backend import launch_options
from halve.model.cache import KVCache
from halve.model.decoder import Model

_CAPACITY_STEP = 256  # slots; a cache is made somewhat larger, so that the next prompt can use the same captured step


class GpuStep:
    """A captured step and the only user of it, until this object goes; see `engines.Engine`."""

    def __init__(self, model: Model, batch: int, capacity: int) -> None:
        self.captured = _captured_step(model, batch, capacity)
        self.captured.lend(self)

    @property
    def cache(self) -> KVCache:
        return self.captured.cache

    @property
    def kernel(self) -> str:
        return self.captured.kernel

    def step(self, tokens_B1: Tensor, choose: TokenChooser) -> Tensor:
        return self.captured.step(tokens_B1, choose)

    @classmethod
    def runs_on(cls, device: torch.device) -> bool:
        return triton_backend.runs_on(device)

    @classmethod
    def serves(cls, model: Model, batch: int) -> str | None:
        if triton_backend.missing():
            return triton_backend.missing()
        if batch > triton_backend.MAX_ROWS:
            return f"{batch} prompts at once, the fused kernels take {triton_backend.MAX_ROWS}"
        if model.ranks.size > 1:
            return "a model shared by ranks"
        return gpu_launches.unsupported(model)


def _captured_step(model: Model, batch: int, capacity: int) -> CapturedStep:
    """The step that the model captured last where it is large enough and nobody uses it, else a new one."""
    last = _LAST_STEPS.get(model)
    if last is not None:
        if last.batch == batch and last.cache.capacity >= capacity and last.free():
            return last
        del _LAST_STEPS[model], last  # its memory goes before the new one is made
    rounded = -(-capacity // _CAPACITY_STEP) * _CAPACITY_STEP
    most = max(capacity, min(model.config.max_positions, rounded))
    step = _LAST_STEPS[model] = CapturedStep(model, batch, most)
    return step


# of every model that is alive
_LAST_STEPS: weakref.WeakKeyDictionary[Model, CapturedStep] = weakref.WeakKeyDictionary()


class CapturedStep:
    """The buffers and launches of one model, batch size and capacity. See the module's docstring."""

    def __init__(self, model: Model, batch: int, capacity: int) -> None:
        self.batch = batch
        self.kernel = "fused kernels"
        self.device = model.device
        self._user: Callable[[], GpuStep | None] = lambda: None
        self._graphs: dict[bool, torch.cuda.CUDAGraph | None] = {}
        with torch.inference_mode(False):  # these outlive the inference mode they are made in
            self.cache: KVCache = model.new_cache(batch, capacity)
            self.token = torch.zeros(batch, dtype=torch.int64, device=self.device)
            self.position = torch.zeros(batch, dtype=torch.int32, device=self.device)
            self.turn = torch.zeros(batch, dtype=torch.int32, device=self.device)
            self.history = torch.zeros(batch, capacity, dtype=torch.int64, device=self.device)
            self._launches = gpu_launches.StepLaunches(model, self.cache, self.token, self.position)
        self.logits = self._launches.logits
        self._made = 0  # columns of the history filled since `begin`
        self._last: Tensor | None = None

    def free(self) -> bool:
        """Whether nobody uses this step."""
        return self._user() is None

    def lend(self, user: GpuStep) -> None:
        """Begin anew for a user, who has the step as long as that object lives."""
        self._user = weakref.ref(user)
        self.cache.lengths = 0
        self._last = None

    def step(self, tokens_B1: Tensor, choose: TokenChooser) -> Tensor:
        """Feed tokens int64 [B, 1], return the next ones.

        What greedy steps return stays as it is until another decoder takes over this step.
        """
        if self._last is None:
            self._begin()
        if tokens_B1 is not self._last:
            self.token.copy_(tokens_B1[:, 0])
        self._replay(choose.sampling.greedy)
        if choose.sampling.greedy:
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
            self.kernel = f"fused kernels, launched one by one (no CUDA graph: {str(error).splitlines()[0]})"
            return None
        self.kernel = "fused kernels in a CUDA graph"
        return graph

    def _run(self, greedy: bool) -> None:
        with triton_backend.current(self.device):
            for launch in self._launches.launches:
                launch()
            if greedy:
                self._choose()

    def _choose(self) -> None:
        kernels = triton_backend.load_kernels("triton_attention")
        made = self._launches
        if not made.whole_head:
            torch.amax(self.logits.float(), 1, keepdim=True, out=made.best[:, :1])
            made.best_row[:, :1] = self.logits.argmax(1, keepdim=True)
        kernels.choose[(self.batch,)](
            made.best, made.best_row, self.token, self.history, self.position, self.turn, made.best.shape[1],
            self.history.stride(0), self.cache.capacity - 1, self.logits.shape[1] - 1,
            BLOCK=2048 if self.device.type == "cuda" else 64, **launch_options(8),
        )  # fmt: skip
