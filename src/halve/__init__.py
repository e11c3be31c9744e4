"""halve: smaller, faster language models without retraining, and the truth about what that cost."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from halve.benchmarking import benchmark
    from halve.checkpoint import load_model
    from halve.comparison import compare
    from halve.compression import compress
    from halve.conversion import convert
    from halve.dropin import quantize_linear
    from halve.dropin_prune import prune_linear
    from halve.errors import HalveError
    from halve.evaluation import evaluate
    from halve.generation import generate, generate_text
    from halve.hub import fetch
    from halve.layer_analysis import analyse_layers
    from halve.page import write_page
    from halve.reproduction import reproduce_system1
    from halve.searching import search
    from halve.tokenizer import load_tokenizer

# where each public name lives; imported on first use, so that `import halve` stays instant
_PUBLIC = {
    "HalveError": "errors",
    "analyse_layers": "layer_analysis",
    "benchmark": "benchmarking",
    "compare": "comparison",
    "compress": "compression",
    "convert": "conversion",
    "evaluate": "evaluation",
    "fetch": "hub",
    "generate": "generation",
    "generate_text": "generation",
    "load_model": "checkpoint",
    "load_tokenizer": "tokenizer",
    "prune_linear": "dropin_prune",
    "quantize_linear": "dropin",
    "reproduce_system1": "reproduction",
    "search": "searching",
    "write_page": "page",
}
__all__ = [
    "HalveError",
    "__version__",
    "analyse_layers",
    "benchmark",
    "compare",
    "compress",
    "convert",
    "evaluate",
    "fetch",
    "generate",
    "generate_text",
    "load_model",
    "load_tokenizer",
    "prune_linear",
    "quantize_linear",
    "reproduce_system1",
    "search",
    "write_page",
]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'halve' has no attribute {name!r}")
    return getattr(import_module(f"halve.{_PUBLIC[name]}"), name)
