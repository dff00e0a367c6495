"""The figures of a run as a Markdown table, as JSON and as a plot."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from html import escape
from pathlib import Path
from statistics import median

from tests.proofs.rivals.load import Mode

_MARK = "<!-- make bench-gateway -->"
RUST = ("vllm-router", "sglang-router", "smg")
_BAR_PX, _ROW_PX, _LABEL_PX, _WIDTH_PX = 13, 16, 170, 900
_COLOURS = {"nginx": "#9aa0a6", "tunegate": "#1a73e8", "tunegate, 2 relays": "#669df6", "litellm": "#b06000"}


@dataclass(frozen=True)
class Run:
    """One target under one mode, once."""

    user_us: float  # of CPU a request
    system_us: float
    per_s: float
    p50_ms: float
    p99_ms: float
    requests: int
    errors: int
    bad: int

    @property
    def cpu_us(self) -> float:
        return self.user_us + self.system_us

    def __str__(self) -> str:
        return (
            f"{self.cpu_us:9.1f} us ({self.user_us:.1f} user) {self.per_s:8.0f}/s p50 {self.p50_ms:.2f} "
            f"p99 {self.p99_ms:.2f} ms errors {self.errors} bad {self.bad}"
        )


@dataclass(frozen=True)
class Latency:
    """What a target adds to the engine's own latency, at half of its throughput."""

    target: str
    mode: str
    per_s: int
    p50_ms: float
    p99_ms: float


@dataclass(frozen=True)
class Figures:
    """Everything one run measured."""

    machine: str
    date: str
    versions: dict[str, str]
    absent: dict[str, str]
    runs: dict[tuple[str, str], list[Run]]
    memory_bytes: dict[str, int]
    latencies: list[Latency]

    def served(self, target: str, mode: str) -> list[Run]:
        """A run for each round; none where the target does not serve such requests."""
        runs = self.runs.get((target, mode), [])
        return runs if all(run.per_s and 2 * run.bad < run.requests for run in runs) else []

    def each_cpu_us(self, target: str, mode: str) -> list[float]:
        """CPU a request in each round, in their order."""
        return [run.cpu_us for run in self.served(target, mode)]

    def cpu_us(self, target: str, mode: str) -> list[float]:
        """CPU a request in each round, least first."""
        return sorted(self.each_cpu_us(target, mode))

    def plain(self) -> dict[str, object]:
        """For JSON."""
        runs = [
            {"target": target, "mode": mode, "runs": [asdict(run) for run in runs]}
            for (target, mode), runs in self.runs.items()
        ]
        return asdict(self) | {"runs": runs}


def table(figures: Figures, modes: Sequence[Mode]) -> str:
    """Markdown: CPU by target and mode, ratios, throughput, memory, added latency."""
    names = list(figures.versions)
    head = "".join(f" {name} |" for name in names)
    rule = "---|" * (len(names) + 1)
    lines = [f"{figures.date}; {figures.machine}.", ""]
    lines += [", ".join(f"{name} {version}" for name, version in figures.versions.items()) + ".", ""]
    lines += [f"| us of CPU a request, median (least-most) |{head}", f"|{rule}"]
    for mode in modes:
        lines.append(f"| {mode.title} |" + "".join(f" {_spread(figures.cpu_us(name, mode.name))} |" for name in names))
    lines += [
        "",
        "| ours over the best Rust router, median of the rounds (least-most) | CPU | throughput, 2 relays |",
        "|---|---|---|",
    ]
    for mode in modes:
        lines.append(f"| {mode.title} | {_ratio(figures, mode)} | {_throughput_ratio(figures, mode)} |")
    lines += ["", f"| requests a second, median |{head}", f"|{rule}"]
    for mode in modes:
        lines.append(f"| {mode.title} |" + "".join(f" {_per_s(figures, name, mode):,.0f} |" for name in names))
    lines += ["", f"| wrong answers, of all |{head}", f"|{rule}"]
    wrong = (_wrong(figures, name) for name in names)
    lines.append("| all modes |" + "".join(f" {text} |" for text in wrong))
    memory = "".join(f" {figures.memory_bytes[name] / 1e6:.0f} |" for name in names)
    lines += ["", f"| memory afterwards, MB |{head}", f"|{rule}", f"| RSS of all its processes |{memory}"]
    if figures.latencies:
        lines += ["", "| added latency at half load | mode | requests/s | p50 ms | p99 ms |", "|---|---|---|---|---|"]
        lines += [
            f"| {one.target} | {one.mode} | {one.per_s:,} | {one.p50_ms:.2f} | {one.p99_ms:.2f} |"
            for one in figures.latencies
        ]
    lines += [f"\nNot measured: {name}: {why}" for name, why in figures.absent.items()]
    return "\n".join(lines) + "\n"


