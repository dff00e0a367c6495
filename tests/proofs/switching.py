"""`python -m tests.proofs.switching`: another engine takes over under load, and what that costs whoever asks meanwhile.

    python -m tests.proofs.switching                               vLLM -> SGLang beside it, then back in its place
    python -m tests.proofs.switching --emulator beside:sglang      the same over emulated engines

Clients ask the base and an adapter, half of it in streams, from before the first step until after the last. `beside`
must lose nothing. In `replace` a 503 with retry-after is the promise, and the client comes again; the time from the
first to the last of them is the downtime. Greedy answers are held against those that each engine gave in peace.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2

from gateway import models
from tests.proofs import answers
from tests.proofs.swaps import PROMPTS, quantile
from tests.support import engines
from tests.support.gateway import Gateway, gateway
from tests.support.peft_files import Adapter, Shapes, write_adapter

NAME = "tuned"
_SETTLE_S = 4.0  # of load before the first step and after each
_POLL_S = 0.2
_LIMIT_S = 500.0  # of one step


@dataclass(frozen=True)
class Asked:
    """One request, as its client saw it. Times are monotonic seconds."""

    sent_s: float
    end_s: float
    status: int
    text: str
    model: str
    prompt: str
    fault: str = ""  # "" where all of the answer came


@dataclass
class Step:
    """One switch."""

    mode: str
    backend: str
    phases: dict[str, float] = field(default_factory=dict)  # phase -> when it was first seen
    reason: str | None = None


async def ask(http: httpx2.AsyncClient, model: str, prompt: str, tokens: int, stream: bool) -> Asked:
    """One greedy chat request."""
    body: dict[str, Any] = {"model": model, "messages": [{"role": "user", "content": prompt}], "temperature": 0}
    body |= {"max_tokens": tokens, "stream": stream}
    sent_s, lines, status, fault = time.monotonic(), [], 0, ""
    try:
        async with http.stream("POST", "/v1/chat/completions", json=body) as answer:
            status = answer.status_code
            lines = [line async for line in answer.aiter_lines()]
            if status != 200:
                fault = "".join(lines)[:300]
                if status == 503 and "retry-after" not in answer.headers:
                    fault = f"without retry-after: {fault}"
    except httpx2.HTTPError as error:
        fault = repr(error)
    text = ""
    if not fault:
        try:
            text = _text(lines, stream)
        except (ValueError, KeyError) as error:
            fault = f"{error!r} in {lines[-2:]}"
    return Asked(sent_s, time.monotonic(), status, text, model, prompt, fault)


def _text(lines: list[str], stream: bool) -> str:
    """The text of a whole answer. Raises ValueError, KeyError."""
    if not stream:
        return str(json.loads("".join(lines))["choices"][0]["message"]["content"])
    return answers.text(answers.events(lines))


class Load:
    """Clients that ask one thing after the other, with a pause between."""

    def __init__(self, http: httpx2.AsyncClient, names: tuple[str, ...], tokens: int, clients: int, gap_s: float,
                 prompts: Sequence[str] = PROMPTS):  # fmt: skip
        self.asked: list[Asked] = []
        self._prompts = prompts
        self._stopping = asyncio.Event()
        turns = ((http, names, tokens, gap_s, number) for number in range(clients))
        self._tasks = [asyncio.create_task(self._keep_asking(*turn)) for turn in turns]

    async def _keep_asking(
        self, http: httpx2.AsyncClient, names: tuple[str, ...], tokens: int, gap_s: float, number: int
    ) -> None:
        for turn in itertools.count(number):
            model, prompt = names[turn % len(names)], self._prompts[turn % len(self._prompts)]
            self.asked.append(await ask(http, model, prompt, tokens, stream=turn // 2 % 2 == 0))
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), gap_s)
            if self._stopping.is_set():
                return

    async def end(self) -> list[Asked]:
        """Stop; all that was asked, once it is answered."""
        self._stopping.set()
        await asyncio.gather(*self._tasks)
        return self.asked


async def switch(http: httpx2.AsyncClient, step: Step, extra: dict[str, Any]) -> None:
    """Ask for the switch, and note when each of its phases was first seen."""
    began_s = time.monotonic()
    body = {"backend": step.backend, "mode": step.mode} | extra
    shown = (await http.post("/admin/backend", json=body)).raise_for_status().json()
    while time.monotonic() - began_s < _LIMIT_S:
        phase = shown["switch"]["phase"]
        step.phases.setdefault(phase, time.monotonic())
        if phase in ("done", "failed"):
            step.reason = shown["switch"]["reason"]
            return
        await asyncio.sleep(_POLL_S)
        shown = (await http.get("/admin/backend")).raise_for_status().json()
    step.reason = f"not over after {_LIMIT_S:g} s"


async def own_answers(http: httpx2.AsyncClient, names: tuple[str, ...], tokens: int) -> dict[tuple[str, str], str]:
    """What each model answers to each prompt while nothing else is asked."""
    found = {}
    for model, prompt in itertools.product(names, PROMPTS):
        one = await ask(http, model, prompt, tokens, stream=False)
        assert not one.fault, one
        found[model, prompt] = one.text
    return found


async def prove(served: Gateway, steps: list[Step], args: argparse.Namespace) -> bool:
    """Switch under load; prints the figures. True if nothing was lost."""
    names = (served.model, NAME)
    limits = httpx2.Limits(max_connections=2 * args.clients + 4)
    extra = {"engine_version": "emulator"} if args.emulator else {}
    async with httpx2.AsyncClient(base_url=served.url, timeout=180, trust_env=False, limits=limits) as http:
        good, before = True, await own_answers(http, names, args.tokens)
        for step in steps:
            load = Load(http, names, args.tokens, args.clients, args.gap_s)
            await asyncio.sleep(_SETTLE_S)
            await switch(http, step, extra)
            await asyncio.sleep(_SETTLE_S)
            asked = await load.end()
            after = await own_answers(http, names, args.tokens)
            known = {key: {before[key], after[key]} for key in after}
            found = cost(step, asked, lambda one, known=known: one.text in known[one.model, one.prompt])  # type: ignore[misc]
            good = report(found) and good
            before = after
        return good


def cost(step: Step, asked: list[Asked], right: Callable[[Asked], bool]) -> dict[str, Any]:
    """What one switch came to. Seconds; `down_s`: from the first request refused to the next one answered.

    right: whether a whole answer is one that either engine gives.
    """
    began_s, ended_s = next(iter(step.phases.values())), max(step.phases.values())
    asked = [one for one in asked if one.end_s >= began_s or not one.fault]  # earlier faults are not this switch's
    later = [one for one in asked if one.status == 503 and not one.fault.startswith("without")]
    allowed = later if step.mode == "replace" else []
    whole = [one for one in asked if not one.fault]
    failed = [one for one in asked if one.fault and one not in allowed]
    strange = [one for one in whole if not right(one)]
    ends_s = sorted([min(one.sent_s for one in asked), *(one.end_s for one in whole), max(one.end_s for one in asked)])
    found: dict[str, Any] = {"mode": step.mode, "backend": step.backend, "done": "done" in step.phases}
    found |= {"reason": step.reason, "seconds": ended_s - began_s}
    found["phases_s"] = {phase: at_s - began_s for phase, at_s in step.phases.items()}
    found["answered_ms"] = {}
    for name, mine in _around(whole, began_s, ended_s).items():
        times_ms = [(one.end_s - one.sent_s) * 1e3 for one in mine]
        found["answered_ms"][name] = {"count": len(mine), "p50": quantile(times_ms, 0.5), "max": max(times_ms)}
    found["silence_s"] = max(after - before for before, after in itertools.pairwise(ends_s))
    found |= {"told_to_come_again": len(later), "down_s": 0.0}
    if later:
        back = [one.end_s for one in whole if one.sent_s > later[-1].sent_s]
        found["down_s"] = min(back) - later[0].sent_s if back else None
    found["failed"] = dict(Counter(map(_kind, failed)))
    found |= {"cut": sum(one.status == 200 for one in failed), "of_neither": len(strange)}
    return found | {"examples": [str(one) for one in (failed + strange)[:5]]}


def _around(asked: list[Asked], began_s: float, ended_s: float) -> dict[str, list[Asked]]:
    found: dict[str, list[Asked]] = {}
    for one in asked:
        name = "before" if one.end_s < began_s else "meanwhile" if one.sent_s < ended_s else "after"
        found.setdefault(name, []).append(one)
    return found


def _kind(one: Asked) -> str:
    """A failure in a word."""
    if one.status == 200:
        return "cut"
    return f"status {one.status}" if one.status else f"connection: {one.fault.partition('(')[0]}"


def report(found: dict[str, Any]) -> bool:
    """Print what one switch came to; whether all went as promised."""
    spans = ", ".join(f"{phase} {at_s:.1f} s" for phase, at_s in found["phases_s"].items())
    took = (
        f"{found['mode']} -> {found['backend']}: {found['seconds']:.1f} s; first seen: {spans} {found['reason'] or ''}"
    )
    print(took.rstrip(), flush=True)
    for during, row in found["answered_ms"].items():
        print(f"  {during}: {row['count']} answers, p50 {row['p50']:.0f} ms, max {row['max']:.0f} ms")
    print(
        f"  failed {found['failed'] or 0}; answers of neither engine {found['of_neither']}; longest time without one "
        f"{found['silence_s']:.1f} s"
    )
    if found["told_to_come_again"]:
        print(
            f"  told to come again: {found['told_to_come_again']}; answered again after {found['down_s'] or -1:.1f} s"
        )
    for one in found["examples"]:
        print(f"  {one}")
    return bool(found["done"] and not found["failed"] and not found["of_neither"])


def main() -> None:
    """Start a gateway, switch, print; status 1 where something was lost."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("steps", nargs="*", default=["beside:sglang", "replace:vllm"], metavar="MODE:BACKEND")
    parser.add_argument("--emulator", action="store_true", help="emulated engines instead of real ones on the CPU")
    parser.add_argument("--start", default="vllm", help="the engine to begin with")
    parser.add_argument("--clients", type=int, default=2)
    parser.add_argument("--gap-s", type=float, default=0.5, help="pause of a client between two requests")
    parser.add_argument("--tokens", type=int, default=12)
    parser.add_argument("--drain-s", type=int, default=120, help="how long the old engine may take to finish")
    args = parser.parse_args()
    steps = [Step(mode, backend) for mode, _, backend in (step.partition(":") for step in args.steps)]
    with tempfile.TemporaryDirectory(prefix="tunegate-switching-") as folder:
        work = Path(folder)
        if args.emulator:
            adapter = engines.adapter(work / NAME)
            base = engines.checkpoint(work / "base")
            flags = ["--engine-version", "emulator", "--device", "cuda", "--model", str(base)]
        else:
            adapter = write_adapter(work / NAME, Shapes.of(models.resolve("demo")), Adapter(seed=1, b_scale=0.3))
            flags = ["--device", "cpu", "--dtype", "float32", "--max-model-len", "2048"]
        flags += ["--backend", args.start, "--relays", "2", "--drain-timeout-s", str(args.drain_s)]
        with gateway(*flags, state=work / "state", ready_timeout_s=400) as served:
            engines.upload(served, NAME, adapter)
            good = asyncio.run(prove(served, steps, args))
    raise SystemExit(0 if good else 1)


if __name__ == "__main__":
    main()
