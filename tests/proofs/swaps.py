"""`python -m tests.proofs.swaps`: a name moves between two versions again and again, under load on it and the base.

Every answer, streamed or not, must be wholly one version's: it is compared with what `name@v1` and `name@v2` answered
before, greedily. An answer to a request that was sent after a swap was acknowledged must be the new version's.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2

from gateway import models
from tests.proofs import answers
from tests.support import engines
from tests.support.gateway import Gateway, gateway
from tests.support.peft_files import Adapter, Shapes, write_adapter

NAME = "swapped"
PROMPTS = ("What is gravity?", "Name three colours.", "Say hi.", "Where is Paris?")
_SETTLE_S = 0.05  # between swaps, beside the requests that are awaited


@dataclass
class Report:
    """What was seen."""

    swaps_ms: list[float] = field(default_factory=list)  # from asking for a swap to its answer
    first_ms: list[float] = field(default_factory=list)  # and to the first byte of an answer begun since
    answers: Counter[str] = field(default_factory=Counter)  # by what answered: base, v1, v2
    in_flight: int = 0  # answers to requests that were under way during a swap
    failed: list[str] = field(default_factory=list)
    mixed: list[str] = field(default_factory=list)  # neither version's text
    late: list[str] = field(default_factory=list)  # the old version's, though sent after the swap was acknowledged

    @property
    def good(self) -> bool:
        """Whether nothing went wrong."""
        return not (self.failed or self.mixed or self.late)

    def __str__(self) -> str:
        def spread(values: list[float]) -> str:
            return f"p50 {quantile(values, 0.5):.1f} ms, p99 {quantile(values, 0.99):.1f} ms, max {max(values):.1f} ms"

        lines = [
            f"swaps: {len(self.swaps_ms)}; acknowledged by all relays after {spread(self.swaps_ms)}",
            f"first byte of an answer begun after that was asked for: {spread(self.first_ms)}",
            f"answers: {dict(sorted(self.answers.items()))}, {self.in_flight} of them under way during a swap",
            f"failed {len(self.failed)}, mixed {len(self.mixed)}, late {len(self.late)}",
        ]
        return "\n".join(lines + (self.failed + self.mixed + self.late)[:10])


@dataclass(frozen=True)
class Expected:
    """Greedy answers: model -> prompt -> text."""

    base: str
    texts: dict[str, dict[str, str]]
    prompts: tuple[str, ...]  # whose answers tell the versions apart

    def who(self, prompt: str, text: str) -> str | None:
        """Which version of the name says so; None: neither."""
        return next((v for v in ("v1", "v2") if self.texts[v][prompt] == text), None)


async def run(served: Gateway, first: Path, second: Path, swaps: int, clients: int = 4, tokens: int = 16) -> Report:
    """Swap `swaps` times between two PEFT directories, uploaded as v1 and v2 of a new name."""
    engines.upload(served, NAME, first)
    limits = httpx2.Limits(max_connections=2 * clients + 4)
    async with httpx2.AsyncClient(base_url=served.url, timeout=120, trust_env=False, limits=limits) as http:
        await upload_aside(http, second)
        expected = await learn(http, served.model, tokens)
        report, load = Report(), Load(http, expected, tokens)
        workers = [asyncio.create_task(load.keep_asking(report, number)) for number in range(clients)]
        try:
            for swap in range(swaps):
                await load.swap(report, 2 if swap % 2 == 0 else 1)
                await asyncio.sleep(_SETTLE_S)
        finally:
            load.stopping = True
            await asyncio.gather(*workers)
    return report


async def upload_aside(http: httpx2.AsyncClient, directory: Path) -> None:
    """Upload the next version without moving the name to it."""
    files = [("file", (file.name, file.read_bytes())) for file in sorted(directory.glob("adapter_*"))]
    answer = await http.post("/v1/adapters", data={"name": NAME, "promote": "false"}, files=files)
    shown = answer.raise_for_status().json()
    assert (shown["state"], shown["version"], shown["current_version"]) == ("ready", 2, 1), shown


async def learn(http: httpx2.AsyncClient, base: str, tokens: int) -> Expected:
    """What each version answers, to the prompts whose answers tell all of them apart."""
    names = {"base": base, "v1": f"{NAME}@v1", "v2": f"{NAME}@v2"}
    texts = {
        key: {prompt: await ask(http, model, prompt, tokens, stream=False) for prompt in PROMPTS}
        for key, model in names.items()
    }
    telling = tuple(prompt for prompt in PROMPTS if len({texts[key][prompt] for key in names}) == 3)
    assert len(telling) >= 2, f"the versions cannot be told apart: {texts}"
    return Expected(base, texts, telling)


class Load:
    """Clients that ask the base and the name in turn, and the swaps under them."""

    def __init__(self, http: httpx2.AsyncClient, expected: Expected, tokens: int) -> None:
        self._http = http
        self._expected = expected
        self._tokens = tokens
        self._at = "v1"
        self._asked_s = 0.0  # when the last swap was asked for
        self._done_s = 0.0  # when it was acknowledged
        self._swapped = asyncio.Event()  # somebody got the new version's answer
        self._swapped.set()
        self.stopping = False

    async def swap(self, report: Report, version: int) -> None:
        """Move the name, and wait until a client has had the new version's first token."""
        self._swapped.clear()
        self._at, self._done_s, self._asked_s = f"v{version}", float("inf"), time.monotonic()
        action = {"promote": {"version": 2}} if version == 2 else {"rollback": {}}
        for verb, body in action.items():
            answer = await self._http.post(f"/v1/adapters/{NAME}/{verb}", json=body)
            if answer.status_code != 200 or answer.json()["current_version"] != version:
                report.failed.append(f"swap to v{version}: {answer.text}")
        self._done_s = time.monotonic()
        report.swaps_ms.append((self._done_s - self._asked_s) * 1e3)
        async with asyncio.timeout(120):
            await self._swapped.wait()

    async def keep_asking(self, report: Report, number: int) -> None:
        """Ask until told to stop, half of the time in streams."""
        turn = number
        while not self.stopping:
            turn += 1
            prompts = self._expected.prompts
            prompt, of_base, stream = prompts[turn % len(prompts)], turn % 3 == 0, turn // 3 % 2 == 0
            try:
                if of_base:
                    text = await ask(self._http, self._expected.base, prompt, self._tokens, stream)
                    self._check_base(report, prompt, text)
                else:
                    await self._ask_name(report, prompt, stream)
            except (httpx2.HTTPError, AssertionError, KeyError, ValueError) as error:
                report.failed.append(f"{prompt!r}: {error!r}")

    def _check_base(self, report: Report, prompt: str, text: str) -> None:
        report.answers["base"] += 1
        if text != self._expected.texts["base"][prompt]:
            report.mixed.append(f"base to {prompt!r}: {text!r}")

    async def _ask_name(self, report: Report, prompt: str, stream: bool) -> None:
        sent_s, swap_s = time.monotonic(), self._asked_s
        acknowledged, at_sending = sent_s > self._done_s, self._at
        first_s: list[float] = []
        text = await ask(self._http, NAME, prompt, self._tokens, stream, first_s)
        who = self._expected.who(prompt, text)
        if who is None:
            report.mixed.append(f"{NAME} to {prompt!r}: {text!r}")
            return
        report.answers[who] += 1
        report.in_flight += swap_s != self._asked_s
        if acknowledged and swap_s == self._asked_s and who != at_sending:
            report.late.append(f"{who} answered {prompt!r} after {at_sending} had taken over")
        if who == self._at and not self._swapped.is_set() and sent_s > self._asked_s:
            report.first_ms.append((first_s[0] - self._asked_s) * 1e3)
            self._swapped.set()


