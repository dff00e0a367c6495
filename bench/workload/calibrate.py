"""Asking the server, before any load, what it accepts and how many tokens its template and our words make."""

from __future__ import annotations

import secrets
from typing import Any

import msgspec

from bench.wire.http import Endpoint
from bench.wire.simple import Answer, call
from bench.wire.sse import decode_stream
from bench.workload.bodies import PATHS, Asking, Dialect, body
from bench.workload.words import Tokenization, common_words, text

_SHORT_WORDS, _LONG_WORDS = 16, 80
_ENOUGH_WORDS = 64


class ServerError(Exception):
    """The server under test does not do what any load needs."""


class Server(msgspec.Struct, frozen=True):
    """Where to ask, and what to say at the door."""

    endpoint: Endpoint
    headers: dict[str, str]

    def post(self, path: str, payload: Any, timeout_s: float = 300.0) -> Answer:
        """POST JSON. Raises OSError."""
        return call(self.endpoint, "POST", path, self.headers, msgspec.json.encode(payload), timeout_s)

    def get(self, path: str, timeout_s: float = 10.0) -> Answer:
        """GET a path. Raises OSError."""
        return call(self.endpoint, "GET", path, self.headers, timeout_s=timeout_s)


def served_model(server: Server) -> str:
    """The first model the server lists. Raises ServerError."""
    answer = server.get("/v1/models")
    listed = answer.json() if answer.ok else None
    names = [item["id"] for item in (listed or {}).get("data", []) if "id" in item]
    if not names:
        raise ServerError(f"{server.endpoint.url}/v1/models lists no model ({answer.status}); name one by --model")
    return str(names[0])


def find_dialect(server: Server, asking: Asking, model: str) -> Dialect:
    """The richest dialect that the server answers with 200. Raises ServerError with the server's own words."""
    key = "max_tokens"
    for usage, per_chunk, ignore_eos in (
        (True, True, True),
        (True, False, True),
        (True, True, False),
        (True, False, False),
        (False, False, False),
    ):
        for _ in range(2):
            dialect = Dialect(usage, per_chunk, ignore_eos, key)
            answer = _try(server, msgspec.structs.replace(asking, dialect=dialect), model)
            if answer.ok:
                return _as_answered(dialect, answer)
            if b"max_completion_tokens" not in answer.body or key == "max_completion_tokens":
                break
            key = "max_completion_tokens"
        if answer.status not in (400, 422):
            break
    raise ServerError(
        f"{server.endpoint.url} answered {answer.status} to a plain request for model {model!r}: "
        f"{answer.body[:300].decode('utf-8', 'replace')}"
    )


def _try(server: Server, asking: Asking, model: str) -> Answer:
    sent = body(asking, model, [{"role": "user", "content": f"Say hello {secrets.token_hex(4)}."}], 4)
    return call(server.endpoint, "POST", PATHS[asking.api], server.headers, sent, 300)


def _as_answered(dialect: Dialect, answer: Answer) -> Dialect:
    """Accepting an option is not honouring it: keep what the stream shows."""
    stream = decode_stream([(0, answer.body)], 0)
    stated = sum(tokens >= 0 for tokens in stream.events.tokens)
    return msgspec.structs.replace(
        dialect, usage=dialect.usage and stated > 0, usage_per_chunk=dialect.usage_per_chunk and stated > 1
    )


def find_tokenization(server: Server, asking: Asking, model: str) -> Tokenization:
    """Words of one token each by the server's own tokenizer, and the overhead by its own usage. Raises ServerError."""
    words, checked = _single_token_words(server, model)
    counts = {count: _prompt_tokens(server, asking, model, words, count) for count in (_SHORT_WORDS, _LONG_WORDS)}
    short, long = counts[_SHORT_WORDS], counts[_LONG_WORDS]
    if short is None or long is None:
        return Tokenization(words, source="tokenize" if checked else "assumed")
    per_word = (long - short) / (_LONG_WORDS - _SHORT_WORDS)
    if per_word <= 0:
        return Tokenization(words)
    return Tokenization(words, per_word, round(short - _SHORT_WORDS * per_word), "tokenize" if checked else "usage")


def _prompt_tokens(server: Server, asking: Asking, model: str, words: tuple[str, ...], count: int) -> int | None:
    asked = [{"role": "user", "content": text(words, count, secrets.randbits(32))}]
    sent = body(asking, model, asked, 1, stream=False)
    answer = call(server.endpoint, "POST", PATHS[asking.api], server.headers, sent, 300)
    if not answer.ok:
        raise ServerError(f"{server.endpoint.url} answered {answer.status}: {answer.body[:300]!r}")
    usage = (answer.json() or {}).get("usage") or {}
    tokens = usage.get("prompt_tokens")
    return None if tokens is None else int(tokens)


def count_tokens(server: Server, model: str, prompt: str) -> int | None:
    """How many tokens the server's tokenizer makes of a text, or None where it has no /tokenize."""
    answer = server.post("/tokenize", {"model": model, "prompt": prompt, "add_special_tokens": False})
    count = (answer.json() or {}).get("count") if answer.ok else None
    return int(count) if isinstance(count, int) else None


def _single_token_words(server: Server, model: str) -> tuple[tuple[str, ...], bool]:
    """(the common words that are one token inside a text, whether the server's tokenizer said so)."""
    words = common_words()
    if count_tokens(server, model, "a") is None:
        return words, False
    kept: list[str] = []
    _keep_single(server, model, list(words), kept)
    return (tuple(kept), True) if len(kept) >= _ENOUGH_WORDS else (words, False)


def _keep_single(server: Server, model: str, words: list[str], kept: list[str]) -> None:
    """Bisect until there are enough: a group whose count is its number of words needs no look inside."""
    if len(kept) >= _ENOUGH_WORDS:
        return
    # a leading anchor makes every word one that follows a space
    if count_tokens(server, model, " ".join(["a", *words])) == len(words) + 1:
        kept += words
    elif len(words) > 1:
        middle = len(words) // 2
        _keep_single(server, model, words[:middle], kept)
        _keep_single(server, model, words[middle:], kept)
