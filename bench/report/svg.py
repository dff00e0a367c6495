"""Small charts as inline SVG: lines, steps, points, bars. Colours come from the page's style sheet."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

import msgspec

WIDTH, HEIGHT = 620, 230
LEFT, RIGHT, TOP, BOTTOM = 58, 12, 26, 34
MAX_POINTS = 700
COLOURS = 6


class Series(msgspec.Struct):
    """One line or cloud of a chart."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    kind: str = "line"  # line | step | points | crosses
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None


class Axis(msgspec.Struct):
    """A linear scale from data to pixels."""

    start: float
    end: float
    pixel_start: float
    pixel_end: float

    def at(self, value: float) -> float:
        """Where a value lies."""
        share = (value - self.start) / (self.end - self.start)
        return round(self.pixel_start + share * (self.pixel_end - self.pixel_start), 1)


def chart(
    title: str,
    series: list[Series],
    x_label: str,
    y_label: str,
    x_range: tuple[float, float] | None = None,
    shaded: list[tuple[float, float]] | None = None,
    y_end: float | None = None,
) -> str:
    """A chart of one or more series over common axes; `shaded` stretches of x are set apart."""
    series = [part for part in map(_finite, series) if len(part.x)]
    if not series:
        return ""
    xs = [value for part in series for value in (min(part.x), max(part.x))]
    ys = [value for part in series for value in (*part.y, *(part.high or ())) if math.isfinite(value)]
    low, high = x_range or (min(xs), max(xs))
    x_axis = Axis(low, high if high > low else low + 1, LEFT, WIDTH - RIGHT)
    y_axis = Axis(0.0, y_end or (max(ys, default=1.0) * 1.05 or 1.0), HEIGHT - BOTTOM, TOP)
    body = [_shade(x_axis, a, b) for a, b in shaded or []]
    body += [_grid(x_axis, y_axis, x_label, y_label)]
    body += [_draw(part, number % COLOURS, x_axis, y_axis) for number, part in enumerate(series)]
    body.append(f'<text class="title" x="{LEFT}" y="14">{escape(title)}</text>')
    if len(series) > 1:
        body.append(_legend(series))
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">{"".join(body)}</svg>'


def cdf(title: str, named: dict[str, Sequence[float]], x_label: str) -> str:
    """Cumulative distributions; an axis that ends at the 99.9th percentile keeps one outlier from flattening all."""
    series, ends = [], []
    for name, values in named.items():
        ordered = sorted(values)
        if not ordered:
            continue
        picked = _thin(list(range(len(ordered))))
        series.append(Series(name, [ordered[i] for i in picked], [(i + 1) / len(ordered) for i in picked], "step"))
        finite = [value for value in ordered if math.isfinite(value)]
        ends.append(finite[min(len(finite) - 1, int(len(finite) * 0.999))] if finite else 1.0)
    if not series:
        return ""
    return chart(title, series, x_label, "share of requests", (0.0, max(ends) * 1.02 or 1.0), y_end=1.0)


def _finite(part: Series) -> Series:
    """The series without the points that cannot be drawn."""
    kept = [i for i in range(len(part.x)) if math.isfinite(part.x[i]) and math.isfinite(part.y[i])]
    low, high = ([column[i] for i in kept] if column is not None else None for column in (part.low, part.high))
    return Series(part.name, [part.x[i] for i in kept], [part.y[i] for i in kept], part.kind, low, high)


def _thin(items: list[int]) -> list[int]:
    step = max(1, math.ceil(len(items) / MAX_POINTS))
    return items[::step] if len(items) % step == 1 or step == 1 else [*items[::step], items[-1]]


def _draw(part: Series, colour: int, x_axis: Axis, y_axis: Axis) -> str:
    picked = _thin(list(range(len(part.x))))
    points = [(x_axis.at(min(part.x[i], x_axis.end)), y_axis.at(min(part.y[i], y_axis.end))) for i in picked]
    if part.kind == "points":
        return "".join(f'<circle class="f{colour}" cx="{x}" cy="{y}" r="1.8"/>' for x, y in points)
    if part.kind == "crosses":
        return "".join(f'<path class="bad" d="M{x - 3} {y - 3}l6 6m0 -6l-6 6"/>' for x, y in points)
    path = f"M{points[0][0]} {points[0][1]}" if points else ""
    for x, y in points[1:]:
        path += f"H{x}V{y}" if part.kind == "step" else f"L{x} {y}"
    bars = ""
    if part.low is not None and part.high is not None:
        bars = "".join(
            f'<path class="s{colour}" d="M{x_axis.at(part.x[i])} {y_axis.at(part.low[i])}'
            f'V{y_axis.at(min(part.high[i], y_axis.end))}"/>'
            for i in picked
            if math.isfinite(part.low[i]) and math.isfinite(part.high[i])
        )
    dots = "".join(f'<circle class="f{colour}" cx="{x}" cy="{y}" r="2.5"/>' for x, y in points) if bars else ""
    return f'<path class="s{colour}" d="{path}"/>{bars}{dots}'


def _grid(x_axis: Axis, y_axis: Axis, x_label: str, y_label: str) -> str:
    lines = []
    for value in ticks(y_axis.start, y_axis.end):
        y = y_axis.at(value)
        lines.append(f'<path class="grid" d="M{LEFT} {y}H{WIDTH - RIGHT}"/>')
        lines.append(f'<text class="tick" x="{LEFT - 6}" y="{y + 3}" text-anchor="end">{_short(value)}</text>')
    for value in ticks(x_axis.start, x_axis.end):
        x = x_axis.at(value)
        lines.append(
            f'<text class="tick" x="{x}" y="{HEIGHT - BOTTOM + 14}" text-anchor="middle">{_short(value)}</text>'
        )
    lines.append(f'<path class="axis" d="M{LEFT} {TOP}V{HEIGHT - BOTTOM}H{WIDTH - RIGHT}"/>')
    lines.append(f'<text class="tick" x="{WIDTH - RIGHT}" y="{HEIGHT - 4}" text-anchor="end">{escape(x_label)}</text>')
    lines.append(f'<text class="tick" x="{WIDTH - RIGHT}" y="14" text-anchor="end">{escape(y_label)}</text>')
    return "".join(lines)


def _shade(x_axis: Axis, start: float, end: float) -> str:
    x, x_end = x_axis.at(max(start, x_axis.start)), x_axis.at(min(end, x_axis.end))
    return f'<rect class="shade" x="{x}" y="{TOP}" width="{max(0.0, x_end - x):.1f}" height="{HEIGHT - TOP - BOTTOM}"/>'


def _legend(series: list[Series]) -> str:
    parts, x = [], float(LEFT)
    for number, part in enumerate(series):
        kind = "bad" if part.kind == "crosses" else f"s{number % COLOURS}"
        parts.append(f'<path class="{kind}" d="M{x} {HEIGHT - 8}h14"/>')
        parts.append(f'<text class="tick" x="{x + 18}" y="{HEIGHT - 4}">{escape(part.name)}</text>')
        x += 30 + 6.2 * len(part.name)
    return "".join(parts)


def ticks(start: float, end: float, wanted: int = 5) -> list[float]:
    """Round values that divide a range."""
    span = end - start
    step = 10 ** math.floor(math.log10(span / wanted))
    step = next(step * factor for factor in (1, 2, 5, 10) if span / (step * factor) <= wanted)
    first = math.ceil(start / step) * step
    return [first + number * step for number in range(int((end - first) / step + 1e-9) + 1)]


def _short(value: float) -> str:
    for limit, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= limit:
            return f"{value / limit:g}{suffix}"
    return f"{value:.6g}"
