"""A stream outlives its engine: the client sees one answer, the same as if nothing had happened."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from emulated import Emulated
from relay_harness import Relay, replica, until
from scripted_upstream import DONE, END, STREAM_HEAD, Close, Hang, answer, chunk, event, token

from gateway.snapshot import Model

QUESTION = [{"role": "user", "content": "a long story"}]
CHAT: dict[str, Any] = {"messages": QUESTION, "max_tokens": 30, "temperature": 0}
COMPLETION: dict[str, Any] = {"prompt": "Once upon a time", "max_tokens": 30, "temperature": 0}


async def pair(relay: Relay, kind: str = "vllm", engines: int = 2) -> list[Emulated]:
    made = [Emulated(kind, f"r{index}", index) for index in range(engines)]
    for engine in made:
        await engine.start()
        relay.upstreams.append(engine)  # type: ignore[arg-type]  # closed with the relay
    relay.serve(*(engine.replica for engine in made))
    return made


async def streamed(relay: Relay, members: dict[str, Any]) -> list[Any]:
    path = "/v1/completions" if "prompt" in members else "/v1/chat/completions"
    async with relay.connected() as client:
        body = {"model": "demo", "stream": True, "stream_options": {"include_usage": True}, **members}
        client.send("POST", path, json.dumps(body).encode())
        return (await client.answer()).events


def text(events: list[Any]) -> str:
    choices = [choice for event in events[:-1] for choice in event["choices"]]
    return "".join(
        (choice["delta"].get("content") or "") if "delta" in choice else choice["text"] for choice in choices
    )


@pytest.mark.parametrize("members", [CHAT, COMPLETION], ids=["chat", "completion"])
@pytest.mark.parametrize("fault", ["stream_reset", "stream_close", "stream_truncate", "stream_error"])
@pytest.mark.parametrize("kind", ["vllm", "sglang", "lmdeploy"])
async def test_the_same_text_as_without_the_failure(
    relay: Relay, kind: str, fault: str, members: dict[str, Any]
) -> None:
    engines = await pair(relay, kind)
    whole = await streamed(relay, members)
    for engine in engines:
        engine.fault(fault, after_chunks=3, times=1)
    joined = await streamed(relay, members)
    assert text(joined) == text(whole)
    assert joined[-1] == "[DONE]"
    chunks = joined[:-1]
    assert {chunk["id"] for chunk in chunks} == {chunks[0]["id"]}
    assert {(chunk["created"], chunk["model"]) for chunk in chunks} == {(chunks[0]["created"], "demo")}
    assert chunks[-1]["usage"] == whole[-2]["usage"]
    assert chunks[-2]["choices"][0]["finish_reason"] == whole[-3]["choices"][0]["finish_reason"]
    if kind != "lmdeploy":  # which names the role in each chunk
        assert sum("role" in choice.get("delta", {}) for chunk in chunks for choice in chunk["choices"]) <= 1
    await until(lambda: len(relay.entries) == 2)
    entry = relay.entries[1]
    assert (entry.status, entry.outcome) == (200, "ok")
    assert entry.completion_tokens == relay.entries[0].completion_tokens
    assert relay.in_flight() == 0
    assert relay.counted("tunegate_stream_continuations") == {("continued",): 1}


async def test_more_than_once(relay: Relay) -> None:
    engines = await pair(relay, engines=3)
    asks = CHAT | {"stream_options": None}  # without usage nobody is asked for the prompt's tokens
    whole = text(await streamed(relay, asks))
    for engine in engines:
        engine.fault("stream_reset", after_chunks=6, times=1)
    assert text(await streamed(relay, asks)) == whole
    assert relay.counted("tunegate_stream_continuations") == {("continued",): 3}


async def test_on_the_same_replica_once_it_is_back(relay: Relay) -> None:
    [engine] = await pair(relay, engines=1)
    whole = text(await streamed(relay, CHAT))
    engine.fault("stream_reset", after_chunks=6, times=1)
    asking = asyncio.create_task(streamed(relay, CHAT))
    await until(lambda: relay.counted("tunegate_upstream_errors"))
    assert relay.in_flight() == 0  # while it waits it holds nothing
    relay.seconds(1)
    assert text(await asking) == whole
    assert relay.counted("tunegate_stream_continuations") == {("continued",): 1}


async def test_it_does_not_wait_for_ever(relay: Relay, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.relay.continuing.RESUME_WITHIN_S", 0.05)
    await relay.engine([STREAM_HEAD, chunk(token("one")), Close()])
    asking = asyncio.create_task(relay.ask(stream=True))
    await until(lambda: relay.counted("tunegate_upstream_errors"))
    await relay.upstreams[0].close()
    await asyncio.sleep(0.06)
    relay.seconds(1)
    got = await asking
    assert "was lost while it answered" in got.events[-1]["error"]["message"]
    assert (await relay.settled()).outcome == "engine_error"
    assert relay.counted("tunegate_stream_continuations") == {("failed",): 1}


async def test_an_engine_that_cannot_go_on(relay: Relay) -> None:
    """Some chat templates refuse to leave an answer open."""
    first = await relay.engine([STREAM_HEAD, chunk(token("one")), Close()], serve=False)
    second = await relay.engine([answer(b'{"error":{"message":"cannot continue"}}', "400 Bad Request")], serve=False)
    relay.serve(replica(first, "r0", 0))
    asking = asyncio.create_task(relay.ask(stream=True))
    await until(lambda: relay.counted("tunegate_upstream_errors"))
    relay.serve(replica(second, "r1", 1))
    relay.seconds(1)
    got = await asking
    message = got.events[-1]["error"]["message"]
    assert message.startswith("The connection to the engine was lost while it answered")
    assert message.endswith("not continued: another replica refused to: cannot continue.")
    assert (await second.request()).json["continue_final_message"] is True
    assert (await relay.settled()).status == 502


async def test_not_by_another_adapter_of_the_same_name(relay: Relay, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.relay.continuing.RESUME_WITHIN_S", 0.05)
    first = await relay.engine([STREAM_HEAD, chunk(token("one", "a-1")), Close()], serve=False)
    second = await relay.engine([STREAM_HEAD, chunk(token("two", "a-2")), chunk(DONE)], serve=False)
    r0, r1 = replica(first, "r0", 0), replica(second, "r1", 1)
    relay.serve(r0, r1, models={"demo": Model("demo", "base", "a-1", {"r0": "a-1"}, "")})
    asking = asyncio.create_task(relay.ask(stream=True))
    await until(lambda: relay.counted("tunegate_upstream_errors"))
    relay.serve(r0, r1, models={"demo": Model("demo", "base", "a-2", {"r1": "a-2"}, "")})
    await asyncio.sleep(0.06)
    relay.seconds(1)
    assert "error" in (await asking).events[-1]
    assert second.seen == []


async def test_client_gone_while_it_waits_for_a_replica(relay: Relay) -> None:
    await relay.engine([STREAM_HEAD, chunk(token("one")), Close()], [Hang()])
    async with relay.connected() as client:
        client.chat(stream=True)
        await client.head()
        await client.piece()
        await until(lambda: relay.counted("tunegate_upstream_errors"))
    entry = await relay.settled()
    assert (entry.status, entry.outcome, entry.completion_tokens) == (499, "client_gone", 1)


async def test_only_the_end_was_missing(relay: Relay) -> None:
    """The client knows how the answer ended: nobody has to be asked."""
    end = event(id="c", created=1, model="demo", choices=[{"index": 0, "delta": {}, "finish_reason": "stop"}])
    await relay.engine([STREAM_HEAD, chunk(token("one")), chunk(end), Close()])
    got = await relay.ask(stream=True)
    assert got.events[-1] == "[DONE]"
    assert (await relay.settled()).outcome == "ok"


async def test_another_text_is_not_passed_off_as_the_same(relay: Relay) -> None:
    await relay.engine(
        [STREAM_HEAD, chunk(token("one")), chunk(token("\n")), Close()],
        [STREAM_HEAD, chunk(token("two")), chunk(DONE)],
    )
    asking = asyncio.create_task(relay.ask(stream=True, temperature=0))
    await until(lambda: relay.counted("tunegate_upstream_errors"))
    relay.seconds(1)
    assert "said something else" in (await asking).events[-1]["error"]["message"]
    assert (await relay.settled()).status == 502
    assert relay.in_flight() == 0


async def test_no_chunk_was_sent_yet(relay: Relay) -> None:
    await relay.engine([STREAM_HEAD, chunk(b": hello\n\n"), Close()], [STREAM_HEAD, chunk(token("one") + DONE), END])
    asking = asyncio.create_task(relay.ask(stream=True))
    await until(lambda: relay.counted("tunegate_upstream_errors"))
    relay.seconds(1)
    assert (await asking).body.endswith(token("one") + DONE)
