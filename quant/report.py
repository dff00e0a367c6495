"""The report of a job as one HTML file without references: what was done, and the error of every linear by layer."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 900, 340, 64, 12, 16, 40
_COLOURS = ("#4269d0", "#d97706", "#ff725c", "#2a9d8f", "#3ca951", "#c2185b", "#a463f2", "#6b7280")
_EXPERT = re.compile(r"\.experts\.\d+\.")
_STYLE = """
:root { color-scheme: light dark; } body { font: 15px/1.5 system-ui, sans-serif; max-width: 940px; margin: 2em auto; }
table { border-collapse: collapse; } td, th { text-align: left; padding: .15em 1em .15em 0; vertical-align: top; }
svg { width: 100%; height: auto; }
svg text { font-size: 12px; fill: currentColor; } svg .grid { stroke: currentColor; opacity: .18; }
.key { display: inline-block; width: .8em; height: .8em; margin-right: .4em; }
"""


def render(report: Mapping[str, Any], name: str) -> str:
    """The page of a job's report (`quant_report.json`). `name`: of the model, for the heading."""
    options, linears = report["options"], list(_linears(report))
    grid = options["grid"]
    facts = {
        "method, format": f"{options['method']}, {options['format']}",
        "grid": f"{grid['bits']} bits, groups of {grid['group_size']}, "
        + ("symmetric" if grid["symmetric"] else "zero points"),
        "linears": f"{len(linears)} quantized, {len(report['skipped'])} matrices left alone",
        "calibration": f"{report['calibration_tokens']:,} tokens",
        "time": f"{report['elapsed_s']:.0f} s on {report['device']}",
        "peak of host memory": f"{report['peak_host_bytes'] / 1e9:.1f} GB",
        "peak of device memory": f"{report['peak_device_bytes'] / 1e9:.1f} GB",
        "versions": ", ".join(f"{tool} {version}" for tool, version in report["versions"].items()),
    }
    worst = sorted(linears, key=lambda row: -row[2])[:10]
    noted = [(linear, note) for _, linear, _, note in linears if note]
    parts = [
        f"<!doctype html><meta charset=utf-8><title>{escape(name)}, quantized</title><style>{_STYLE}</style>",
        f"<h1>{escape(name)}, quantized</h1>",
        _table((), facts.items()),
        "<h2>Error by layer</h2><p>Expected squared error of a linear's output, relative to the expected squared "
        "output, on the calibration inputs. Experts of one kind are shown by their worst.</p>",
        chart(_by_kind(linears)),
        "<h2>Largest errors</h2>",
        _table(("linear", "error"), [(linear, f"{error:.3%}") for _, linear, error, _ in worst]),
        "<h2>Left alone</h2>",
        _table(("matrix", "reason"), sorted(report["skipped"].items())),
    ]
    if noted:
        parts += ["<h2>Notes</h2>", _table(("linear", "note"), noted)]
    return "\n".join(parts) + "\n"


def chart(kinds: Mapping[str, Mapping[int, float]]) -> str:
    """An SVG of errors by layer, a line for each kind of linear, with its key below."""
    layers = sorted({layer for errors in kinds.values() for layer in errors})
    top = max((error for errors in kinds.values() for error in errors.values()), default=0.0) * 1.05
    if not layers or top <= 0:
        return "<p>No linear has an error.</p>"

    def x(layer: int) -> float:
        return _LEFT + (layer - layers[0]) / max(layers[-1] - layers[0], 1) * (_WIDTH - _LEFT - _RIGHT)

    def y(error: float) -> float:
        return _HEIGHT - _BOTTOM - error / top * (_HEIGHT - _TOP - _BOTTOM)

    body = []
    for step in range(5):
        level = top * step / 4
        body.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y(level):.1f}" y2="{y(level):.1f}"/>')
        body.append(f'<text x="{_LEFT - 8}" y="{y(level) + 4:.1f}" text-anchor="end">{level:.2%}</text>')
    for layer in layers[:: max(1, len(layers) // 16)]:
        body.append(f'<text x="{x(layer):.1f}" y="{_HEIGHT - _BOTTOM + 18}" text-anchor="middle">{layer}</text>')
    body.append(f'<text x="{(_LEFT + _WIDTH) / 2}" y="{_HEIGHT - 4}" text-anchor="middle">layer</text>')
    key = []
    for number, (kind, errors) in enumerate(kinds.items()):
        colour = _COLOURS[number % len(_COLOURS)]
        points = " ".join(f"{x(layer):.1f},{y(error):.1f}" for layer, error in sorted(errors.items()))
        body.append(f'<polyline fill="none" stroke="{colour}" stroke-width="1.5" points="{points}"/>')
        body += [
            f'<circle cx="{x(layer):.1f}" cy="{y(error):.1f}" r="2.5" fill="{colour}">'
            f"<title>layer {layer}, {escape(kind)}: {error:.3%}</title></circle>"
            for layer, error in errors.items()
        ]
        key.append(f'<span><span class="key" style="background:{colour}"></span>{escape(kind)}</span> ')
    drawing = f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="error by layer">{"".join(body)}</svg>'
    return f"{drawing}<p>{''.join(key)}</p>"


def _linears(report: Mapping[str, Any]) -> Iterable[tuple[int, str, float, str]]:
    """(layer, name with its layer, error, note) of every quantized linear."""
    for layer in report["layers"]:
        for linear in layer["linears"]:
            yield layer["layer"], f"{layer['layer']}.{linear['name']}", linear["error"], linear["note"]


def _by_kind(linears: Iterable[tuple[int, str, float, str]]) -> dict[str, dict[int, float]]:
    """Kind of linear -> layer -> its error, the worst where a layer has several of a kind."""
    kinds: dict[str, dict[int, float]] = {}
    for layer, name, error, _ in linears:
        kind = _EXPERT.sub(".experts.", f".{name.partition('.')[2]}").removeprefix(".")
        errors = kinds.setdefault(kind, {})
        errors[layer] = max(error, errors.get(layer, 0.0))
    return kinds


def _table(heads: Sequence[str], rows: Iterable[tuple[str, str]]) -> str:
    head = "".join(f"<th>{escape(text)}</th>" for text in heads)
    body = "".join(f"<tr><td>{escape(a)}</td><td>{escape(b)}</td></tr>" for a, b in rows)
    return f"<table>{f'<tr>{head}</tr>' if heads else ''}{body}</table>"