async def ask(
    http: httpx2.AsyncClient, model: str, prompt: str, tokens: int, stream: bool, first_s: list[float] | None = None
) -> str:
    """One greedy chat answer. first_s: gets the time of its first byte."""
    body: dict[str, Any] = {"model": model, "messages": [{"role": "user", "content": prompt}], "temperature": 0}
    body |= {"max_tokens": tokens, "stream": stream}
    async with http.stream("POST", "/v1/chat/completions", json=body) as answer:
        assert answer.status_code == 200, f"{answer.status_code} {await answer.aread()!r}"
        lines = [] if stream else [(await answer.aread()).decode()]
        if stream:
            async for line in answer.aiter_lines():
                lines.append(line)
                if first_s is not None and not first_s:
                    first_s.append(time.monotonic())
        elif first_s is not None:
            first_s.append(time.monotonic())
    if not stream:
        whole = json.loads(lines[0])
        assert whole["model"] == model, whole["model"]
        return str(whole["choices"][0]["message"]["content"])
    chunks = answers.events(lines)
    assert all(chunk["model"] == model for chunk in chunks), chunks
    return answers.text(chunks)


def quantile(values: list[float], share: float) -> float:
    """The nearest-rank quantile."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def main() -> None:
    """Start a gateway, swap, print."""
    parser = argparse.ArgumentParser(prog="tests.proofs.swaps", description=__doc__)
    parser.add_argument("--engine", default="vllm", choices=["vllm", "sglang", "emulator"])
    parser.add_argument("--swaps", type=int, default=50)
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--relays", type=int, default=2)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="tunegate-swaps-") as folder:
        work = Path(folder)
        if args.engine == "emulator":
            base = engines.checkpoint(work / "base")
            versions = [engines.adapter(work / f"v{seed}", seed) for seed in (1, 2)]
            flags = ["--engine-version", "emulator", "--device", "cuda", "--model", str(base), "--replicas", "2"]
        else:
            shapes = Shapes.of(models.resolve("demo"))
            versions = [write_adapter(work / f"v{seed}", shapes, Adapter(seed=seed, b_scale=0.3)) for seed in (1, 2)]
            flags = ["--backend", args.engine, "--device", "cpu", "--dtype", "float32", "--max-model-len", "2048"]
        with gateway(*flags, "--relays", str(args.relays), state=work / "state", ready_timeout_s=300) as served:
            started_s = time.monotonic()
            report = asyncio.run(run(served, versions[0], versions[1], args.swaps, args.clients))
            print(f"{args.engine}, {args.clients} clients, {args.relays} relays, {time.monotonic() - started_s:.0f} s")
            print(report)
            print(f"mean swap {statistics.fmean(report.swaps_ms):.1f} ms")
    raise SystemExit(0 if report.good else 1)


if __name__ == "__main__":
    main()
