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
    folder: Path | None = None  # gets STAGE.partial.json after every check, and STAGE.json at the end

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
        self.keep()

    @property
    def failures(self) -> list[str]:
        """One line a failed check."""
        return [f"{row['check']}: {row['failure']}" for row in self.checks if not row["ok"]]

    def keep(self) -> None:
        """Write down what is known so far: a stage may be ended at any moment."""
        if self.folder is not None:
            write_json(self.folder / f"{self.stage}.partial.json", self._body())

    def save(self) -> None:
        """Write it down for good, so that the stage need not run again."""
        assert self.folder is not None
        write_json(self.folder / f"{self.stage}.json", self._body())
        (self.folder / f"{self.stage}.partial.json").unlink(missing_ok=True)

    def _body(self) -> dict[str, Any]:
        return {
            "stage": self.stage,
            "ok": bool(self.checks) and not self.failures,
            "date": datetime.datetime.fromtimestamp(self.started_at, datetime.UTC).date().isoformat(),
            "seconds": round(time.time() - self.started_at, 1),
            "figures": self.figures,
            "checks": self.checks,
        }


def write_json(path: Path, body: dict[str, Any]) -> None:
    """Written aside and renamed: a reader finds the whole of one version."""
    aside = path.with_suffix(".new")
    aside.write_text(json.dumps(body, indent=1, default=str) + "\n")
    aside.replace(path)


def quantile(values: list[float], share: float) -> float | None:
    """The value below which `share` of them lie; None of nothing."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else None
