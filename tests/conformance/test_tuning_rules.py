"""What holds for jobs beside the trainer: graders, gates, canaries, quotas, and that serving comes first."""

from __future__ import annotations

import json
import sys
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.conformance.target import RealTarget, Target, running_target, serving
from tests.conformance.test_fine_tuning import create, messages, over, rows, under_way, upload
from tests.support import stub_trainer
from tests.support.wait import eventually

GRADER = {
    "type": "string_check", "name": "exact", "input": "{{sample.output_text}}", "reference": "{{item.answer}}",
    "operation": "eq",
}  # fmt: skip
# Below zero for whatever is called `poor`.
SCORE = "import sys; print(-1 if 'poor' in sys.argv[2] else 0.5)"


@pytest.fixture(scope="module")
def target() -> Iterator[Target]:
    if isinstance(running_target(), RealTarget):
        pytest.skip("starts a gateway of its own")
    if int(openai.__version__.partition(".")[0]) < 3:
        pytest.skip("nothing here depends on the client")
    with tempfile.TemporaryDirectory() as folder:
        python = stub_trainer.launcher(Path(folder))
        flags = ("--train-pause-wait-ms", "100", "--max-in-flight", "1", "--max-files-gb", "0.002")
        flags += ("--train-score", f'{sys.executable} -c "{SCORE}"', "--trainer-python", str(python))
        with serving("vllm", *flags) as target:
            yield target


@pytest.fixture
def client(target: Target) -> Iterator[openai.OpenAI]:
    with target.client() as client:
        yield client


@pytest.fixture(scope="module")
def trainer(target: Target) -> Iterator[openai.OpenAI]:
    """A client whose key opens training alone."""
    with target.gateway.client() as http:
        made = http.post("/admin/keys", json={"name": "trainer", "scopes": ["train"]}).raise_for_status().json()
    with target.client(api_key=made["key"]) as client:
        yield client


def reinforce(client: openai.OpenAI, target: Target, row: dict[str, Any], grader: Any, **hyperparameters: Any) -> Any:
    contents = (json.dumps({"messages": [{"role": "user", "content": "so?"}]} | row) + "\n").encode() * 4
    given: Any = {"grader": grader, "hyperparameters": hyperparameters}
    return client.fine_tuning.jobs.create(
        model=target.model,
        training_file=upload(client, contents).id,
        method={"type": "reinforcement", "reinforcement": given},
        extra_body={"tunegate": {"max_completion_tokens": 16}},
    )


def test_reinforcement(trainer: openai.OpenAI, target: Target) -> None:
    """The job's trainer has a key for inference and adapters, which the key that made the job need not open."""
    job = reinforce(trainer, target, {"answer": "yes"}, GRADER, n_epochs=2, batch_size=2, compute_multiplier=2)
    own = job.method.reinforcement
    assert job.method.type == "reinforcement" and own.grader.type == "string_check"
    assert (own.hyperparameters.eval_interval, own.hyperparameters.compute_multiplier) == (2, 2)
    folder = target.gateway.state / "jobs" / job.id
    told = (folder / "job.yaml").read_text()
    assert "group_size: 16" in told and "gateway_url" not in told  # known when the trainer starts
    done = over(trainer, job.id)
    assert done.status == "succeeded", done.error
    assert f"gateway_url: {target.gateway.url}\n" in (folder / "run" / "config.yaml").read_text()
    assert "Step 4/4: training mean reward=1.0000" in messages(trainer, job.id)


@pytest.mark.parametrize(
    ("row", "grader", "param", "words"),
    [
        ({"answer": "yes"}, {"type": "python", "name": "x", "source": ""}, "method.reinforcement.grader", "FILE.py"),
        ({"answer": "yes"}, GRADER | {"operation": "as"}, "method.reinforcement.grader", "operation"),
        ({"other": "yes"}, GRADER, "training_file", "data.jsonl line 1: `answer` is missing"),
    ],
)
def test_graders_that_are_refused(
    client: openai.OpenAI, target: Target, row: dict[str, Any], grader: Any, param: str, words: str
) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        reinforce(client, target, row, grader)
    assert refused.value.param == param and words in refused.value.message


