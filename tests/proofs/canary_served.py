"""`python -m tests.proofs.canary_served`: canaries on a real engine, decided by what their own traffic came to.

Three versions of one name: v1 serves; v2 answers as long as v1 does; v3 has forgotten how to stop. Clients ask in the
name of many users. v3 is tried first, and must be rolled back; then v2, which must be promoted. Meanwhile every answer
must be wholly the version's that its header names, and no user may see two versions of one trial.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2

from gateway import models
from tests.proofs import answers
from tests.proofs.swaps import quantile
from tests.support import engines
from tests.support.gateway import gateway
from tests.support.peft_files import Adapter, Shapes, write_adapter

NAME = "tried"
_VERSIONS = (Adapter(seed=1, b_scale=1e-3), Adapter(seed=2, b_scale=1e-3), Adapter(seed=3, b_scale=0.3))
_PROMPTS = ("Say hi.", "Hello!", "Thanks!", "Say yes.", "What is 1+1? Answer with one number.", "Is water wet?", "Bye.")
_TOKENS = 32
_SHORT_TOKENS = 16  # of an answer that ends by itself
_USERS = 200
_LIMIT_S = 300.0


@dataclass
class Seen:
    """What the clients of one trial met."""

    durations_ms: dict[str, list[float]] = field(default_factory=dict)  # by version
    of_user: dict[str, set[str]] = field(default_factory=dict)
    faults: Counter[str] = field(default_factory=Counter)

    def add(self, user: str, version: str, took_ms: float) -> None:
        """An answer that was as it should be."""
        self.durations_ms.setdefault(version, []).append(took_ms)
        self.of_user.setdefault(user, set()).add(version)


async def ask(http: httpx2.AsyncClient, model: str, prompt: str, user: str, stream: bool) -> tuple[str, str, int]:
    """A greedy answer: its text, the version that the header names, tokens (of a stream: 0)."""
    body: dict[str, Any] = {"model": model, "messages": [{"role": "user", "content": prompt}], "temperature": 0}
    body |= {"max_tokens": _TOKENS, "stream": stream, "user": user}
    async with http.stream("POST", "/v1/chat/completions", json=body) as answer:
        data = (await answer.aread()).decode()
        assert answer.status_code == 200, f"{answer.status_code} {data}"
        version = answer.headers.get("x-tunegate-model", "")
    if not stream:
        whole = json.loads(data)
        return str(whole["choices"][0]["message"]["content"]), version, int(whole["usage"]["completion_tokens"])
    return answers.text(answers.events(data.splitlines())), version, 0


async def learn(http: httpx2.AsyncClient) -> dict[str, dict[str, str]]:
    """Version -> prompt -> text, of the prompts that v1 and v2 answer shortly and v3 at length."""
    own: dict[str, dict[str, str]] = {f"{NAME}@v{number}": {} for number in (1, 2, 3)}
    for prompt in _PROMPTS:
        found = {model: await ask(http, model, prompt, "", stream=False) for model in own}
        lengths = [tokens for _, _, tokens in found.values()]
        if max(lengths[:2]) <= _SHORT_TOKENS and lengths[2] == _TOKENS:
            for model, (text, _, _) in found.items():
                own[model][prompt] = text
    assert own[f"{NAME}@v1"], "no prompt tells the versions apart by the length of their answers"
    return own


async def keep_asking(http: httpx2.AsyncClient, own: dict[str, dict[str, str]], seen: Seen, seed: int) -> None:
    """Ask in the name of one user after another until cancelled."""
    dice = random.Random(seed)
    while True:
        user, prompt = f"user-{dice.randrange(_USERS)}", dice.choice(list(own[f"{NAME}@v1"]))
        began_s = time.monotonic()
        try:
            text, version, _ = await ask(http, NAME, prompt, user, stream=dice.random() < 0.5)
        except (httpx2.HTTPError, AssertionError, ValueError, KeyError) as error:
            seen.faults[repr(error)[:200]] += 1
            continue
        if version and own[version][prompt] != text:  # "": its canary was over
            seen.faults[f"{version} answered {prompt!r} by {text!r}"] += 1
        elif version:
            seen.add(user, version, (time.monotonic() - began_s) * 1e3)


async def trial(
    http: httpx2.AsyncClient, own: dict[str, dict[str, str]], body: dict[str, Any], clients: int
) -> tuple[Seen, dict[str, Any], float]:
    """Run one canary until it is decided: what clients met, the line of the history that says how, and seconds."""
    seen, began_s = Seen(), time.monotonic()
    (await http.post(f"/v1/adapters/{NAME}/canary", json=body)).raise_for_status()
    askers = [asyncio.create_task(keep_asking(http, own, seen, seed)) for seed in range(clients)]
    try:
        async with asyncio.timeout(_LIMIT_S):
            while True:
                shown = (await http.get(f"/v1/adapters/{NAME}")).raise_for_status().json()
                if shown["canary"] is None:
                    return seen, dict(shown["history"][0]), time.monotonic() - began_s
                await asyncio.sleep(0.2)
    except TimeoutError:
        raise SystemExit(f"not decided within {_LIMIT_S:g} s: {shown['canary']} {seen.faults}") from None
    finally:
        for asker in askers:
            asker.cancel()
        await asyncio.wait(askers)


def report(version: int, event: str, seen: Seen, line: dict[str, Any], seconds: float) -> bool:
    """Print one trial; whether it ended as it should, and nothing was wrong meanwhile."""
    asked = {label: f"{len(ms)} (p50 {quantile(ms, 0.5):.0f} ms)" for label, ms in sorted(seen.durations_ms.items())}
    torn = [user for user, versions in seen.of_user.items() if len(versions) > 1]
    print(f"v{version}: {line['event']} to v{line['to']} by {line['who']} after {seconds:.0f} s: {line['why']}")
    print(f"  answers {asked}; users {len(seen.of_user)}, of more than one version {len(torn)}")
    print(f"  figures {json.dumps(line['figures'])}")
    print(f"  faults {sum(seen.faults.values())} {dict(seen.faults.most_common(3)) or ''}".rstrip(), flush=True)
    return line["event"] == event and line["who"] == "canary" and not torn and not seen.faults


async def prove(url: str, clients: int, min_requests: int) -> bool:
    """Both trials."""
    policy = {"min_requests": min_requests, "max_error_increase": 0.1}
    async with httpx2.AsyncClient(base_url=url, timeout=120, trust_env=False) as http:
        own = await learn(http)
        print(f"{len(own[f'{NAME}@v1'])} prompts, {clients} clients, {_USERS} users, {policy}", flush=True)
        worse = await trial(http, own, {"version": 3, "weight": 50, **policy}, clients)
        good = report(3, "canary ended", *worse)
        equal = await trial(http, own, {"version": 2, "weight": 50, **policy}, clients)
        return report(2, "moved", *equal) and good


def main() -> None:
    """Start a gateway, try, print; status 1 where it was decided otherwise."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", choices=["vllm", "sglang"], default="vllm")
    parser.add_argument("--clients", type=int, default=6)
    parser.add_argument("--min-requests", type=int, default=40, help="of each version before one may be promoted")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="tunegate-canary-") as folder:
        shapes = Shapes.of(models.resolve("demo"))
        flags = ("--backend", args.engine, "--device", "cpu", "--dtype", "float32", "--max-model-len", "1024")
        with gateway(*flags, "--relays", "2", state=Path(folder) / "state", ready_timeout_s=400) as served:
            for number, adapter in enumerate(_VERSIONS, 1):
                directory = write_adapter(Path(folder) / f"v{number}", shapes, adapter)
                engines.upload(served, NAME, directory, promote=number == 1)
            good = asyncio.run(prove(served.url, args.clients, args.min_requests))
    raise SystemExit(0 if good else 1)


if __name__ == "__main__":
    main()
