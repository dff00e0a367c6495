"""Files and fine-tuning jobs by the official client, over a stub of the trainer: shapes, statuses, refusals."""

from __future__ import annotations

import json
import os
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.conformance.target import RealTarget, Target, running_target, serving
from tests.support import stub_trainer
from tests.support.engines import checkpoint
from tests.support.gateway import gateway
from tests.support.wait import eventually

_OVER = ("succeeded", "failed", "cancelled")


@pytest.fixture(scope="module")
def target() -> Iterator[Target]:
    if isinstance(running_target(), RealTarget):
        pytest.skip("starts a gateway of its own")
    with tempfile.TemporaryDirectory() as folder:
        python = stub_trainer.launcher(Path(folder))
        with serving("vllm", "--trainer-python", str(python), "--max-file-mb", "1") as target:
            yield target


@pytest.fixture
def client(target: Target) -> Iterator[openai.OpenAI]:
    with target.client() as client:
        yield client


def rows(count: int, word: str = "") -> bytes:
    turns = [{"role": "user", "content": f"hello {word}"}, {"role": "assistant", "content": "there"}]
    return (json.dumps({"messages": turns}) + "\n").encode() * count


def upload(client: openai.OpenAI, contents: bytes, purpose: Any = "fine-tune") -> openai.types.FileObject:
    return client.files.create(file=("data.jsonl", contents), purpose=purpose)


def create(client: openai.OpenAI, target: Target, contents: bytes, **fields: Any) -> Any:
    settings = {"n_epochs": 2, "batch_size": 4} | fields.pop("hyperparameters", {})
    return client.fine_tuning.jobs.create(
        model=target.model,
        training_file=upload(client, contents).id,
        method={"type": "supervised", "supervised": {"hyperparameters": settings}},
        **fields,
    )


def over(client: openai.OpenAI, id: str) -> Any:
    return eventually(
        lambda: job if (job := client.fine_tuning.jobs.retrieve(id)).status in _OVER else None, 30, every_s=0.1
    )


def messages(client: openai.OpenAI, id: str, page: int = 100) -> list[str]:
    """The job's whole story, oldest first, page by page."""
    return [event.message for event in client.fine_tuning.jobs.list_events(id, limit=page)][::-1]


def under_way(client: openai.OpenAI, id: str) -> bool:
    """Whether the trainer makes steps."""
    return any("training loss" in event.message for event in client.fine_tuning.jobs.list_events(id, limit=5).data)


def test_life_of_a_file(client: openai.OpenAI) -> None:
    made = upload(client, rows(3))
    assert client.files.wait_for_processing(made.id, poll_interval=0.01).status == "processed"
    assert (made.object, made.filename, made.purpose, made.bytes) == ("file", "data.jsonl", "fine-tune", len(rows(3)))
    assert client.files.content(made.id).content == rows(3)
    other = client.files.create(
        file=("b.jsonl", b"{}"), purpose="batch", expires_after={"anchor": "created_at", "seconds": 3600}
    )
    assert other.expires_at == other.created_at + 3600
    assert [file.id for file in client.files.list(limit=1)][:2] == [other.id, made.id]  # two pages
    assert made.id in {file.id for file in client.files.list(purpose="fine-tune", order="asc")}
    assert client.files.delete(made.id).deleted
    for gone in (client.files.retrieve, client.files.content, client.files.delete):
        with pytest.raises(openai.NotFoundError):
            gone(made.id)


def test_files_that_are_refused(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="purpose is 'nonsense'"):
        upload(client, b"{}", "nonsense")
    with pytest.raises(openai.APIStatusError, match="--max-file-mb") as refused:
        upload(client, b"x" * 4_000_000)
    assert refused.value.status_code == 413