def test_the_score_command_is_a_gate(client: openai.OpenAI, target: Target) -> None:
    good = over(client, create(client, target, rows(4), suffix="good").id)
    assert good.status == "succeeded" and "The score command gives it 0.5" in messages(client, good.id)
    poor = over(client, create(client, target, rows(4), suffix="poor").id)
    assert (poor.status, poor.error.code) == ("failed", "gate_failed")
    assert "gives the tuned model -1" in poor.error.message
    assert not [model.id for model in client.models.list() if ":poor:" in model.id]


def test_a_key_for_training_moves_no_adapter(trainer: openai.OpenAI, target: Target) -> None:
    with pytest.raises(openai.PermissionDeniedError, match="lacks the scope `adapters`"):
        create(trainer, target, rows(4), extra_body={"tunegate": {"adapter": "tickets"}})


def test_a_result_becomes_a_version(client: openai.OpenAI, target: Target) -> None:
    def adapter() -> dict[str, Any]:
        with target.gateway.client() as http:
            return dict(http.get("/v1/adapters/tickets").raise_for_status().json())

    settings: dict[str, Any] = {"adapter": "tickets", "canary_weight": 20}
    with pytest.raises(openai.BadRequestError, match="no adapter 'tickets' that serves"):
        create(client, target, rows(4), extra_body={"tunegate": settings})
    first = over(client, create(client, target, rows(4), seed=1, extra_body={"tunegate": {"adapter": "tickets"}}).id)
    assert "It is version 1 of tickets, which points to it" in messages(client, first.id)
    second = over(client, create(client, target, rows(4), seed=2, extra_body={"tunegate": settings}).id)
    assert "It is version 2 of tickets, as a canary of 20 % of its requests" in messages(client, second.id)
    assert adapter()["current_version"] == 1 and adapter()["canary"]["weight"] == 20


def test_a_key_keeps_so_much(client: openai.OpenAI, target: Target) -> None:
    half = upload(client, b"x" * 1_100_000)
    with pytest.raises(openai.RateLimitError, match="--max-files-gb") as refused:
        upload(client, b"x" * 1_100_000)
    assert refused.value.code == "insufficient_quota"
    assert not list((target.gateway.state / "staging").iterdir())
    client.files.delete(half.id)
    client.files.delete(upload(client, b"x" * 1_100_000).id)


def test_serving_comes_first(client: openai.OpenAI, target: Target) -> None:
    """Requests that queue pause the job; it goes on by itself when they are gone."""
    target.script(ttft_ms=500)
    job = create(client, target, rows(60), hyperparameters={"n_epochs": 50, "batch_size": 1})
    eventually(lambda: under_way(client, job.id), 20)
    question: Any = [{"role": "user", "content": "hello"}]
    seen = threading.Event()

    def ask(_: int) -> None:
        while not seen.is_set():
            client.chat.completions.create(model=target.model, messages=question, max_tokens=2)

    def status() -> str:
        return str(client.fine_tuning.jobs.retrieve(job.id).status)

    with ThreadPoolExecutor(4) as pool:
        asked = pool.map(ask, range(4))
        try:
            eventually(lambda: status() == "paused", 30)
            paused: Any = client.fine_tuning.jobs.retrieve(job.id)
        finally:
            seen.set()
        list(asked)
    assert paused.tunegate == {"paused_for": "serving"}
    target.script()
    eventually(lambda: status() == "running", 30)
    eventually(lambda: any("Training goes on after" in said for said in messages(client, job.id)), 20)
    story = messages(client, job.id)
    assert "Fine-tuning job paused: requests have queued for 0.1 s; serving comes first" in story
    assert "Fine-tuning job resumed: no request has queued for 1.5 s" in story
    client.fine_tuning.jobs.cancel(job.id)
