"""What a test can make an emulator do: how fast it is, what it says, and how it fails.

Given as JSON in the environment variable TUNEGATE_EMULATOR, or put over the running one with
`POST /emulator/script`: the body is a whole script, and what it does not name returns to its default.
"""

from __future__ import annotations

import os
from typing import Literal

import msgspec

ENVIRONMENT_VARIABLE = "TUNEGATE_EMULATOR"

Where = Literal["any", "inference", "load", "unload", "models", "health", "metrics", "tokenize", "embeddings"]
Kind = Literal[
    # before the answer's head
    "status",  # answer `status` with the engine's error body
    "delay",  # wait `delay_ms`, then answer as usual
    "hang",  # never answer
    "reset",  # TCP reset
    "close",  # close the connection without a byte
    "garbage",  # bytes that are not HTTP
    "die",  # the process exits at once
    # within a stream, after `after_chunks` events
    "stream_delay",  # wait `delay_ms`, then go on
    "stream_hang",
    "stream_reset",
    "stream_close",  # close the connection, the body unfinished
    "stream_truncate",  # end the body properly, without the final event and [DONE]
    "stream_garbage",  # an event that is not JSON, then go on
    "stream_error",  # the engine's in-band error, then its end
    "stream_die",
    # for adapters
    "lie",  # say that it worked, do nothing
    "ignore",  # of a load: list the adapter, and answer as the base
]
StartFailure = Literal["cuda_oom", "no_model", "exit"]


class Fault(msgspec.Struct, forbid_unknown_fields=True):
    """One thing going wrong with some requests."""

    kind: Kind
    on: Where = "inference"
    model: str | None = None  # only requests with this `model`; None: any
    skip: int = 0  # matching requests to let pass first
    times: int | None = 1  # matching requests to hit; None: all
    after_chunks: int = 1  # events sent before a `stream_...` fault
    status: int = 503
    delay_ms: float = 0


class Script(msgspec.Struct, forbid_unknown_fields=True):
    """How an emulator behaves."""

    # at start, from the environment only
    startup_s: float = 0  # before the port opens
    start_failure: StartFailure | None = None  # print what the real engine prints and exit

    # speed
    ttft_ms: float = 0
    inter_token_ms: float = 0  # a token; a chunk of many tokens takes as many times this
    tokens_per_chunk: int = 1
    load_ms: float = 0
    unload_ms: float = 0
    health_ms: float | None = None  # None: as the engine, which for SGLang is a second
    health_lag_s: float = 12  # LMDeploy's /health finds a dead engine so much later

    # output
    answer: str | None = None  # said instead of the model's own text
    answer_tokens: int | None = None  # a natural end after exactly so many tokens of the model's own text
    call_tools: bool = False  # call the first tool when the choice is the model's
    tool_arguments: str | None = None  # as they are, instead of the smallest valid ones

    faults: list[Fault] = []


class ScriptError(Exception):
    """A script that cannot be used; the message says where and why."""


def decode(data: bytes) -> Script:
    """Read a script. Raises ScriptError for an unknown key or a wrong type."""
    try:
        return msgspec.json.decode(data, type=Script)
    except msgspec.DecodeError as error:
        raise ScriptError(f"not an emulator script: {error}") from error


def from_environment() -> Script:
    """The script of the environment variable; the default one where it is unset. Raises ScriptError."""
    return decode(os.environ.get(ENVIRONMENT_VARIABLE, "").encode() or b"{}")


def hit(script: Script, where: Where, model: str | None) -> Fault | None:
    """The first fault that this request meets; counts it down."""
    for fault in script.faults:
        if fault.on not in (where, "any") or fault.model not in (None, model) or fault.times == 0:
            continue
        if fault.skip > 0:
            fault.skip -= 1
            continue
        if fault.times is not None:
            fault.times -= 1
        return fault
    return None
