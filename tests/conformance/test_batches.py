"""Batches by the official client: answered in full, refused by line, cancelled, and gone on with after a restart."""

from __future__ import annotations

import json
import os
import signal
from typing import Any

import openai
import pytest

from tests.conformance.conftest import ENGINES
from tests.conformance.target import RealTarget, Target
from tests.support.wait import eventually

# Nothing of it depends on the engine.
pytestmark = pytest.mark.parametrize("served", ENGINES[:1], indirect=True)

_OVER = ("completed", "failed", "cancelled", "expired")
_URL = "/v1/chat/completions"


def line(custom_id: str, model: str, **fields: Any) -> dict[str, Any]:
    body = {"model": model, "messages": [{"role": "user", "content": custom_id}], "max_tokens": 4}
    return {"custom_id": custom_id, "method": "POST", "url": _URL, "body": body} | fields


def create(client: openai.OpenAI, lines: list[Any]) -> Any:
    contents = "".join((one if isinstance(one, str) else json.dumps(one)) + "\n" for one in lines).encode()
    file = client.files.create(file=("in.jsonl", contents), purpose="batch")
    return client.batches.create(input_file_id=file.id, endpoint=_URL, completion_window="24h", metadata={"a": "b"})


def over(client: openai.OpenAI, id: str) -> Any:
    return eventually(
        lambda: batch if (batch := client.batches.retrieve(id)).status in _OVER else None, 30, every_s=0.1
    )


def answers(client: openai.OpenAI, file_id: str) -> dict[str, Any]:
    rows = [json.loads(row) for row in client.files.content(file_id).text.splitlines()]
    assert len({row["custom_id"] for row in rows}) == len(rows)
    return {row["custom_id"]: row["response"] for row in rows}


def test_life_of_a_batch(client: openai.OpenAI, target: Target) -> None:
    batch = create(client, [line(f"q{i}", "nobody" if i == 3 else target.model) for i in range(20)])
    assert (batch.object, batch.status, batch.metadata) == ("batch", "validating", {"a": "b"})
    done = over(client, batch.id)
    assert done.status == "completed", done.errors
    counts = done.request_counts
    assert (counts.total, counts.completed, counts.failed) == (20, 19, 1)
    good, bad = answers(client, done.output_file_id), answers(client, done.error_file_id)
    assert set(good) == {f"q{i}" for i in range(20) if i != 3}
    assert all(one["body"]["choices"][0]["message"]["content"] for one in good.values())
    assert bad["q3"]["status_code"] == 404 and bad["q3"]["body"]["error"]["code"] == "model_not_found"
    assert client.batches.list(limit=1).data[0].id == batch.id
    with pytest.raises(openai.ConflictError):
        client.batches.cancel(batch.id)


def test_bad_lines_fail_the_batch(client: openai.OpenAI, target: Target) -> None:
    rows = [
        line("a", target.model),
        line("a", target.model),
        "nonsense",
        line("b", target.model, url="/v1/embeddings"),
        line("c", target.model, method="GET"),
        line("d", target.model, body={"model": target.model, "stream": True}),
    ]
    failed = over(client, create(client, rows).id)
    assert failed.status == "failed" and failed.output_file_id is None
    found = [(error.line, error.code) for error in failed.errors.data]
    assert found == [
        (2, "duplicate_custom_id"),
        (3, "invalid_json_line"),
        (4, "invalid_url"),
        (5, "invalid_method"),
        (6, "invalid_request"),
    ]


def test_batches_that_are_refused(client: openai.OpenAI) -> None:
    other = client.files.create(file=("in.jsonl", b"{}"), purpose="fine-tune").id
    for fields in (
        {"input_file_id": other},
        {"input_file_id": "file-none"},
        {"completion_window": "1h"},
        {"endpoint": "/v1/other"},
    ):
        whole: Any = {"input_file_id": other, "endpoint": _URL, "completion_window": "24h"} | fields
        with pytest.raises((openai.BadRequestError, openai.NotFoundError)):
            client.batches.create(**whole)


def test_cancelled_keeps_what_was_answered(client: openai.OpenAI, target: Target) -> None:
    target.script(ttft_ms=400)
    batch = create(client, [line(f"q{i}", target.model) for i in range(400)])
    eventually(lambda: client.batches.retrieve(batch.id).request_counts.completed >= 16, 20, every_s=0.1)
    assert client.batches.cancel(batch.id).status == "cancelling"
    cancelled = over(client, batch.id)
    assert cancelled.status == "cancelled" and cancelled.cancelled_at
    assert len(answers(client, cancelled.output_file_id)) == cancelled.request_counts.completed < 400


def test_a_batch_outlives_control(client: openai.OpenAI, target: Target) -> None:
    if isinstance(target, RealTarget):
        pytest.skip("kills a process of the gateway")
    target.script(ttft_ms=100)
    batch = create(client, [line(f"q{i}", target.model) for i in range(120)])
    eventually(lambda: client.batches.retrieve(batch.id).request_counts.completed >= 16, 20, every_s=0.1)
    (control,) = target.gateway.children("gateway.control")
    os.kill(control, signal.SIGKILL)

    def back() -> bool:
        try:
            return client.batches.retrieve(batch.id).id == batch.id
        except openai.InternalServerError:
            return False

    eventually(back, 30)
    done = over(client, batch.id)
    assert done.status == "completed" and done.request_counts.completed == 120
    assert len(answers(client, done.output_file_id)) == 120
