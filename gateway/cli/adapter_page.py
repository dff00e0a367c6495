"""One adapter on the terminal: replicas, versions, canary, history."""

from __future__ import annotations

import time
from typing import Any

from rich.console import Console
from rich.table import Table


def show(adapter: dict[str, Any], console: Console | None = None) -> None:
    """Print the answer of `GET /v1/adapters/NAME`."""
    console = console or Console(highlight=False)
    console.print(_heading(adapter))
    console.print(_replicas(adapter["replicas"]))
    if adapter["canary"] is not None:
        console.print(f"\ncanary: {_canary(adapter['canary'])}")
        figures = adapter["canary"]["figures"]
        if figures is not None:
            console.print(_arms(figures))
    if adapter["history"]:
        console.print()
        console.print(_history(adapter["history"]))


def _heading(adapter: dict[str, Any]) -> str:
    versions = ", ".join(f"v{version}" for version in adapter["versions"])
    current, coming = adapter["current_version"], adapter["coming"]
    points = f"v{current}" if current is not None else "no version yet"
    points += f", v{coming} is coming" if coming is not None else ""
    lines = [
        f"{adapter['id']}: {adapter['state']}{_because(adapter['reason'])}",
        f"{adapter['name']} points to {points}; it has {versions}",
        f"rank {adapter['rank']} on {', '.join(adapter['target_modules'])}; {adapter['bytes'] / 1e6:.1f} MB, "
        f"sha256 {adapter['sha256'][:12]}",
    ]
    if adapter["aliases"]:
        named = (f"{alias} ({f'v{n}' if n is not None else 'current'})" for alias, n in adapter["aliases"].items())
        lines.append(f"also called {', '.join(named)}")
    return "\n".join(lines)


def _replicas(replicas: list[dict[str, Any]]) -> Table:
    table = Table("replica", "state", "reason", box=None)
    for replica in replicas:
        table.add_row(replica["id"], replica["state"], replica["reason"] or "")
    return table


def _canary(canary: dict[str, Any]) -> str:
    by = f" by {canary['started_by']}" if canary["started_by"] else ""
    mode = "" if canary["policy"]["automatic"] else ", decided by hand"
    now = _because(canary.get("now") or canary["reason"])
    return f"v{canary['version']} gets {canary['weight']:g} % since {_time(canary['started_at'])}{by}{mode}{now}"


def _arms(figures: dict[str, Any]) -> Table:
    table = Table("", "requests", "errors", "ttft ms (mean, p50, p99)", "duration ms (mean, p50, p99)", box=None)
    for arm in ("baseline", "canary"):
        counts = figures[arm]
        table.add_row(arm, str(counts["requests"]), str(counts["errors"]), *map(_times, map(counts.get, _TIMES)))
    return table


_TIMES = ("ttft_ms", "duration_ms")


def _times(times: dict[str, Any] | None) -> str:
    return f"{times['mean']:g}, {times['p50']:g}, {times['p99']:g}" if times else ""


def _history(history: list[dict[str, Any]]) -> Table:
    table = Table("when", "what", "from", "to", "who", "why", box=None)
    for line in history:
        before = f"v{line['from']}" if line["from"] is not None else ""
        row = (_time(line["at"]), line["event"], before, f"v{line['to']}", line["who"] or "", line["why"] or "")
        table.add_row(*row)
    return table


def _because(reason: str | None) -> str:
    return f" ({reason})" if reason else ""


def _time(seconds: int) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))
