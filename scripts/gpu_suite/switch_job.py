"""One gateway, another engine under it again and again, while clients ask: what each switch costs them."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx2

from backends.spec import BackendName
from scripts.gpu_suite.reference import Expected, agrees, as_reference
from scripts.gpu_suite.report import Report, write_json
from scripts.gpu_suite.serving import ANSWER_TOKENS, FAST_START, KEY, Engine, Served, memory_flags, serving, upload
from tests.proofs.switching import Asked, Load, Step, cost, switch

_CLIENTS = 8
_PAUSE_S = 0.05  # of a client between two requests
_SETTLE_S = 4.0  # of load before each switch and after it
_DRAIN_S = 60
_START_S = 240  # then an engine that hangs has failed, and the next step begins
_BUDGET_S = 350.0  # the steps that the plan has for more time are not begun later
_TIMEOUT_S = 120.0  # of a request
# Flags of `gateway serve` that belong to one engine, and the field of POST /admin/backend that each is.
_FIELDS = {"--memory-fraction": "memory_fraction", "--engine-version": "engine_version",
           "--tool-call-parser": "tool_call_parser", "--reasoning-parser": "reasoning_parser"}  # fmt: skip


def switch_job(report: Report, engines: Sequence[Engine], model: Path, oracle: Path, work: Path) -> None:
    """Start the first engine, then go through `plan`; each switch's figures are written as soon as they are known."""
    began_s = time.monotonic()
    expected: Expected = json.loads((oracle / "expected.json").read_text())
    by_name = {str(engine.name): engine for engine in engines}
    first = engines[0]
    flags = ["--max-model-len", "4096", "--max-adapter-rank", "16", "--drain-timeout-s", str(_DRAIN_S)]
    flags += ["--start-timeout-s", str(_START_S)]
    flags += ["--dtype", "float32" if first.device == "cpu" else "bfloat16"]
    flags += [f"--engine-arg={argument}" for argument in _fast(first)]
    report.figures |= {"switches": [], "not_run": [], "clients": _CLIENTS, "tokens_a_request": ANSWER_TOKENS}
    with serving(first, model, work / "state", *flags, name="demo") as served:
        report.figures["ready_s"] = served.ready_s
        print(f"{report.stage}: {first.name} ready after {served.ready_s} s", flush=True)
        with report.check(f"two adapters on {first.name}"):
            report.figures["upload_ready_s"] = [upload(served, name, oracle / name) for name in _adapters(expected)]
            _answers_as_reference(served, expected)
        for number, step in enumerate(plan([engine.name for engine in engines])):
            if number > len(engines) and time.monotonic() - began_s > _BUDGET_S:
                report.figures["not_run"].append(f"{step.mode} -> {step.backend}: no time left")
                continue
            with report.check(f"{step.mode} -> {step.backend} under load"):
                found = asyncio.run(_under_load(served, step, _body(by_name[step.backend], model), expected))
                report.figures["switches"].append(found)
                write_json(work / "switches.json", report.figures)
                print(f"{report.stage}: {_in_short(found)}", flush=True)
                assert found["done"], found["reason"]
                assert not found["failed"] and not found["of_neither"], found["examples"]
            with report.check(f"base and adapters answer as the reference after it ({step.backend})"):
                _answers_as_reference(served, expected)
            (work / "gateway.log").write_text(served.gateway.errors)


def plan(names: Sequence[BackendName]) -> list[Step]:
    """One switch beside, then one in place to each engine; then, if there is time, beside to the others, too."""
    first, second, *others = names
    ways = [("beside", second), *(("replace", name) for name in (*others, first, second))]
    ways += [("beside", name) for name in (*others, first)]
    return [Step(mode, name) for mode, name in ways]


def fields_of(flags: Sequence[str]) -> dict[str, Any]:
    """The part of POST /admin/backend that these flags of `gateway serve` stand for; others hold for any engine."""
    body: dict[str, Any] = {"engine_arg": []}
    given = iter(flags)
    for flag in given:
        name, equals, value = flag.partition("=")
        if name == "--engine-arg" or name in _FIELDS:
            value = value if equals else next(given)
        if name == "--engine-arg":
            body["engine_arg"].append(value)
        elif name in _FIELDS:
            body[_FIELDS[name]] = float(value) if name == "--memory-fraction" else value
    return body


async def _under_load(served: Served, step: Step, body: dict[str, Any], expected: Expected) -> dict[str, Any]:
    names = ("demo", *_adapters(expected))
    limits = httpx2.Limits(max_connections=2 * _CLIENTS + 4)
    headers = {"authorization": f"Bearer {KEY}"}
    async with httpx2.AsyncClient(base_url=served.gateway.url, headers=headers, timeout=_TIMEOUT_S, limits=limits,
                                  trust_env=False) as http:  # fmt: skip
        load = Load(http, names, ANSWER_TOKENS, _CLIENTS, _PAUSE_S, list(expected["base"]))
        try:
            await asyncio.sleep(_SETTLE_S)
            await switch(http, step, body)
            await asyncio.sleep(_SETTLE_S)
        finally:
            asked = await load.end()
    return cost(step, asked, lambda one: _right(one, expected))


def _right(asked: Asked, expected: Expected) -> bool:
    return agrees(asked.text, expected["base" if asked.model == "demo" else asked.model][asked.prompt])


def _body(engine: Engine, model: Path) -> dict[str, Any]:
    """What the switch is asked with, beside engine and mode."""
    body = fields_of([*memory_flags(engine, model), *engine.flags])
    body["engine_arg"] += _fast(engine)
    return body


def _fast(engine: Engine) -> list[str]:
    return [FAST_START[engine.name]] if engine.device == "cuda" else []


def _adapters(expected: Expected) -> list[str]:
    return [name for name in expected if name != "base"]


def _answers_as_reference(served: Served, expected: Expected) -> None:
    with served.client() as client:
        for name, answers in expected.items():
            as_reference(client, "demo" if name == "base" else name, answers)


def _in_short(found: dict[str, Any]) -> str:
    """One line, for whoever watches."""
    rows = {name: f"{row['count']} answers, p50 {row['p50']:.0f} ms, max {row['max']:.0f} ms"
            for name, row in found["answered_ms"].items()}  # fmt: skip
    return (
        f"{found['mode']} -> {found['backend']}: {'done' if found['done'] else found['reason']} in "
        f"{found['seconds']:.1f} s; longest time without an answer {found['silence_s']:.2f} s; refused "
        f"{found['told_to_come_again']}, answered again after {found['down_s']} s; failed {found['failed'] or 0}, cut "
        f"{found['cut']}, of neither engine {found['of_neither']}; {rows}"
    )
