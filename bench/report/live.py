"""The live view of a run in a terminal."""

from __future__ import annotations

import time
from collections import deque

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from bench.load.watch import Watch
from bench.load.worker import Tick
from bench.measure.record import Segment

_RECENT_S = 5.0


class LiveView:
    """Shows rate, requests in flight, TTFT, tokens/s, failures and time left. Use as a context manager."""

    def __init__(self, console: Console, total_s: float) -> None:
        self._live = Live(console=console, refresh_per_second=4, transient=True)
        self._total_s = max(total_s, 1e-9)
        self._began_s = time.monotonic()
        self._segment: Segment | None = None
        self._newest: dict[int, Tick] = {}
        self._recent: deque[tuple[float, float, float]] = deque()  # time, tokens, requests done
        self._ttft_ms: deque[float] = deque(maxlen=500)

    def __enter__(self) -> LiveView:
        self._live.__enter__()
        return self

    def __exit__(self, *exc: object) -> None:
        self._live.__exit__(None, None, None)

    def segment(self, segment: Segment) -> None:
        """A segment begins."""
        self._segment = segment
        self._newest.clear()
        self._recent.clear()
        self._ttft_ms.clear()

    def ticks(self, ticks: list[Tick], watch: Watch) -> None:
        """Workers reported."""
        for tick in ticks:
            self._newest[tick.worker] = tick
            self._ttft_ms.extend(tick.ttft_ms)
        now_s = time.monotonic()
        newest = self._newest.values()
        self._recent.append((now_s, sum(t.tokens for t in newest), float(sum(t.done for t in newest))))
        while len(self._recent) > 2 and now_s - self._recent[0][0] > _RECENT_S:
            self._recent.popleft()
        self._live.update(self._draw(now_s, watch))

    def _draw(self, now_s: float, watch: Watch) -> Group:
        newest = list(self._newest.values())
        (began_s, tokens, done), (last_s, last_tokens, last_done) = self._recent[0], self._recent[-1]
        span_s = max(1e-9, last_s - began_s)
        table = Table.grid(padding=(0, 3))
        for _ in range(6):
            table.add_column()
        ttft = sorted(self._ttft_ms)
        failures: dict[str, int] = {}
        for tick in newest:
            for cause, count in tick.failures.items():
                failures[cause] = failures.get(cause, 0) + count
        table.add_row(
            _cell("requests/s", f"{(last_done - done) / span_s:.1f}"),
            _cell("in flight", f"{sum(tick.in_flight for tick in newest)}"),
            _cell("tokens/s", f"{(last_tokens - tokens) / span_s:,.0f}"),
            _cell("TTFT p50", f"{ttft[len(ttft) // 2]:.0f} ms" if ttft else "-"),
            _cell("TTFT p99", f"{ttft[len(ttft) * 99 // 100]:.0f} ms" if ttft else "-"),
            _cell("failed", ", ".join(f"{n} {c}" for c, n in failures.items()) or "0", "red" if failures else ""),
        )
        parts: list[Table | Text | ProgressBar] = [self._title(now_s), table]
        for name, values in watch.latest.items():
            shown = "  ".join(f"{key} {value:.3g}" for key, value in values.items() if key in _SHOWN)
            parts.append(Text(f"{name}: {shown}", style="dim"))
        parts.append(ProgressBar(total=self._total_s, completed=min(self._total_s, now_s - self._began_s)))
        return Group(*parts)

    def _title(self, now_s: float) -> Text:
        segment = self._segment
        assert segment is not None
        load = f"{segment.rate_per_s:g}/s" if segment.rate_per_s else f"{segment.concurrency or 'trace'} users"
        left_s = max(0.0, self._total_s - (now_s - self._began_s))
        place = segment.label if segment.repeat < 0 else f"{segment.label}, repeat {segment.repeat + 1}"
        return Text(f"{segment.target}  {place}  {load}  about {left_s:.0f} s left", style="bold")


_SHOWN = ("running", "waiting", "kv_usage")


def _cell(name: str, value: str, style: str = "") -> Text:
    return Text.assemble((f"{name} ", "dim"), (value, style or "bold"))


class Silent:
    """An observer that shows nothing."""

    def segment(self, segment: Segment) -> None:
        """Nothing to show."""

    def ticks(self, ticks: list[Tick], watch: Watch) -> None:
        """Nothing to show."""
