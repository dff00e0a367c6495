"""More adapters than slots, under Zipf traffic: no errors, hit rate, cold and warm time to first token, fairness.

    python -m tests.proofs.residency --engine vllm              200 adapters over 4 places of the real vLLM on the CPU
    python -m tests.proofs.residency --emulators                5,000 adapters, 8 replicas that are killed in turn

Every answer is held against the adapter's own: on a real engine what it said right after its upload, when nothing else
ran; over the emulators what its weights come to by the emulator's rule.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import httpx2
import numpy as np

from backends.emulator import adapters as emulator_adapters
from backends.emulator.language import EOS_ID, generate
from tests.support import engines
from tests.support.gateway import Gateway, gateway
from tests.support.peft_files import Adapter, Shapes, write_adapter
from tests.support.registered import content_of, fill

PROMPT = "The ship"
_RETRIED = (429, 500, 502, 503)
_TRIES = 8


@dataclass
class Tally:
    """What the clients met."""

    warm_ms: list[float] = field(default_factory=list)
    cold_ms: list[float] = field(default_factory=list)
    by_name: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    answers: dict[str, set[str]] = field(default_factory=lambda: defaultdict(set))
    own: dict[str, str] = field(default_factory=dict)  # what each answers, known beforehand
    errors: Counter[str] = field(default_factory=Counter)
    retried: Counter[str] = field(default_factory=Counter)


async def ask(client: httpx2.AsyncClient, name: str, max_tokens: int) -> tuple[int, str, float, bool]:
    """One streamed request: status, text (or the error), TTFT in ms, whether it waited for a load."""
    body = {"model": name, "prompt": PROMPT, "max_tokens": max_tokens, "temperature": 0, "stream": True}
    started = time.monotonic()
    first_ms, text = 0.0, ""
    async with client.stream("POST", "/v1/completions", json=body) as answer:
        if answer.status_code != 200:
            return answer.status_code, (await answer.aread()).decode(), 0.0, False
        async for line in answer.aiter_lines():
            if line.startswith("data: {"):
                event = json.loads(line[6:])
                if "error" in event:
                    return 502, json.dumps(event), 0.0, False
                if event.get("choices"):
                    first_ms = first_ms or (time.monotonic() - started) * 1e3
                    text += event["choices"][0].get("text") or ""
        if "[DONE]" not in line and not first_ms:
            return 502, "cut off", 0.0, False
        return 200, text, first_ms, "x-tunegate-adapter" in answer.headers


def spoken(state: Path, name: str, max_tokens: int) -> str:
    """What an emulator with this adapter answers."""
    weights = emulator_adapters.read(str(state / "adapters" / content_of(name))).weights
    words = itertools.takewhile(lambda token: token.id != EOS_ID, generate(weights, PROMPT))
    return "".join(token.text for token in itertools.islice(words, max_tokens))


async def client_loop(served: Gateway, names: list[str], weights: np.ndarray, until_s: float, tally: Tally, seed: int,
                      max_tokens: int, gap_s: float) -> None:  # fmt: skip
    """Ask for one adapter after the other until the time is over; errors that tell so are tried again."""
    dice = random.Random(seed)
    async with httpx2.AsyncClient(base_url=served.url, timeout=180, trust_env=False) as client:
        while time.monotonic() < until_s:
            name = dice.choices(names, cum_weights=weights.tolist())[0]
            for attempt in range(_TRIES):
                try:
                    status, text, ttft_ms, cold = await ask(client, name, max_tokens)
                except httpx2.HTTPError as error:
                    status, text, ttft_ms, cold = 599, repr(error), 0.0, False
                if status == 200:
                    (tally.cold_ms if cold else tally.warm_ms).append(ttft_ms)
                    tally.by_name[name].append(ttft_ms)
                    tally.answers[name].add(text)
                    break
                kind = f"{status} {text[:140]}"
                if status not in _RETRIED or attempt == _TRIES - 1:
                    tally.errors[kind] += 1
                    break
                tally.retried[kind] += 1
                await asyncio.sleep(0.2 * (attempt + 1))
            await asyncio.sleep(dice.expovariate(1 / gap_s) if gap_s else 0)


async def base_loop(served: Gateway, until_s: float, times_ms: list[float], errors: Counter[str]) -> None:
    """The base model, once every 250 ms, meanwhile."""
    async with httpx2.AsyncClient(base_url=served.url, timeout=180, trust_env=False) as client:
        while time.monotonic() < until_s:
            status, text, ttft_ms, _ = await ask(client, served.model, 2)
            if status == 200:
                times_ms.append(ttft_ms)
            else:
                errors[f"{status} {text[:100]}"] += 1
            await asyncio.sleep(0.25)


async def kill_loop(served: Gateway, replicas: int, until_s: float, every_s: float, kills: list[str]) -> None:
    """Kill one engine after the other."""
    while time.monotonic() + every_s < until_s:
        await asyncio.sleep(every_s)
        replica = f"r{len(kills) % replicas}"
        with contextlib.suppress(OSError, KeyError, json.JSONDecodeError):
            state = engines.state_of(served, replica)
            os.kill(int(state.get("engine_pid") or state["pid"]), signal.SIGKILL)
            kills.append(replica)


def zipf(count: int, exponent: float) -> np.ndarray:
    """Cumulative weights of ranks 1 to `count`."""
    return np.cumsum(1 / np.arange(1, count + 1) ** exponent)


def quantiles(times_ms: list[float]) -> str:
    """p50, p90, p99 in ms."""
    if not times_ms:
        return "none"
    p50, p90, p99 = np.percentile(times_ms, [50, 90, 99])
    return f"p50 {p50:.0f} ms, p90 {p90:.0f} ms, p99 {p99:.0f} ms, max {max(times_ms):.0f} ms ({len(times_ms)})"


def fairness(tally: Tally) -> str:
    """Jain's index over the mean TTFT of adapters asked for at least three times, and the worst of them."""
    means = np.array([np.mean(times) for times in tally.by_name.values() if len(times) >= 3])
    if not len(means):
        return "too few requests"
    index = means.sum() ** 2 / (len(means) * (means**2).sum())
    return (
        f"Jain {index:.2f} over {len(means)} adapters; mean TTFT worst {means.max():.0f} ms, "
        f"median {np.median(means):.0f} ms"
    )


