"""What configs say of a layer's attention: how far back it sees, and by which rotary embedding."""

from __future__ import annotations

from halve.model.fields import Fields, read_rope, read_ropes_of_kinds
from halve.model.rotary import RopeConfig

Windows = list[int | None]


def no_windows(f: Fields, layers: int) -> Windows:
    """Full attention in every layer, of architectures that know no windows."""
    return [None] * layers


def one_window(f: Fields, layers: int) -> Windows:
    """Mistral: one window for all layers, or for those that `layer_types` names."""
    window = f.window()
    if "layer_types" not in f.raw:
        return [window] * layers
    if f.raw.get("head_dim") is None:  # transformers takes it for a Ministral, which has no default
        raise f.fail("head_dim", "is needed beside layer_types", "write hidden_size / num_attention_heads")
    return _windows_of_kinds(
        f, f.layer_kinds(layers) or ["sliding_attention" if window else "full_attention"] * layers, window
    )


def windows_by_layer(f: Fields, layers: int) -> Windows:
    """Qwen: where windows are switched on, the layers that `layer_types` names, or else those from `max_window_layers`."""
    window = f.window() if f.flag("use_sliding_window", False) else None
    first = f.integer("max_window_layers", 28, least=0)
    kinds = f.layer_kinds(layers)
    if kinds is None:
        return [window if i >= first else None for i in range(layers)]
    return _windows_of_kinds(f, kinds, window)


def every_second(f: Fields, layers: int) -> Windows:
    """Gemma 2: the layers that `layer_types` names, or else all but every second."""
    return _all_but_every(f, layers, 2)


def every_sixth(f: Fields, layers: int) -> Windows:
    """Gemma 3: the same, or else all but every `sliding_window_pattern`-th."""
    return _all_but_every(f, layers, f.integer("sliding_window_pattern", 6))


PATTERNS = (every_second, every_sixth)  # rules that go by a layer's place where a config does not name the kinds


def _all_but_every(f: Fields, layers: int, period: int) -> Windows:
    kinds = f.layer_kinds(layers)
    if kinds is None:
        kinds = ["sliding_attention" if (i + 1) % period else "full_attention" for i in range(layers)]
    return _windows_of_kinds(f, kinds, f.window())


def _windows_of_kinds(f: Fields, kinds: list[str], window: int | None) -> Windows:
    if "sliding_attention" in kinds and window is None:
        null = "sliding_window" in f.raw and f.raw["sliding_window"] is None
        reason = "sliding_window is null" if null else "use_sliding_window is not true"
        raise f.fail("layer_types", f"names sliding_attention, but {reason}")
    return [window if kind == "sliding_attention" else None for kind in kinds]


Ropes = tuple[tuple[RopeConfig, ...], list[int | None]]


def one_rope(f: Fields, windows: Windows, max_positions: int) -> Ropes:
    """One rotary embedding for all layers."""
    return (read_rope(f, max_positions),), [0] * len(windows)


def no_rope(f: Fields, windows: Windows, max_positions: int) -> Ropes:
    """Learned positions."""
    return (), [None] * len(windows)


def rope_by_window(f: Fields, windows: Windows, max_positions: int) -> Ropes:
    """Gemma 3: one for layers with full attention, another for those with a window."""
    return read_ropes_of_kinds(f, max_positions), [0 if window is None else 1 for window in windows]
