"""An adapter is a model like any other to the client, and goes away like one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from tests.conformance.conftest import ENGINES
from tests.conformance.target import Target, serving
from tests.support.engines import adapter, upload
from tests.support.wait import eventually

QUESTION = [{"role": "user", "content": "hello"}]


@pytest.fixture(params=ENGINES)
def target(request: pytest.FixtureRequest) -> Iterator[Target]:
    """One of its own: for LMDeploy, another adapter is a restart."""
    with serving(request.param) as target:
        yield target


@pytest.fixture
def client(target: Target) -> Iterator[openai.OpenAI]:
    with target.client(max_retries=10) as client:
        yield client


def test_life_of_an_adapter(target: Target, client: openai.OpenAI, tmp_path: Path) -> None:
    def say(model: str) -> str:
        answer = client.chat.completions.create(model=model, messages=QUESTION, max_tokens=12, temperature=0)
        assert answer.model == model
        return answer.choices[0].message.content or ""

    upload(target.gateway, "tuned", adapter(tmp_path / "tuned"))
    assert say("tuned") != say(target.model)
    chunks = list(
        client.chat.completions.create(model="tuned", messages=QUESTION, max_tokens=12, temperature=0, stream=True)
    )
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == say("tuned")
    assert {chunk.model for chunk in chunks} == {"tuned"}

    listed = {model.id: model for model in client.models.list()}
    assert listed["tuned"].model_dump()["parent"] == target.model
    assert client.models.retrieve("tuned").id == "tuned"

    deleted = client.models.delete("tuned")
    assert (deleted.id, deleted.object, deleted.deleted) == ("tuned", "model", True)
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="tuned", messages=QUESTION)
    eventually(lambda: "tuned" not in {model.id for model in client.models.list()})
    assert say(target.model)
