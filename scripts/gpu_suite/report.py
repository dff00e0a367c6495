"""What a stage saw: named checks that passed or failed, and figures. One JSON file a stage."""

from __future__ import annotations

import contextlib
import datetime
import json
import subprocess
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
import openai

# What a check may fail of. Anything else is a fault of the suite and ends the stage.
FAILURES = (AssertionError, openai.OpenAIError, httpx2.HTTPError, subprocess.SubprocessError, OSError, LookupError,
            ValueError, TypeError)  # fmt: skip
_DETAIL_CHARACTERS = 2000


@dataclass
class Report:
    """The result of one stage, while it is made."""

    stage: str
    figures: dict[str, Any] = field(default_factory=dict)
    checks: list[dict[str, Any]] = field(default_factory=list)
    started_at: float = field(default_factory=time.time)  # seconds since the epoch

    @contextlib.contextmanager
    def check(self, name: str) -> Iterator[None]:
        """A named check: what is raised inside is written down, and the stage goes on."""
        started = time.monotonic()
        failure = ""
        try:
            yield
        except FAILURES as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            failure = f"{type(error).__name__} at {Path(where.filename).name}:{where.lineno}: {error}"
        row = {"check": name, "ok": not failure, "seconds": round(time.monotonic() - started, 2)}
        self.checks.append(row | ({"failure": failure[:_DETAIL_CHARACTERS]} if failure else {}))
        print(
            f"{self.stage}: {name}: {'ok' if not failure else 'FAILED ' + failure[:600]} ({row['seconds']} s)",
            flush=True,
        )

    @property
    def failures(self) -> list[str]:
        """One line a failed check."""
        return [f"{row['check']}: {row['failure']}" for row in self.checks if not row["ok"]]

    def save(self, path: Path) -> None:
        """Write it down, so that the stage need not run again."""
        body = {
            "stage": self.stage,
            "ok": bool(self.checks) and not self.failures,
            "date": datetime.datetime.fromtimestamp(self.started_at, datetime.UTC).date().isoformat(),
            "seconds": round(time.time() - self.started_at, 1),
            "figures": self.figures,
            "checks": self.checks,
        }
        aside = path.with_suffix(".new")
        aside.write_text(json.dumps(body, indent=1) + "\n")
        aside.replace(path)


def quantile(values: list[float], share: float) -> float | None:
    """The value below which `share` of them lie; None of nothing."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else None
