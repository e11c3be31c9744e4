"""What configs say of a layer's attention: how far back it sees, and by which rotary embedding."""

from __future__ import annotations

from dataclasses import replace

from halve.model.fields import Fields, is_whole, read_growth, read_rope, read_ropes_of_kinds
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
    return kinds_or_one_window(f, layers)  # transformers takes it for a Ministral


def kinds_or_one_window(f: Fields, layers: int) -> Windows:
    """Ministral: one window for the layers that `layer_types` names, or else for all."""
    if f.raw.get("head_dim") is None:
        raise f.fail("head_dim", "has no default in transformers", "write hidden_size / num_attention_heads")
    window, kinds = f.window(), f.layer_kinds(layers)
    if window is None:
        raise f.fail("sliding_window", "is needed, also where no layer has one", "write 4096")
    return [window] * layers if kinds is None else _windows_of_kinds(f, kinds, window)


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


def windows_without_rope(f: Fields, layers: int) -> Windows:
    """SmolLM3: where windows are switched on, the layers that `layer_types` names, or else those without rotary embedding."""
    window = f.window() if f.flag("use_sliding_window", False) else None
    kinds = f.layer_kinds(layers)
    if kinds is None:
        return [None if turned else window for turned in rope_layers(f, layers)]
    return _windows_of_kinds(f, kinds, window)


def every_fourth(f: Fields, layers: int) -> Windows:
    """OLMo 3: the same, or else all but every fourth."""
    return _all_but_every(f, layers, 4)


def every_fourth_by_pattern(f: Fields, layers: int) -> Windows:
    """EXAONE 4: the same, or else all but every `sliding_window_pattern`-th; without a window `layer_types` has to say so."""
    kinds = f.layer_kinds(layers)
    if kinds is None and f.window() is None:
        raise f.fail("layer_types", "is needed where sliding_window is null", "write full_attention for each layer")
    return _all_but_every(f, layers, 0 if kinds else f.integer("sliding_window_pattern", 4))


PATTERNS = (
    every_second,
    every_fourth,
    every_fourth_by_pattern,
    every_sixth,
)  # rules that go by a layer's place where a config does not name the kinds


def _all_but_every(f: Fields, layers: int, period: int) -> Windows:
    kinds = f.layer_kinds(layers)
    if kinds is None:
        kinds = ["sliding_attention" if (i + 1) % period else "full_attention" for i in range(layers)]
    return _windows_of_kinds(f, kinds, f.window())


def _windows_of_kinds(f: Fields, kinds: list[str], window: int | None) -> Windows:
    if "sliding_attention" in kinds and window is None:
        reason = "sliding_window is null" if f.get("sliding_window", 4096) is None else "use_sliding_window is not true"
        raise f.fail("layer_types", f"names sliding_attention, but {reason}")
    return [window if kind == "sliding_attention" else None for kind in kinds]


Ropes = tuple[tuple[RopeConfig, ...], list[int | None]]


def one_rope(f: Fields, windows: Windows, max_positions: int) -> Ropes:
    """One rotary embedding for all layers."""
    return (read_rope(f, max_positions),), [0] * len(windows)


def part_rope(f: Fields, windows: Windows, max_positions: int) -> Ropes:
    """The same, of a part of each head where `partial_rotary_factor` says so."""
    return (read_rope(f, max_positions, partial=True),), [0] * len(windows)


def rope_of_neighbours(f: Fields, windows: Windows, max_positions: int) -> Ropes:
    """ERNIE 4.5: one, that turns neighbouring channels."""
    return (replace(read_rope(f, max_positions), neighbours=True),), [0] * len(windows)


def growing_rope(f: Fields, windows: Windows, max_positions: int) -> Ropes:
    """Ministral 3: one, with queries that grow with their position."""
    return (replace(read_rope(f, max_positions), growth=read_growth(f, max_positions)),), [0] * len(windows)


def rope_of_windows(f: Fields, windows: Windows, max_positions: int) -> Ropes:
    """EXAONE 4: one, for the layers that have a window where the config names one at all."""
    turned = [0 if window is not None or f.window() is None else None for window in windows]
    return (read_rope(f, max_positions),), turned


def no_rope(f: Fields, windows: Windows, max_positions: int) -> Ropes:
    """Learned positions."""
    return (), [None] * len(windows)


def rope_by_list(f: Fields, windows: Windows, max_positions: int) -> Ropes:
    """SmolLM3: one, for the layers that `no_rope_layers` marks with 1."""
    turned = rope_layers(f, len(windows))
    return (read_rope(f, max_positions),), [0 if layer else None for layer in turned]


def rope_layers(f: Fields, layers: int) -> list[int]:
    """`no_rope_layers`: 1 for a layer with rotary embedding, 0 for one without; null: 0 every `no_rope_layer_interval`."""
    interval, listed = f.integer("no_rope_layer_interval", 4), f.raw.get("no_rope_layers")
    if listed is None:
        return [int((i + 1) % interval != 0) for i in range(layers)]
    if not isinstance(listed, list) or len(listed) < layers or not all(is_whole(one, 0, 1) for one in listed):
        raise f.fail("no_rope_layers", f"must be null, or 0 or 1 for each of {layers} layers")
    return listed[:layers]


def rope_by_window(f: Fields, windows: Windows, max_positions: int) -> Ropes:
    """Gemma 3: one for layers with full attention, another for those with a window."""
    bases = (("rope_theta", 1e6), ("rope_local_base_freq", 10000.0))
    return read_ropes_of_kinds(f, max_positions, bases), [0 if window is None else 1 for window in windows]


def rope_by_window_alone(f: Fields, windows: Windows, max_positions: int) -> Ropes:
    """OLMo 3: the same, but that of layers with a window has its base from nowhere else than `rope_parameters`."""
    bases = (("rope_theta", 500000.0), ("", 500000.0))
    return read_ropes_of_kinds(f, max_positions, bases), [0 if window is None else 1 for window in windows]