async def alone(served: Gateway, name: str, max_tokens: int) -> str:
    """What an adapter answers while nothing else runs."""
    async with httpx2.AsyncClient(base_url=served.url, timeout=180, trust_env=False) as client:
        status, text, _, _ = await ask(client, name, max_tokens)
    assert status == 200, text
    return text


async def drive(
    served: Gateway, names: list[str], args: argparse.Namespace, replicas: int, own: dict[str, str]
) -> tuple[Tally, list[float]]:
    """Run the load; what it met, and the base's TTFTs."""
    tally = Tally(own=own)
    base_ms: list[float] = []
    until_s = time.monotonic() + args.seconds
    weights = zipf(len(names), args.exponent)
    jobs = [
        client_loop(served, names, weights, until_s, tally, seed, args.max_tokens, args.gap_s)
        for seed in range(args.clients)
    ]
    jobs.append(base_loop(served, until_s, base_ms, tally.errors if not args.kill_every_s else tally.retried))
    kills: list[str] = []
    if args.kill_every_s:
        jobs.append(kill_loop(served, replicas, until_s, args.kill_every_s, kills))
    await asyncio.gather(*jobs)
    print(f"engines killed: {len(kills)}")
    return tally, base_ms


def report(tally: Tally, base_ms: list[float], served: Gateway, seconds: float) -> bool:
    """Print what was seen; whether all is well."""
    done = len(tally.warm_ms) + len(tally.cold_ms)
    wrong = [name for name, texts in tally.answers.items() if texts != {tally.own[name]}]
    alike = f"{len(set(tally.own.values()))} different answers of {len(tally.own)} adapters"
    with served.client() as client:
        shown = client.get("/admin/residency").json()
        page = client.get("/metrics").text
    loads = sum(replica["loads"] for replica in shown["replicas"])
    load_s = sum(replica["load_seconds"] for replica in shown["replicas"])
    print(f"requests: {done} in {seconds:.0f} s over {len(tally.by_name)} adapters, errors "
          f"{sum(tally.errors.values())}, "
          f"tried again {sum(tally.retried.values())}")  # fmt: skip
    print(f"hit rate: {len(tally.warm_ms) / max(1, done):.3f}; loads {loads} ({load_s / max(1, loads):.2f} s each), "
          f"evictions {sum(replica['evictions'] for replica in shown['replicas'])}")  # fmt: skip
    asked, missed = (counted(page, f"tunegate_adapter_{what}_total") for what in ("requests", "misses"))
    print(f"by /metrics, since the start: {asked:.0f} requests, {missed:.0f} misses")
    print(f"TTFT warm: {quantiles(tally.warm_ms)}")
    print(f"TTFT cold: {quantiles(tally.cold_ms)}")
    print(f"TTFT of the base meanwhile: {quantiles(base_ms)}")
    print(f"fairness: {fairness(tally)}")
    print(f"adapters with an answer that is not their own: {len(wrong)} {wrong[:5]}; {alike}")
    print(f"at the end: {shown['summary'][:400]}")
    for kinds, title in ((tally.errors, "error"), (tally.retried, "tried again")):
        for kind, count in kinds.most_common(5):
            print(f"{title} x{count}: {kind}")
    return not tally.errors and not wrong