def test_life_of_a_job(client: openai.OpenAI, target: Target) -> None:
    jobs = client.fine_tuning.jobs
    held_out = upload(client, rows(2)).id
    job = create(
        client, target, rows(8), validation_file=held_out, suffix="my test", seed=3, metadata={"team": "a"},
        extra_body={"tunegate": {"lora_rank": 8}},
    )  # fmt: skip
    assert (job.object, job.status, job.model, job.seed) == ("fine_tuning.job", "queued", target.model, 3)
    assert job.fine_tuned_model is None and job.error is None and job.result_files == []
    done = over(client, job.id)
    assert done.status == "succeeded", done.error
    name = done.fine_tuned_model
    assert name == f"ft:{target.model}:tunegate:my-test:{job.id[6:14]}"
    assert done.trained_tokens == 40 and done.finished_at >= done.created_at
    assert done.method.supervised.hyperparameters.n_epochs == 2

    story = messages(client, job.id, page=7)
    assert story == messages(client, job.id)
    assert story[0] == f"Created fine-tuning job: {job.id}"
    assert story[-2:] == [f"New fine-tuned model created: {name}", "The job has successfully completed"]
    assert "Step 4/4: training loss=0.2500" in story
    metrics = [event for event in jobs.list_events(job.id) if event.type == "metrics"]
    assert {"step": 4, "train_loss": 0.25}.items() <= dict(metrics[1].data).items()  # type: ignore[call-overload]
    table = client.files.content(done.result_files[0]).text.splitlines()
    assert table[0] == "step,train_loss,train_accuracy,valid_loss,valid_mean_token_accuracy"
    assert table[-1] == "4,0.25,0.5,1.0,0.5"

    checkpoints = list(jobs.checkpoints.list(job.id, limit=1))
    assert [(one.step_number, one.fine_tuned_model_checkpoint) for one in checkpoints] == [
        (4, name),
        (2, f"{name}:ckpt-step-2"),
    ]
    question: Any = [{"role": "user", "content": "hello"}]
    said = set()
    for model in (name, f"{name}:ckpt-step-2", target.model):
        answer = client.chat.completions.create(model=model, messages=question, temperature=0, max_tokens=12)
        assert answer.model == model
        said.add(answer.choices[0].message.content)
    assert len(said) == 3
    assert client.models.retrieve(name).owned_by == "tunegate"
    assert [one.id for one in jobs.list(metadata={"team": "a"})] == [job.id]
    assert client.models.delete(name).deleted
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model=name, messages=question)


def test_preference_job(client: openai.OpenAI, target: Target) -> None:
    row = {"input": {"messages": [{"role": "user", "content": "so?"}]}}
    for side, said in (("preferred_output", "yes"), ("non_preferred_output", "no")):
        row[side] = [{"role": "assistant", "content": said}]  # type: ignore[assignment]
    file = upload(client, (json.dumps(row) + "\n").encode() * 4)
    method: Any = {"type": "dpo", "dpo": {"hyperparameters": {"beta": 0.2, "n_epochs": 1}}}
    job = client.fine_tuning.jobs.create(model=target.model, training_file=file.id, method=method)
    assert job.method.dpo.hyperparameters.beta == 0.2
    assert over(client, job.id).status == "succeeded"


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"model": "nobody"}, "model", "does not exist"),
        ({"training_file": "file-none"}, "training_file", "No such File"),
        ({"extra_body": {"tunegate": {"lora_rnk": 4}}}, "tunegate.lora_rnk", "did you mean 'lora_rank'"),
        ({"extra_body": {"tunegate": {"lora_rank": 4096}}}, "tunegate.lora_rank", "--max-adapter-rank"),
        ({"extra_body": {"n_epochs": 4}}, "n_epochs", "unknown field"),
        ({"hyperparameters": {"n_epochs": 0}}, "hyperparameters.n_epochs", "greater than"),
        ({"hyperparameters": {"batch_size": "many"}}, "hyperparameters.batch_size", "given 'many'"),
        ({"suffix": "x" * 65}, "suffix", "64"),
        ({"method": {"type": "reinforcement"}}, "method.reinforcement", "grader"),
        ({"extra_body": {"tunegate": {"canary_weight": 5}}}, "tunegate.canary_weight", "name the adapter"),
        ({"extra_body": {"tunegate": {"max_completion_tokens": 5}}}, "tunegate.max_completion_tokens", "reinforcement"),
        ({"integrations": [{"type": "wandb"}]}, "integrations", "not offered"),
    ],
)
def test_jobs_that_are_refused(
    client: openai.OpenAI, target: Target, fields: dict[str, Any], param: str | None, words: str
) -> None:
    whole = {"model": target.model, "training_file": "file-x"} | fields
    with pytest.raises(openai.APIStatusError) as refused:
        client.fine_tuning.jobs.create(**whole)
    assert words in refused.value.message and refused.value.param == param


def test_bad_lines_are_named(client: openai.OpenAI, target: Target) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        create(client, target, rows(2) + b'{"messages": []}\nnonsense\n')
    assert "data.jsonl line 3: " in refused.value.message and "data.jsonl line 4: not JSON" in refused.value.message
    assert (refused.value.param, refused.value.code) == ("training_file", "invalid_training_file")


