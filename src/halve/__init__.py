"""halve: smaller, faster language models without retraining, and the truth about what that cost."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from halve.checkpoint import load_model
    from halve.compress import compress
    from halve.errors import HalveError
    from halve.tokenizer import load_tokenizer

# where each public name lives; imported on first use, so that `import halve` stays instant
_PUBLIC = {
    "HalveError": "halve.errors",
    "compress": "halve.compress",
    "load_model": "halve.checkpoint",
    "load_tokenizer": "halve.tokenizer",
}
__all__ = ["HalveError", "__version__", "compress", "load_model", "load_tokenizer"]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'halve' has no attribute {name!r}")
    return getattr(import_module(_PUBLIC[name]), name)
