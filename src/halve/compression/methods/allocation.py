"""How many channels each layer keeps: a share rounded to what kernels take, or one total distributed over the layers."""

from __future__ import annotations

import heapq

from torch import Tensor

from halve.errors import RecipeError

TOLERANCE = 0.05  # of the width: rounding may change the share asked for by this much
SMALLEST_SHARE = 0.2  # of its width that a layer keeps, however little its score says it matters


def rounded_width(step: str, size: int, fraction: float, multiple: int, unit: str) -> int:
    """Channels of `size` that stay when `fraction` goes, as a multiple of `multiple`; all of them for 0.

    Raises RecipeError naming what fits when no multiple is within TOLERANCE of the share asked for.
    """
    if fraction == 0:
        return size
    kept = _nearest(size, fraction, multiple)
    if kept is not None:
        return kept
    exact = size * (1 - fraction)
    smaller = next((m for m in _halvings(multiple) if _nearest(size, fraction, m) is not None), None)
    if smaller is not None:
        remedy = f"use multiple_of={smaller} (keeps {_nearest(size, fraction, smaller)})"
    else:
        fitting = list(range(multiple, size, multiple)) or list(range(1, size))
        nearest = sorted(sorted(fitting, key=lambda n: abs(n - exact))[:3], reverse=True)
        shares = ", ".join(f"{1 - n / size:.4g}" for n in nearest)
        remedy = f"use a fraction that fits ({shares}, ...)" if nearest else "leave this step out"
    raise RecipeError(
        f"step {step}: fraction={fraction} of {size} {unit}s leaves {exact:g}, and no multiple of {multiple} "
        f"is near that and below {size}: {remedy}"
    )


def _nearest(size: int, fraction: float, multiple: int) -> int | None:
    exact = size * (1 - fraction)
    kept = int(exact / multiple + 0.5) * multiple
    near = abs(kept - exact) <= max(TOLERANCE * size, 0.5)
    return kept if 0 < kept < size and near else None


def _halvings(multiple: int) -> list[int]:
    halvings = []
    while multiple > 1:
        multiple //= 2
        halvings.append(multiple)
    return halvings


def parse_widths(step: str, widths: tuple[str, ...]) -> list[int]:
    """The numbers of a `widths` option. Raises RecipeError for what is no number."""
    for text in widths:
        if not text.isdecimal():
            raise RecipeError(f"step {step}: widths holds {text!r}: give one whole number per layer, separated by |")
    return [int(text) for text in widths]


def allocate(sizes: list[int], losses: list[Tensor], total: int, multiple: int) -> list[int]:
    """Widths, multiples of `multiple` adding up to about `total`, that together lose least.

    `losses[i]` float [R]: loss of layer i once 1, 2, ... of its `sizes[i]` channels are gone, in one unit for all
    layers. Greedy: the cheapest next step of all layers, until the total is reached; a layer keeps SMALLEST_SHARE.
    """
    kept = list(sizes)
    queue: list[tuple[float, int, int]] = []

    def offer(layer: int) -> None:
        size = sizes[layer]
        now = kept[layer]
        lower = (now - 1) // multiple * multiple
        if lower < max(multiple, SMALLEST_SHARE * size) or size - lower > len(losses[layer]):
            return
        before = float(losses[layer][size - now - 1]) if now < size else 0.0
        after = float(losses[layer][size - lower - 1])
        heapq.heappush(queue, ((after - before) / (now - lower), layer, lower))

    for layer, size in enumerate(sizes):
        if size:
            offer(layer)
    while queue and sum(kept) > total:
        _, layer, lower = heapq.heappop(queue)
        kept[layer] = lower
        offer(layer)
    return kept