@pytest.mark.parametrize(
    ("word", "code", "words"),
    [
        ("worse", "gate_failed", "worse than the base"),
        ("broken", "training_failed", "not finite"),
        ("murdered", "training_failed", "signal 9"),
    ],
)
def test_jobs_that_fail(client: openai.OpenAI, target: Target, word: str, code: str, words: str) -> None:
    job = create(client, target, rows(8, word), validation_file=upload(client, rows(1)).id)
    failed = over(client, job.id)
    assert (failed.status, failed.error.code) == ("failed", code)
    assert words in failed.error.message and failed.fine_tuned_model is None
    assert client.fine_tuning.jobs.checkpoints.list(job.id).data == []
    assert not [model.id for model in client.models.list() if job.id[6:14] in model.id]


def test_a_killed_trainer_goes_on(client: openai.OpenAI, target: Target) -> None:
    job = create(client, target, rows(16, "stabbed"), hyperparameters={"n_epochs": 4})
    assert over(client, job.id).status == "succeeded"
    assert any(message.startswith("Training goes on after step") for message in messages(client, job.id))


def test_pause_resume_cancel(client: openai.OpenAI, target: Target) -> None:
    jobs = client.fine_tuning.jobs
    job = create(client, target, rows(16), hyperparameters={"n_epochs": 50, "batch_size": 1})
    behind = create(client, target, rows(4))
    eventually(lambda: under_way(client, job.id), 20)
    assert jobs.pause(job.id).status == "paused"
    assert over(client, behind.id).status == "succeeded"  # a paused job holds nobody up
    assert any("Training paused after step" in message for message in messages(client, job.id))
    with pytest.raises(openai.ConflictError):
        jobs.pause(job.id)
    assert jobs.resume(job.id).status == "queued"
    eventually(lambda: any("Training goes on after" in message for message in messages(client, job.id)), 20)
    assert jobs.cancel(job.id).status == "cancelled"
    eventually(lambda: not (target.gateway.state / "jobs" / job.id).exists(), 20)
    assert jobs.retrieve(job.id).status == "cancelled"
    for change in (jobs.cancel, jobs.resume):
        with pytest.raises(openai.ConflictError):
            change(job.id)


def test_jobs_outlive_the_gateway(tmp_path: Path) -> None:
    """The trainer ends with it, with a checkpoint; the next gateway over the same state goes on from there."""
    model, python = checkpoint(tmp_path / "base"), stub_trainer.launcher(tmp_path)
    flags = ("--engine-version", "emulator", "--device", "cuda", "--model", str(model), "--trainer-python", str(python))
    with gateway(*flags, state=tmp_path / "state") as first:
        client = openai.OpenAI(base_url=f"{first.url}/v1", api_key="none", max_retries=0)
        file = upload(client, rows(40))
        settings: Any = {"n_epochs": 10, "batch_size": 1}
        job = client.fine_tuning.jobs.create(model="base", training_file=file.id, hyperparameters=settings)
        eventually(lambda: under_way(client, job.id), 20)
        assert first.stop() == 0
    with gateway(*flags, state=tmp_path / "state") as second:
        client = openai.OpenAI(base_url=f"{second.url}/v1", api_key="none", max_retries=0)
        assert over(client, job.id).status == "succeeded"
        story = messages(client, job.id)
        steps = [message.split()[1] for message in story if "training loss" in message]
        assert steps == [f"{step}/400:" for step in range(1, 401)]  # none left out, none twice
        assert any(message.startswith("Training goes on after step") for message in story)


def test_jobs_outlive_control(client: openai.OpenAI, target: Target) -> None:
    """Its successor adopts the trainer; nothing is done twice."""
    job = create(client, target, rows(16), hyperparameters={"n_epochs": 12, "batch_size": 1})
    eventually(lambda: under_way(client, job.id), 20)
    (control,) = target.gateway.children("gateway.control")
    os.kill(control, signal.SIGKILL)

    def back() -> bool:
        try:
            return client.fine_tuning.jobs.retrieve(job.id).id == job.id
        except openai.InternalServerError:
            return False

    eventually(back, 30)
    assert over(client, job.id).status == "succeeded"
    story = messages(client, job.id)
    assert not [step for step in range(1, 193) if not any(f"Step {step}/192:" in said for said in story)], story
    assert not any("goes on" in message for message in story)