def put_into(page: Path, text: str) -> None:
    """Put a table in its place on a page; the rest of the page is written by hand."""
    around = page.read_text().split(_MARK) if page.exists() else ["", "", ""]
    if len(around) != 3:
        raise ValueError(f"{page} must have two lines `{_MARK}`, between which the table stands")
    page.write_text(f"{around[0]}{_MARK}\n{text}{_MARK}{around[2]}")


def plot(figures: Figures, modes: Sequence[Mode]) -> str:
    """An SVG of CPU a request: a group of bars a mode, each scaled to its slowest but LiteLLM, which is cut off."""
    names = list(figures.versions)
    height = 40 + len(modes) * ((len(names) + 1) * _ROW_PX + 12)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH_PX}" height="{height}" font-family="sans-serif" '
        f'font-size="11"><rect width="100%" height="100%" fill="white"/>'
        f'<text x="8" y="20" font-size="14">CPU a request, us (median; less is better). {escape(figures.date)}</text>'
    ]
    y = 40
    for mode in modes:
        parts.append(f'<text x="8" y="{y + 11}" font-weight="bold">{escape(mode.title)}</text>')
        y += _ROW_PX
        values = {name: median(us) for name in names if (us := figures.cpu_us(name, mode.name))}
        most = max((value for name, value in values.items() if name != "litellm"), default=1.0)
        for name, value in values.items():
            width = min(1.0, value / most) * (_WIDTH_PX - _LABEL_PX - 110)
            cut = " (cut off)" if value > most else ""
            parts.append(
                f'<text x="{_LABEL_PX - 6}" y="{y + 11}" text-anchor="end">{escape(name)}</text>'
                f'<rect x="{_LABEL_PX}" y="{y + 1}" width="{width:.1f}" height="{_BAR_PX}" '
                f'fill="{_COLOURS.get(name, "#d2a679")}"/>'
                f'<text x="{_LABEL_PX + width + 5:.1f}" y="{y + 11}">{value:,.0f}{cut}</text>'
            )
            y += _ROW_PX
        y += 12
    return "\n".join([*parts, "</svg>"]) + "\n"


def _spread(values: list[float]) -> str:
    if not values:
        return "-"
    return f"{median(values):,.0f} ({values[0]:,.0f}-{values[-1]:,.0f})"


def _ratio(figures: Figures, mode: Mode) -> str:
    """Our CPU over the router's against which we do worst: median, least and most of the rounds' own ratios.

    Rounds are compared each with itself, since the machine's own speed may differ twofold between two of them.
    """
    against = [
        sorted(ours / theirs for ours, theirs in zip(mine, other, strict=True))
        for name in RUST
        if (mine := figures.each_cpu_us("tunegate", mode.name)) and (other := figures.each_cpu_us(name, mode.name))
    ]
    if not against:
        return "-"
    worst = max(against, key=median)
    return f"{median(worst):.2f} ({worst[0]:.2f}-{worst[-1]:.2f})"


def _throughput_ratio(figures: Figures, mode: Mode) -> str:
    """Our throughput over the best router's, likewise."""
    ours = _each_per_s(figures, "tunegate, 2 relays", mode)
    against = [
        sorted(mine / other for mine, other in zip(ours, theirs, strict=True))
        for name in RUST
        if ours and (theirs := _each_per_s(figures, name, mode))
    ]
    return f"{median(min(against, key=median)):.2f}" if against else "-"


def _each_per_s(figures: Figures, target: str, mode: Mode) -> list[float]:
    return [run.per_s for run in figures.served(target, mode.name)]


def _per_s(figures: Figures, target: str, mode: Mode) -> float:
    runs = _each_per_s(figures, target, mode)
    return median(runs) if runs else 0.0


def _wrong(figures: Figures, target: str) -> str:
    runs = [run for (name, _), runs in figures.runs.items() if name == target for run in runs]
    return f"{sum(run.bad for run in runs)} of {sum(run.requests for run in runs):,}"
