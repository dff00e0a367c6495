"""`python -m tests.proofs.continuation`: engines are killed in the middle of greedy streams, and nobody notices.

Each prompt is first answered in peace, streamed, as chat and as completion. Then each is asked again and the replica
that answers is killed with SIGKILL after some chunks. Text, finish reason and token counts must be the same, with
one id throughout. Where a text differs, it shows where: tokens that were nearly tied may fall the other way.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import os
import signal
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import openai

from gateway import models
from tests.support.engines import checkpoint, state_of
from tests.support.gateway import Gateway, gateway
from tests.support.wait import eventually

PROMPTS = ("What is gravity?", "Name three colours.", "Tell me about the sea.", "How do plants grow?")
KINDS = ("chat", "completion")
_KILL_AFTER = (1, 5, 12, 20)  # chunks


@dataclass
class Told:
    """One streamed answer."""

    text: str = ""
    reason: str | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    ids: set[str] = field(default_factory=set)
    longest_gap_s: float = 0.0
    killed: tuple[str, int] | None = None  # replica, process


def stream(running: Gateway, kind: str, prompt: str, tokens: int) -> Iterator[tuple[str, Any]]:
    """The chunks of an answer: its text piece by piece, and each chunk itself."""
    client = openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0)
    options: dict[str, Any] = {
        "model": running.model,
        "max_tokens": tokens,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    if kind == "chat":
        for chunk in client.chat.completions.create(messages=[{"role": "user", "content": prompt}], **options):
            yield "".join(choice.delta.content or "" for choice in chunk.choices), chunk
    else:
        for chunk in client.completions.create(prompt=prompt, **options):
            yield "".join(choice.text for choice in chunk.choices), chunk


def listen(running: Gateway, told: Told, kind: str, prompt: str, tokens: int, kill_after: int | None) -> Told:
    """Read an answer to its end into `told`; with `kill_after`, kill who writes it after so many chunks with text."""
    pieces, last_s = 0, time.monotonic()
    for text, chunk in stream(running, kind, prompt, tokens):
        now_s = time.monotonic()
        told.longest_gap_s, last_s = max(told.longest_gap_s, now_s - last_s if pieces else 0.0), now_s
        told.ids.add(chunk.id)
        told.text += text
        for choice in chunk.choices:
            told.reason = choice.finish_reason or told.reason
        if chunk.usage is not None:
            told.prompt_tokens, told.completion_tokens = chunk.usage.prompt_tokens, chunk.usage.completion_tokens
        pieces += bool(text)
        if kill_after is not None and pieces == kill_after:
            kill_after = None
            replica = busy(running)
            told.killed = replica, state_of(running, replica)["engine_pid"]
            os.kill(told.killed[1], signal.SIGKILL)
    return told


def busy(running: Gateway) -> str:
    """The replica that has a request in flight."""
    with running.client() as client:
        page = client.get("/metrics").text
    lines = [line for line in page.splitlines() if line.startswith("tunegate_in_flight_requests{")]
    return next(line.split('replica="')[1].split('"')[0] for line in lines if float(line.rpartition(" ")[2]) > 0)


def recovered(running: Gateway, told: Told) -> bool:
    """Whether all replicas are ready, and what was killed runs again: the next kill is not to leave none."""
    if told.killed is not None and state_of(running, told.killed[0])["engine_pid"] == told.killed[1]:
        return False
    return all(replica["state"] == "ready" for replica in running.replicas())


def prove(running: Gateway, kinds: tuple[str, ...], prompts: tuple[str, ...], tokens: int) -> bool:
    """Compare; prints a line a stream. True if all are equal."""
    whole = {
        (kind, prompt): listen(running, Told(), kind, prompt, tokens, None) for kind in kinds for prompt in prompts
    }
    good, told = True, Told()
    for number, ((kind, prompt), expected) in enumerate(whole.items()):
        eventually(functools.partial(recovered, running, told), 300, 0.2)
        told = Told()
        kill_after = _KILL_AFTER[number % len(_KILL_AFTER)]
        try:
            listen(running, told, kind, prompt, tokens, kill_after)
        except openai.APIError as error:
            print(
                f"{kind:10} {prompt:24} killed after {kill_after:2} BROKE OFF: {error}\n  in peace: {expected.text!r}",
                flush=True,
            )
            good = False
            continue
        same = told.killed is not None and (told.text, told.reason, told.prompt_tokens, told.completion_tokens) == (
            expected.text, expected.reason, expected.prompt_tokens, expected.completion_tokens,
        )  # fmt: skip
        good = good and same and len(told.ids) == 1
        pairs = enumerate(zip(told.text, expected.text, strict=False))
        shared = next((place for place, (one, other) in pairs if one != other), len(told.text))
        print(
            f"{kind:10} {prompt:24} {'killed' if told.killed else 'OVER'} after {kill_after:2} "
            f"{'equal' if same else f'DIFFERS at character {shared} of {len(expected.text)}'}, "
            f"tokens {told.prompt_tokens}+{told.completion_tokens} "
            f"(in peace {expected.prompt_tokens}+{expected.completion_tokens}), "
            f"longest gap {told.longest_gap_s:.2f} s",
            flush=True,
        )
    with running.client() as client:
        page = client.get("/metrics").text
    print("\n".join(line for line in page.splitlines() if line.startswith("tunegate_stream_continuations_total{")))
    return good


def main() -> None:
    """Exit status 0 if every stream came out the same."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", default="vllm")
    parser.add_argument("--emulator", action="store_true", help="emulated engines instead of real ones on the CPU")
    parser.add_argument("--tokens", type=int, default=40)
    parser.add_argument("--prompts", type=int, default=len(PROMPTS), help="how many; each is asked in every way")
    parser.add_argument("--kind", dest="kinds", choices=KINDS, action="append", help="repeatable; default: both")
    args = parser.parse_args()
    with contextlib.ExitStack() as stack:
        if args.emulator:
            base = checkpoint(Path(stack.enter_context(tempfile.TemporaryDirectory())) / "base")
            flags = ["--engine-version", "emulator", "--device", "cuda"]
            environment = {"TUNEGATE_EMULATOR": '{"inter_token_ms": 30}'}
        else:
            environment = {}
            base, flags = models.resolve("demo"), ["--device", "cpu", "--dtype", "float32", "--max-model-len", "1024"]
        flags += ["--backend", args.backend, "--model", str(base), "--replicas", "2", "--adapter-slots", "0"]
        running = stack.enter_context(gateway(*flags, ready_timeout_s=300, env=environment))
        eventually(lambda: all(replica["state"] == "ready" for replica in running.replicas()), 300, 0.2)
        raise SystemExit(0 if prove(running, tuple(args.kinds or KINDS), PROMPTS[: args.prompts], args.tokens) else 1)


if __name__ == "__main__":
    main()
