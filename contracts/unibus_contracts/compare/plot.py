"""Curves as SVG: a colour and a marker for each broker, a dash for each curve. Colours are the style sheet's."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any

WIDTH, HEIGHT = 460.0, 270.0
LEFT, RIGHT, TOP, BOTTOM = 66.0, 22.0, 12.0, 48.0
_DASHES = ("", "6 4", "2 3", "8 3 2 3")


class Scale:
    """From values to pixels; logarithmic where asked for and possible."""

    def __init__(self, values: Sequence[float], start: float, end: float, *, logarithmic: bool) -> None:
        self._log = logarithmic and min(values) > 0
        low, high = min(values), max(values)
        if self._log:
            low, high = math.floor(math.log10(low) + 1e-9), math.ceil(math.log10(high) - 1e-9)
            high += high == low
        else:
            low, high = min(0.0, low), high if high > max(0.0, low) else max(0.0, low) + 1.0
        self._low, self._high, self._start, self._end = float(low), float(high), start, end

    def __call__(self, value: float) -> float:
        at = math.log10(value) if self._log else value
        return self._start + (at - self._low) / (self._high - self._low) * (self._end - self._start)

    def ticks(self) -> list[float]:
        if self._log:
            powers = range(int(self._low), int(self._high) + 1)
            return [10.0**power for power in powers][:: max(1, len(powers) // 6)]
        step = 10.0 ** math.floor(math.log10((self._high - self._low) / 4))
        step *= next(m for m in (1, 2, 2.5, 5, 10) if (self._high - self._low) / (step * m) <= 5)
        first = math.ceil(self._low / step)
        return [n * step for n in range(first, int(self._high / step) + 1)]


def plot(row: Mapping[str, Any], names: Sequence[str]) -> str:
    """The row's curves; empty where it has none."""
    curves = [
        (column, number, name, curve)
        for column, cell in enumerate(row["cells"])
        for number, (name, curve) in enumerate(cell["points"].items())
        if curve
    ]
    if not curves or not row["axes"]:
        return ""
    xs = [x for *_, curve in curves for x, _ in curve]
    ys = [y for *_, curve in curves for _, y in curve]
    wide = min(xs) > 0 and max(xs) / min(xs) > 20
    x = Scale(xs, LEFT, WIDTH - RIGHT, logarithmic=wide)
    y = Scale(ys, HEIGHT - BOTTOM, TOP, logarithmic=row["logarithmic"])
    label = f"{row['title']}: {row['axes'][1]} against {row['axes'][0]}, for {', '.join(names)}"
    parts = [
        f'<svg class="plot" viewBox="0 0 {WIDTH:g} {HEIGHT:g}" role="img" aria-label="{escape(label, quote=True)}">',
        *_frame(x, y, row["axes"]),
        *(part for column, number, name, curve in curves for part in _curve(x, y, column, number, name, curve, names)),
        "</svg>",
        *_legend(curves, names),
    ]
    return "".join(parts)


def _frame(x: Scale, y: Scale, axes: Sequence[str]) -> Iterator[str]:
    for tick in y.ticks():
        at = y(tick)
        yield f'<path class="grid" d="M{LEFT:g} {at:.1f}H{WIDTH - RIGHT:g}"/>'
        yield f'<text class="tick" x="{LEFT - 6:g}" y="{at + 4:.1f}" text-anchor="end">{_short(tick)}</text>'
    for tick in x.ticks():
        at = x(tick)
        yield f'<path class="grid" d="M{at:.1f} {HEIGHT - BOTTOM:g}v4"/>'
        yield f'<text class="tick" x="{at:.1f}" y="{HEIGHT - BOTTOM + 17:g}" text-anchor="middle">{_short(tick)}</text>'
    yield f'<path class="axis" d="M{LEFT:g} {HEIGHT - BOTTOM:g}H{WIDTH - RIGHT:g}"/>'
    middle = (LEFT + WIDTH - RIGHT) / 2
    yield f'<text class="label" x="{middle:g}" y="{HEIGHT - 8:g}" text-anchor="middle">{escape(axes[0])}</text>'
    yield (
        f'<text class="label" transform="translate(16 {(TOP + HEIGHT - BOTTOM) / 2:g}) rotate(-90)" text-anchor="middle">'
        f"{escape(axes[1])}</text>"
    )


def _curve(
    x: Scale, y: Scale, column: int, number: int, name: str, curve: Sequence[Sequence[float]], names: Sequence[str]
) -> Iterator[str]:
    dash = f' stroke-dasharray="{_DASHES[number % 4]}"' if number % 4 else ""
    at = [(x(px), y(py)) for px, py in curve]
    yield f'<path class="line l{column % 8}"{dash} d="M{"L".join(f"{px:.1f} {py:.1f}" for px, py in at)}"/>'
    for (px, py), (vx, vy) in zip(at, curve, strict=True):
        said = escape(f"{names[column]}, {name}: {_short(vy)} at {_short(vx)}")
        yield f'<path class="dot f{column % 8}" d="{_marker(column, px, py)}"><title>{said}</title></path>'


def _marker(column: int, x: float, y: float) -> str:
    """Circle, square, triangle, diamond: colours alone don't tell."""
    return (
        f"M{x - 3:.1f} {y:.1f}a3 3 0 1 0 6 0a3 3 0 1 0-6 0z",
        f"M{x - 3:.1f} {y - 3:.1f}h6v6h-6z",
        f"M{x:.1f} {y - 4:.1f}l4 7h-8z",
        f"M{x:.1f} {y - 4:.1f}l4 4l-4 4l-4-4z",
    )[column % 4]


def _legend(curves: Sequence[tuple[int, int, str, Any]], names: Sequence[str]) -> Iterator[str]:
    yield '<ul class="key">'
    for column in dict.fromkeys(column for column, *_ in curves):
        mark = f'<svg viewBox="-6 -6 12 12" aria-hidden="true"><path class="f{column % 8}" d="{_marker(column, 0, 0)}"/></svg>'
        yield f"<li>{mark}{escape(names[column])}</li>"
    kinds = dict.fromkeys((number, name) for _, number, name, _ in curves)
    for number, name in kinds if len(kinds) > 1 else ():
        dash = f' stroke-dasharray="{_DASHES[number % 4]}"' if number % 4 else ""
        line = f'<svg class="wide" viewBox="0 0 28 8" aria-hidden="true"><path class="line" d="M0 4H28"{dash}/></svg>'
        yield f"<li>{line}{escape(name)}</li>"
    yield "</ul>"


def _short(number: float) -> str:
    for size, unit in ((1e6, "M"), (1e3, "k")):
        if abs(number) >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.3g}"
