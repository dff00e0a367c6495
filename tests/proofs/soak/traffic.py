"""The clients of a soak. Each knows what the right answer is, and calls anything else wrong.

An emulator's text is a function of model, adapter and prompt, so every answer can be compared with one that was given
before anything went wrong. An error is right if it is one of OpenAI's shape and of a status that a failing engine may
cause; a stream that ends without `[DONE]` and without an error is wrong, whatever it said.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import time
from collections import Counter
from dataclasses import dataclass, field

PROMPTS = tuple(f"Tell me about number {i}, slowly." for i in range(6))
MAX_TOKENS = 24
ENGINES_FAULT = {429, 500, 502, 503, 504}
_ERROR_FIELDS = {"message", "type", "param", "code"}
_CLIENT_LIMIT_S = 100.0  # longer than anything may take here


class Wrong(Exception):
    """An answer that no client should get."""


@dataclass
class Expected:
    """What each model says to each prompt."""

    texts: dict[tuple[str, str], str] = field(default_factory=dict)  # (what answers: a name, or name and seed; prompt)
    churned: set[str] = field(default_factory=set)  # the texts' keys that the name `churn` may stand for just now

    def right(self, model: str, prompt: str, text: str, allowed: set[str]) -> bool:
        """Whether `text` is an answer. allowed: what `churn` stood for at any time within the request."""
        names = allowed | self.churned if model == "churn" else {model}
        return any(self.texts[name, prompt] == text for name in names)


@dataclass
class Tally:
    """What became of the requests."""

    outcomes: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return ", ".join(f"{name} {count:,}" for name, count in sorted(self.outcomes.items()))


@dataclass
class Client:
    """One request on one connection."""

    port: int
    key: str
    model: str
    prompt: str
    stream: bool

    async def ask(self, slow: bool = False, leave_after_s: float | None = None) -> tuple[int, str]:
        """(status, text). slow: read a little at a time. Raises Wrong, OSError, asyncio.IncompleteReadError."""
        body = json.dumps(
            {
                "model": self.model,
                "messages": [{"role": "user", "content": self.prompt}],
                "max_tokens": MAX_TOKENS,
                "temperature": 0,
                "stream": self.stream,
            }
        ).encode()
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port, limit=2**12 if slow else 2**16)
        try:
            writer.write(
                b"POST /v1/chat/completions HTTP/1.1\r\nhost: soak\r\nconnection: close\r\n"
                b"content-type: application/json\r\nauthorization: Bearer %b\r\ncontent-length: %d\r\n\r\n%b"
                % (self.key.encode(), len(body), body)
            )
            if leave_after_s is not None:
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(reader.read(), leave_after_s)
                writer.transport.abort()
                return 499, ""
            async with asyncio.timeout(_CLIENT_LIMIT_S):
                return await self._answer(reader, slow)
        except TimeoutError as error:
            raise Wrong(f"no answer within {_CLIENT_LIMIT_S} s") from error
        finally:
            writer.close()

    async def _answer(self, reader: asyncio.StreamReader, slow: bool) -> tuple[int, str]:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        status = int(head.split(" ", 2)[1])
        chunked = "transfer-encoding: chunked" in head.lower()
        body = b""
        if chunked:
            while size := int(await reader.readline(), 16):
                body += await reader.readexactly(size)
                await reader.readexactly(2)
                if slow:
                    await asyncio.sleep(0.05)
        else:
            body = await reader.read()
        if "text/event-stream" in head.lower():
            return status, _streamed(body)
        answer = json.loads(body)
        if status == 200:
            return status, str(answer["choices"][0]["message"]["content"])
        _check_error(answer)
        return status, ""


def _streamed(body: bytes) -> str:
    """The text of a stream. Raises Broken for one that an error ended, Wrong for one that nothing ended."""
    text = []
    for part in body.decode().split("\n\n"):
        data = "".join(line[6:] for line in part.split("\n") if line.startswith("data: "))
        if data == "[DONE]":
            return "".join(text)
        if data:
            event = json.loads(data)
            if "error" in event:
                _check_error(event)
                raise Broken
            if "usage" in event:
                raise Wrong("usage that nobody asked for")
            text += [choice["delta"].get("content") or "" for choice in event["choices"]]
    raise Wrong(f"a stream that nothing ended, after {len(text)} chunks")


class Broken(Exception):
    """A stream that ended with an error in it, as it should where an engine failed."""


def _check_error(answer: dict[str, object]) -> None:
    error = answer.get("error")
    if not isinstance(error, dict) or set(error) != _ERROR_FIELDS:
        raise Wrong(f"an error of no known shape: {answer}")


@dataclass
class Crowd:
    """Clients that go on asking until told to stop."""

    port: int
    key: str
    models: tuple[str, ...]
    expected: Expected
    tally: Tally
    seed: int
    relay_killed_s: float = 0.0  # monotonic; its connections break, and may
    going: bool = True

    async def one(self, number: int, pause_s: float) -> None:
        """One client: asks, checks, pauses."""
        rng = random.Random(self.seed * 1000 + number)
        while self.going:
            await asyncio.sleep(rng.expovariate(1 / pause_s))
            if self.going:
                await self._request(rng)

    async def _request(self, rng: random.Random) -> None:
        client = Client(self.port, self.key, rng.choice(self.models), rng.choice(PROMPTS), rng.random() < 0.6)
        slow = client.stream and rng.random() < 0.1
        leave_after_s = rng.uniform(0, 0.4) if rng.random() < 0.15 else None
        allowed = set(self.expected.churned)
        started_s = time.monotonic()
        try:
            status, text = await client.ask(slow, leave_after_s)
            self._judge(client, status, text, allowed)
        except Broken:
            self.tally.outcomes["error in the stream"] += 1
        except (OSError, asyncio.IncompleteReadError, ValueError) as error:
            if started_s - 1 <= self.relay_killed_s:
                self.tally.outcomes["relay killed"] += 1
            else:
                self._wrong(client, f"broke off: {error!r}")
        except Wrong as error:
            self._wrong(client, str(error))

    def _judge(self, client: Client, status: int, text: str, allowed: set[str]) -> None:
        if status == 499:
            self.tally.outcomes["left"] += 1
        elif status == 200:
            if not self.expected.right(client.model, client.prompt, text, allowed):
                raise Wrong(f"said {text!r}")
            self.tally.outcomes["right, streamed" if client.stream else "right"] += 1
        elif status in ENGINES_FAULT or (status == 404 and client.model == "churn"):
            self.tally.outcomes[f"error {status}"] += 1
        else:
            raise Wrong(f"status {status}")

    def _wrong(self, client: Client, what: str) -> None:
        self.tally.outcomes["WRONG"] += 1
        kind = "stream" if client.stream else "answer"
        self.tally.wrong.append(f"{time.strftime('%H:%M:%S', time.gmtime())} {client.model}, {kind}: {what[:300]}")
