"""halve: smaller, faster language models without retraining, and the truth about what that cost."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from halve._version import __version__

if TYPE_CHECKING:
    from halve.checkpoint.convert import convert
    from halve.checkpoint.export import export
    from halve.checkpoint.hub import fetch
    from halve.checkpoint.reader import load_model
    from halve.checkpoint.tokenizer import load_tokenizer
    from halve.compression.compress import compress
    from halve.compression.torch_layers import prune_linear, quantize_linear
    from halve.compression.windows import CalibrationOptions
    from halve.decode.generate import generate, generate_text
    from halve.errors import HalveError
    from halve.measure.quality.evaluate import evaluate
    from halve.measure.quality.options import EvaluationOptions
    from halve.measure.speed.benchmark import benchmark
    from halve.measure.table import compare
    from halve.report.card import write_card
    from halve.report.page import write_page
    from halve.studies.layers import analyse_layers
    from halve.studies.search.options import SearchOptions
    from halve.studies.search.search import search
    from halve.studies.system1.reproduce import reproduce_system1

# where each public name lives; imported on first use, so that `import halve` stays instant
_PUBLIC = {
    "CalibrationOptions": "compression.windows",
    "EvaluationOptions": "measure.quality.options",
    "HalveError": "errors",
    "SearchOptions": "studies.search.options",
    "analyse_layers": "studies.layers",
    "benchmark": "measure.speed.benchmark",
    "compare": "measure.table",
    "compress": "compression.compress",
    "convert": "checkpoint.convert",
    "evaluate": "measure.quality.evaluate",
    "export": "checkpoint.export",
    "fetch": "checkpoint.hub",
    "generate": "decode.generate",
    "generate_text": "decode.generate",
    "load_model": "checkpoint.reader",
    "load_tokenizer": "checkpoint.tokenizer",
    "prune_linear": "compression.torch_layers",
    "quantize_linear": "compression.torch_layers",
    "reproduce_system1": "studies.system1.reproduce",
    "search": "studies.search.search",
    "write_card": "report.card",
    "write_page": "report.page",
}
__all__ = [
    "CalibrationOptions",
    "EvaluationOptions",
    "HalveError",
    "SearchOptions",
    "__version__",
    "analyse_layers",
    "benchmark",
    "compare",
    "compress",
    "convert",
    "evaluate",
    "export",
    "fetch",
    "generate",
    "generate_text",
    "load_model",
    "load_tokenizer",
    "prune_linear",
    "quantize_linear",
    "reproduce_system1",
    "search",
    "write_card",
    "write_page",
]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'halve' has no attribute {name!r}")
    return getattr(import_module(f"halve.{_PUBLIC[name]}"), name)
