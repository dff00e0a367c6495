"""What the user sees while a run goes on: a bar on a terminal, else a line every few seconds. On stderr."""

from __future__ import annotations

import time
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

_LINE_EVERY_S = 10.0


class ProgressView:
    """Shows steps as they complete; a context manager."""

    def __init__(self, total_steps: int, done_steps: int, name: str = "", *, shown: bool = True) -> None:
        """name: of one run among several, which share the terminal line by line. shown: False says nothing at all."""
        self._prefix = f"{name}: " if name else ""
        self._total = total_steps
        self._shown_steps = 0
        self._started_s = time.monotonic()
        self._last_line = 0.0
        console = Console(stderr=True)
        self._bar: Progress | None = None
        self._shown = shown
        if console.is_terminal and not name and shown:
            columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
            self._bar = Progress(*columns, console=console)
            self._task = self._bar.add_task("", total=total_steps, completed=done_steps)

    def __enter__(self) -> ProgressView:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar:
            self._bar.stop()

    def step(self, record: dict[str, Any]) -> None:
        """One finished optimizer step."""
        if not self._shown:
            return
        self._shown_steps += 1
        # GRPO's loss is about 0 whatever is learnt.
        learnt = f"reward {record['reward']:.4f}" if "reward" in record else f"loss {record['loss']:.4f}"
        text = f"{learnt}  {record['tokens_per_s']:,.0f} tokens/s"
        if "mfu" in record:
            text += f"  MFU {record['mfu']:.0%}"
        if self._bar:
            self._bar.update(self._task, completed=record["step"], description=text)
        elif time.monotonic() - self._last_line >= _LINE_EVERY_S or record["step"] == self._total:
            self._last_line = time.monotonic()
            spent_s = time.monotonic() - self._started_s
            left_s = spent_s / self._shown_steps * (self._total - record["step"])
            click.echo(f"{self._prefix}step {record['step']}/{self._total}  {text}  {_duration(left_s)} left", err=True)

    def note(self, text: str) -> None:
        """A line of its own."""
        if not self._shown:
            return
        if self._bar:
            self._bar.console.print(text, highlight=False)
        else:
            click.echo(f"{self._prefix}{text}", err=True)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}h{minutes % 60:02d}m" if minutes >= 60 else f"{minutes}m{rest:02d}s"
