"""Embeddings, where the engine was started for them."""

from __future__ import annotations

import math
from collections.abc import Iterator

import openai
import pytest

from tests.conformance.target import Target, serving


@pytest.fixture(scope="module", params=["vllm", "sglang"])
def embedder(request: pytest.FixtureRequest) -> Iterator[Target]:
    with serving(request.param, "--task", "embed") as target:
        yield target


@pytest.mark.parametrize("encoding", ["float", "base64", None])
def test_one_text(embedder: Target, encoding: str | None) -> None:
    options = {} if encoding is None else {"encoding_format": encoding}
    with embedder.client() as client:
        answer = client.embeddings.create(model=embedder.model, input="hello", **options)  # type: ignore[arg-type]
    assert answer.object == "list"
    assert answer.model == embedder.model
    [item] = answer.data
    assert item.index == 0
    if encoding != "base64":
        assert math.isclose(sum(value * value for value in item.embedding), 1, rel_tol=1e-3)
    assert answer.usage.prompt_tokens > 0


async def test_several_texts(embedder: Target) -> None:
    async with embedder.async_client() as client:
        answer = await client.embeddings.create(model=embedder.model, input=["one", "two", "one"])
    assert [item.index for item in answer.data] == [0, 1, 2]
    assert answer.data[0].embedding == answer.data[2].embedding != answer.data[1].embedding


def test_errors(embedder: Target) -> None:
    with embedder.client() as client:
        with pytest.raises(openai.NotFoundError):
            client.embeddings.create(model="nope", input="hello")
        with pytest.raises(openai.BadRequestError):
            client.embeddings.create(model=embedder.model, input=5)  # type: ignore[arg-type]
        with pytest.raises(openai.APIStatusError) as raised:
            client.chat.completions.create(model=embedder.model, messages=[{"role": "user", "content": "hello"}])
        assert raised.value.status_code in (400, 404)
        assert client.embeddings.create(model=embedder.model, input="still here").data


def test_no_embeddings_from_a_chat_model(target: Target, client: openai.OpenAI) -> None:
    with pytest.raises(openai.APIStatusError) as raised:
        client.embeddings.create(model=target.model, input="hello")
    assert raised.value.status_code in (400, 404)
    assert raised.value.type == "invalid_request_error"
