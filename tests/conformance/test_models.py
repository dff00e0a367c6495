"""Models: list, retrieve, and the ones that are not there."""

from __future__ import annotations

import openai
import pytest

from tests.conformance.target import Target


def test_list(target: Target, client: openai.OpenAI) -> None:
    page = client.models.list()
    assert page.object == "list"
    assert target.model in [model.id for model in page.data]
    assert [model.id for model in client.models.list()] == [model.id for model in page.data]  # iterates as one page
    for model in page.data:
        assert model.object == "model"
        assert model.created > 1_600_000_000
        assert model.owned_by


async def test_async_list(target: Target) -> None:
    async with target.async_client() as client:
        assert target.model in [model.id async for model in client.models.list()]


def test_retrieve(target: Target, client: openai.OpenAI) -> None:
    model = client.models.retrieve(target.model)
    assert model.id == target.model
    assert model.object == "model"
    assert model._request_id


@pytest.mark.parametrize("name", ["nope", "nope/with/slashes", "ft:base:org:suffix:id", "with space", "é"])
def test_retrieve_unknown(target: Target, client: openai.OpenAI, name: str) -> None:
    with pytest.raises(openai.NotFoundError) as raised:
        client.models.retrieve(name)
    assert raised.value.code == "model_not_found"
    assert name in raised.value.message
