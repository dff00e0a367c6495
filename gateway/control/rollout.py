"""Watches the canaries: reads what relays counted, has `canary.decide` judge, and does what it says."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from sqlalchemy.exc import SQLAlchemyError

from gateway.adapters.names import pinned
from gateway.control.canary import Action, Arm, Times, Verdict, decide
from gateway.control.catalog import Adapter, Canary, Cause, Event, Version
from gateway.control.registry import Registry
from gateway.control.score import ScoreCommand, ScoreFailed
from gateway.errors import Conflict, StorageFull
from gateway.observe import series
from gateway.observe.exposition import sum_relays

_log = logging.getLogger(__name__)
WHO = "canary"  # made these decisions

Counts = dict[str, Any]  # of one version, as the store keeps them: requests, errors, cells of ttft and duration


class Rollouts:
    """The loop over the canaries of one gateway."""

    def __init__(
        self,
        registry: Registry,
        run_dir: Path,
        can_take_over: Callable[[Version], bool],
        every_s: float,
        score: ScoreCommand | None,
    ) -> None:
        """can_take_over: whether a name may point to that version now. score: asked before a promotion."""
        self._registry = registry
        self._run_dir = run_dir
        self._can_take_over = can_take_over
        self._every_s = every_s
        self._score = score
        self._judging: dict[str, asyncio.Task[None]] = {}

    def __repr__(self) -> str:
        return f"<Rollouts of {', '.join(self._judging) or 'nothing'}>"

    async def run(self) -> None:
        """Judge every canary again and again until cancelled; each in a task, since a score may take minutes."""
        async with asyncio.TaskGroup() as tasks:
            while True:
                await asyncio.sleep(self._every_s)
                self._judging = {name: task for name, task in self._judging.items() if not task.done()}
                for name in self._registry.index.moving:
                    adapter = self._registry.adapters[name]
                    if adapter.canary is not None and name not in self._judging:
                        self._judging[name] = tasks.create_task(self._judge(adapter, adapter.canary))

    async def counts(self, name: str, versions: tuple[int, ...]) -> dict[str, Counts]:
        """What relays have counted of these versions since their counts began, by `name@vN`."""
        totals = await asyncio.to_thread(sum_relays, self._run_dir)
        return {pinned(name, version): _counts(totals, pinned(name, version)) for version in versions}

    async def verdict(self, adapter: Adapter, canary: Canary) -> Verdict:
        """How a canary stands by what was counted since its start."""
        assert adapter.current is not None, "a canary has a baseline"
        now = await self.counts(adapter.name, (adapter.current, canary.version))
        baseline, tried = (_since(canary.start.get(label), counts) for label, counts in now.items())
        return decide(canary.policy, baseline, tried, canary.looks)

    async def _judge(self, adapter: Adapter, canary: Canary) -> None:
        try:
            verdict = await self.verdict(adapter, canary)
            if not canary.policy.automatic or verdict.look == canary.looks:
                return
            if verdict.action is Action.PROMOTE:
                if not self._can_take_over(adapter.versions[canary.version]):
                    return  # the same look is made again when every replica has it
                verdict = await self._ask_for_score(adapter, canary, verdict)
            await self._act(adapter, canary, verdict)
        except Conflict as change:
            _log.info("what was judged of the canary of %s is void: %s", adapter.name, change)
        except (StorageFull, SQLAlchemyError, OSError) as error:
            _log.error("the canary of %s cannot be judged, trying again: %s", adapter.name, error)

    async def _ask_for_score(self, adapter: Adapter, canary: Canary, verdict: Verdict) -> Verdict:
        if self._score is None:
            return verdict
        assert adapter.current is not None
        names = pinned(adapter.name, adapter.current), pinned(adapter.name, canary.version)
        try:
            score, figures = await self._score.run(*names)
        except ScoreFailed as error:
            _log.warning("no score for %s: %s", names[1], error)
            return replace(verdict, action=Action.WATCH, reason=f"{verdict.reason}, but there is no score: {error}")
        action = Action.ROLL_BACK if score < 0 else Action.PROMOTE
        reason = f"{verdict.reason}; score {score:g}"
        return replace(verdict, action=action, reason=reason, figures=verdict.figures | {"score": figures})

    async def _act(self, adapter: Adapter, canary: Canary, verdict: Verdict) -> None:
        cause = Cause(WHO, verdict.reason)
        if verdict.action is Action.WATCH:
            seen = replace(canary, looks=verdict.look, last=verdict.figures, reason=verdict.reason)
            await self._registry.set_canary(adapter, seen)
            return
        _log.info("canary %s: %s: %s", pinned(adapter.name, canary.version), verdict.action, verdict.reason)
        if verdict.action is Action.PROMOTE:
            await self._registry.promote(adapter.versions[canary.version], cause, verdict.figures, adapter)
            return
        ended = Event("canary ended", canary.version, adapter.current or 0, cause, 0, verdict.figures)
        await self._registry.set_canary(adapter, None, ended)


def _counts(totals: Mapping[str, Mapping[tuple[str, ...], list[int]]], label: str) -> Counts:
    by_status = {"requests": 0, "errors": 0}
    for (_, model, status), cells in totals.get(series.REQUESTS.name, {}).items():
        if model == label and (status[0] in "25"):
            by_status["requests"] += cells[0]
            by_status["errors"] += cells[0] if status[0] == "5" else 0
    times = {
        field: totals.get(metric.name, {}).get((label,), [0] * metric.cells)
        for field, metric in (("ttft", series.TTFT), ("duration", series.DURATION))
    }
    return by_status | times


def _since(start: Mapping[str, Any] | None, now: Counts) -> Arm:
    """What came after `start`; all of it where relays began to count anew."""
    if start is None or start["requests"] > now["requests"]:
        start = {"requests": 0, "errors": 0, "ttft": [0] * len(now["ttft"]), "duration": [0] * len(now["duration"])}
    return Arm(
        now["requests"] - start["requests"],
        now["errors"] - start["errors"],
        _times(series.TTFT, start["ttft"], now["ttft"]),
        _times(series.DURATION, start["duration"], now["duration"]),
    )


def _times(metric: series.Metric, start: list[int], now: list[int]) -> Times:
    return Times(metric.bounds, tuple(after - before for before, after in zip(start, now, strict=True)))
