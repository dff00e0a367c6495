"""From a finished exchange to a line of the record."""

from __future__ import annotations

from bench.load.job import Job
from bench.measure.record import GENERATED, RequestRecord
from bench.wire.connection import Exchange
from bench.wire.sse import Stream, decode_stream

KEPT_HEADERS = ("server", "x-request-id", "x-tunegate-model", "retry-after")
_ERROR_CHARS = 500


def to_record(job: Job, exchange: Exchange, origin_ns: int, worker: int) -> tuple[RequestRecord, str | None]:
    """(the record, the text). The record keeps the text only where no usage says how many tokens it is."""
    assert exchange.end_ns is not None
    record = RequestRecord(
        index=job.index,
        segment=job.segment,
        target=job.target,
        model=job.model,
        intended_ns=None if job.intended_ns is None else job.intended_ns - origin_ns,
        sent_ns=exchange.sent_ns - origin_ns,
        end_ns=exchange.end_ns - origin_ns,
        worker=worker,
        phase=job.phase,
        prompt_tokens_asked=job.prompt_tokens,
        output_tokens_asked=job.output_tokens,
        output_exact=job.output_exact,
        turn=job.turn,
        reused=exchange.reused,
        connect_ns=None if exchange.connected_ns is None else exchange.connected_ns - exchange.sent_ns,
        headers_ns=None if exchange.first_byte_ns is None else exchange.first_byte_ns - origin_ns,
        read_delay_ns=exchange.read_delay_ns,
        status=exchange.status,
        transport=exchange.fault,
        headers={name: exchange.headers[name] for name in KEPT_HEADERS if name in exchange.headers},
    )
    if exchange.headers.get("content-type", "").startswith("text/event-stream"):
        stream = decode_stream(exchange.pieces, origin_ns)
        _take_stream(record, stream)
        return record, stream.text
    if exchange.pieces:
        record.error = b"".join(piece for _, piece in exchange.pieces)[:_ERROR_CHARS].decode("utf-8", "replace")
    return record, None


def _take_stream(record: RequestRecord, stream: Stream) -> None:
    record.events = stream.events
    record.finish = stream.finish
    record.error = stream.error
    usage = stream.usage
    if usage is not None:
        record.prompt_tokens = usage.prompt_tokens
        record.output_tokens = usage.completion_tokens
        if usage.prompt_tokens_details is not None:
            record.cached_tokens = usage.prompt_tokens_details.cached_tokens
    if record.output_tokens is None and any(flags & GENERATED for flags in stream.events.flags):
        record.text = stream.text
