"""Streams: the chunks, the usage, the helper, and every way a stream can end."""

from __future__ import annotations

import threading
import time

import openai
import pytest
from openai.types.chat import ChatCompletionChunk

from tests.conformance.target import Target
from tests.support.wait import eventually

QUESTION = [{"role": "user", "content": "Tell me a story"}]


def text_of(chunks: list[ChatCompletionChunk]) -> str:
    return "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)


def test_chunks(target: Target, client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(model=target.model, messages=QUESTION, max_tokens=12, temperature=0)
    chunks = list(
        client.chat.completions.create(model=target.model, messages=QUESTION, max_tokens=12, temperature=0, stream=True)
    )
    assert text_of(chunks) == whole.choices[0].message.content
    assert len(chunks) > 3
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    assert len({(chunk.id, chunk.created, chunk.model) for chunk in chunks}) == 1
    assert chunks[0].model == target.model
    assert chunks[0].choices[0].delta.role == "assistant"
    reasons = [choice.finish_reason for chunk in chunks for choice in chunk.choices if choice.finish_reason]
    assert reasons == ["length"]


def test_no_usage_unless_asked_for(target: Target, client: openai.OpenAI) -> None:
    chunks = client.chat.completions.create(model=target.model, messages=QUESTION, max_tokens=4, stream=True)
    for chunk in chunks:
        assert chunk.usage is None
        assert chunk.choices


def test_usage_comes_last(target: Target, client: openai.OpenAI) -> None:
    chunks = list(
        client.chat.completions.create(
            model=target.model, messages=QUESTION, max_tokens=4, stream=True, stream_options={"include_usage": True}
        )
    )
    assert [chunk.usage for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert all(chunk.choices for chunk in chunks[:-1])
    assert chunks[-1].choices == []
    usage = chunks[-1].usage
    assert usage is not None
    assert usage.completion_tokens == 4
    assert usage.total_tokens == usage.prompt_tokens + 4


async def test_async_stream(target: Target) -> None:
    async with target.async_client() as client:
        stream = await client.chat.completions.create(
            model=target.model, messages=QUESTION, max_tokens=6, stream=True, stream_options={"include_usage": True}
        )
        chunks = [chunk async for chunk in stream]
    assert text_of(chunks)
    assert chunks[-1].usage is not None


def test_helper(target: Target, client: openai.OpenAI) -> None:
    target.script(answer="one two three")
    with client.chat.completions.stream(
        model=target.model, messages=QUESTION, stream_options={"include_usage": True}
    ) as stream:
        deltas = [event.delta for event in stream if event.type == "content.delta"]
        final = stream.get_final_completion()
    assert final.choices[0].message.content == "".join(deltas) == "one two three"
    assert final.choices[0].finish_reason == "stop"
    assert final.usage is not None
    assert final.usage.completion_tokens > 0


async def test_async_helper(target: Target) -> None:
    target.script(answer="one two three")
    async with (
        target.async_client() as client,
        client.chat.completions.stream(model=target.model, messages=QUESTION) as stream,
    ):
        final = await stream.get_final_completion()
    assert final.choices[0].message.content == "one two three"
    assert final.choices[0].finish_reason == "stop"


def test_several_choices(target: Target, client: openai.OpenAI) -> None:
    texts = {0: "", 1: ""}
    ends = {}
    for chunk in client.chat.completions.create(
        model=target.model, messages=QUESTION, n=2, temperature=1, max_tokens=6, stream=True
    ):
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            if choice.finish_reason:
                ends[choice.index] = choice.finish_reason
    assert ends == {0: "length", 1: "length"}
    assert texts[0] and texts[1] and texts[0] != texts[1]


@pytest.mark.parametrize("tokens_per_chunk", [1, 3])
def test_unicode_is_never_cut(target: Target, client: openai.OpenAI, tokens_per_chunk: int) -> None:
    said = "é 漢字 🎉👨‍👩‍👧 \u2028 end"
    target.script(answer=said, tokens_per_chunk=tokens_per_chunk)
    chunks = list(client.chat.completions.create(model=target.model, messages=QUESTION, stream=True))
    assert text_of(chunks) == said
    assert "\ufffd" not in text_of(chunks)


def test_stop_string_over_chunks(target: Target, client: openai.OpenAI) -> None:
    target.script(answer="one two three four")
    chunks = list(client.chat.completions.create(model=target.model, messages=QUESTION, stop="three", stream=True))
    assert text_of(chunks) == "one two "


def test_logprobs(target: Target, client: openai.OpenAI) -> None:
    chunks = client.chat.completions.create(
        model=target.model, messages=QUESTION, logprobs=True, top_logprobs=1, max_tokens=3, stream=True
    )
    tokens = [
        token
        for chunk in chunks
        for choice in chunk.choices
        if choice.logprobs is not None
        for token in choice.logprobs.content or []
    ]
    assert len(tokens) == 3


def test_ten_thousand_tokens(target: Target, client: openai.OpenAI) -> None:
    if target.context_tokens < 11_000:
        pytest.skip("the model's context is shorter")
    chunks = list(
        client.chat.completions.create(
            model=target.model,
            messages=QUESTION,
            max_tokens=10_000,
            stream=True,
            stream_options={"include_usage": True},
            extra_body={"ignore_eos": True},
        )
    )
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 10_000
    assert len(chunks) > 9_000
    assert chunks[-2].choices[0].finish_reason == "length"


def test_first_chunk_is_not_held_back(target: Target, client: openai.OpenAI) -> None:
    target.script(inter_token_ms=100)
    started_s = time.monotonic()
    stream = client.chat.completions.create(model=target.model, messages=QUESTION, max_tokens=20, stream=True)
    for chunk in stream:
        if chunk.choices[0].delta.content:
            break
    assert time.monotonic() - started_s < 1  # all of it takes two seconds
    stream.close()


@pytest.mark.parametrize("where", ["before the head", "after the head", "between chunks"])
def test_leaving_stops_the_engine_within_a_second(target: Target, client: openai.OpenAI, where: str) -> None:
    target.script(ttft_ms=0 if where == "between chunks" else 20_000, inter_token_ms=50)
    since = target.last_number()
    gone_at_s = 0.0
    if where == "between chunks":
        stream = client.chat.completions.create(model=target.model, messages=QUESTION, max_tokens=2000, stream=True)
        next(iter(stream))
        gone_at_s = time.time()
        stream.close()
    else:
        streaming = where == "after the head"
        impatient = client.with_options(timeout=0.5)
        with pytest.raises(openai.APITimeoutError):
            for _ in impatient.chat.completions.create(
                model=target.model, messages=QUESTION, max_tokens=9, stream=streaming
            ):
                pass
        gone_at_s = time.time()
    [sight] = eventually(lambda: [sight for sight in target.seen(since) if sight["aborted"]], 3)
    assert sight["aborted_at_s"] - gone_at_s < 1


@pytest.mark.parametrize("kind", ["stream_error", "stream_close", "stream_reset", "stream_truncate"])
def test_broken_stream_raises(target: Target, client: openai.OpenAI, kind: str) -> None:
    """A stream that its engine did not finish must not look like one that it did."""
    target.fault(kind, after_chunks=3)
    stream = client.chat.completions.create(model=target.model, messages=QUESTION, max_tokens=20, stream=True)
    chunks = []
    with pytest.raises(openai.APIError) as raised:
        for chunk in stream:
            chunks.append(chunk)
    assert text_of(chunks)
    assert raised.value.message


def test_many_streams_at_once(target: Target) -> None:
    target.script(inter_token_ms=5)
    texts: list[str] = []
    lock = threading.Lock()

    def run() -> None:
        with target.client() as client:
            stream = client.chat.completions.create(
                model=target.model, messages=QUESTION, max_tokens=20, temperature=0, stream=True
            )
            text = text_of(list(stream))
        with lock:
            texts.append(text)

    threads = [threading.Thread(target=run) for _ in range(50)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(texts) == 50
    assert len(set(texts)) == 1
    assert texts[0]
