"""What success is. A request that is none of the failures below succeeded; nothing else did."""

from __future__ import annotations

from bench.measure.record import DONE, ERROR, GENERATED, MALFORMED, RequestRecord

# cause -> what it means; the order is the order in which they are looked for
CAUSES = {
    "connect": "no connection could be made",
    "timeout": "no complete answer within the time limit",
    "unfinished": "still running when the run's drain time was over",
    "transport": "the connection broke or the answer was not HTTP",
    "http": "a status outside 2xx",
    "in-band error": "an error object inside a stream that began with 200",
    "malformed": "an event that is not a chunk of the OpenAI API, or an answer that is no event stream",
    "truncated": "the stream ended without a finish_reason or without [DONE]",
    "empty": "the stream ended well and carried no token",
    "short": "fewer tokens than asked, though the end-of-sequence token was to be ignored",
}


def failure(record: RequestRecord) -> str | None:
    """Why a request failed: a key of `CAUSES`, with the status for "http"; None when it succeeded."""
    seen = 0
    for flags in record.events.flags:
        seen |= flags
    if record.transport is not None and record.status is None:
        return _transport_cause(record.transport)
    if record.status is None or not 200 <= record.status < 300:
        return f"http {record.status}"
    if seen & ERROR:
        return "in-band error"
    if record.transport is not None:
        cause = _transport_cause(record.transport)
        return "truncated" if cause == "transport" else cause
    if seen & MALFORMED or (record.error is not None and not record.events.flags):
        return "malformed"
    if record.finish is None or not seen & DONE:
        return "truncated"
    if not seen & GENERATED and not record.output_tokens:
        return "empty"
    if record.output_exact and record.output_tokens is not None and record.output_tokens_asked is not None:
        return "short" if record.output_tokens < record.output_tokens_asked else None
    return None


def _transport_cause(transport: str) -> str:
    for cause in ("connect", "timeout", "unfinished"):
        if transport.startswith(cause):
            return cause
    return "transport"