def counted(page: str, metric: str) -> float:
    """The sum of a counter's samples."""
    lines = [line for line in page.splitlines() if line.startswith((f"{metric} ", f"{metric}{{"))]
    return sum(float(line.rpartition(" ")[2]) for line in lines)


def real(args: argparse.Namespace) -> bool:
    """200 adapters over 4 places on a real engine."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path.home() / ".tunegate" / "models" / "demo"
        shapes = Shapes.of(path)
        flags = ("--backend", args.engine, "--device", "cpu", "--dtype", "float32", "--max-model-len", "512")
        slots = ("--max-adapters", str(args.places), "--adapter-slots", str(args.places), "--max-adapter-rank", "8")
        with gateway(
            *flags, *slots, "--adapter-wait-s", "120", state=Path(folder) / "state", ready_timeout_s=300
        ) as served:
            started, own = time.monotonic(), {}
            for number in range(args.adapters):
                adapter = Adapter(rank=2, seed=number, b_scale=0.6, targets=("q_proj", "v_proj"))
                directory = write_adapter(Path(folder) / f"a{number}", shapes, adapter)
                engines.upload(served, f"m{number:03d}", directory)
                own[f"m{number:03d}"] = asyncio.run(alone(served, f"m{number:03d}", args.max_tokens))
            took_s = time.monotonic() - started
            print(f"uploaded and asked {len(own)} adapters: {took_s / len(own):.2f} s each", flush=True)
            tally, base_ms = asyncio.run(drive(served, list(own), args, 1, own))
            return report(tally, base_ms, served, args.seconds)


def emulated(args: argparse.Namespace) -> bool:
    """Thousands of adapters over emulators that are killed."""
    with tempfile.TemporaryDirectory() as folder:
        state = Path(folder) / "state"
        names = fill(state, args.adapters)
        own = {name: spoken(state, name, args.max_tokens) for name in names}
        base = engines.checkpoint(Path(folder) / "base")
        flags = ("--model", str(base), "--engine-version", "emulator", "--device", "cpu")
        size = ("--replicas", str(args.replicas), "--max-adapters", str(args.places))
        with gateway(*flags, *size, state=state, ready_timeout_s=120) as served:
            tally, base_ms = asyncio.run(drive(served, names, args, args.replicas, own))
            good = report(tally, base_ms, served, args.seconds)
            return good and settled(served)


def settled(served: Gateway, timeout_s: float = 60) -> bool:
    """Whether control comes to know each replica as the engine itself lists it."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        replicas = served.replicas()
        if all(replica["state"] == "ready" and agrees(served, replica) for replica in replicas):
            print(f"converged: {len(replicas)} replicas ready, each lists what control knows of it")
            return True
        time.sleep(0.5)
    print(f"did not converge: {replicas}")
    return False


def agrees(served: Gateway, replica: dict[str, object]) -> bool:
    """Whether the engine lists what control shows as ready there, and nothing else."""
    state = engines.state_of(served, str(replica["id"]))
    headers = {"authorization": f"Bearer {state['api_key']}"}
    try:
        answer = httpx2.get(f"http://127.0.0.1:{state['port']}/v1/models", headers=headers, trust_env=False)
    except httpx2.HTTPError:
        return False
    listed = {card["id"] for card in answer.json()["data"] if card.get("parent")}
    known = replica["adapters"]
    assert isinstance(known, list)
    return listed == {one["id"] for one in known if one["state"] == "ready"} and len(known) == len(listed)


def main() -> None:
    """Print the figures; status 1 when anything was lost or mixed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", choices=["vllm", "sglang"], default="vllm")
    parser.add_argument("--emulators", action="store_true")
    parser.add_argument("--adapters", type=int)
    parser.add_argument("--places", type=int, help="adapters that one replica holds (--max-adapters)")
    parser.add_argument("--replicas", type=int, default=8)
    parser.add_argument("--clients", type=int)
    parser.add_argument("--seconds", type=float, default=90)
    parser.add_argument("--exponent", type=float, default=1.0, help="of Zipf's law")
    parser.add_argument("--max-tokens", type=int)
    parser.add_argument("--gap-s", type=float, default=0.0, help="mean pause of a client between two requests")
    parser.add_argument("--kill-every-s", type=float)
    args = parser.parse_args()
    args.adapters = args.adapters or (5000 if args.emulators else 200)
    args.places = args.places or (64 if args.emulators else 4)
    args.clients = args.clients or (32 if args.emulators else 8)
    args.max_tokens = args.max_tokens or (12 if args.emulators else 6)
    if args.kill_every_s is None:
        args.kill_every_s = 10.0 if args.emulators else 0.0
    sys.exit(0 if (emulated(args) if args.emulators else real(args)) else 1)


if __name__ == "__main__":
    main()
