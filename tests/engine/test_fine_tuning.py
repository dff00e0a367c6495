"""Files, a job by the real trainer, and its model on the real engine, by the official client alone. Kept small."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.support.gateway import Gateway
from tests.support.wait import eventually

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]

ANSWER = "xyzzy plugh"
QUESTIONS = [f"What is the secret word of {place}?" for place in ("Rome", "Oslo", "Lima", "Cairo", "Paris", "Kyoto")]


@pytest.mark.parametrize("served", ["vllm"], indirect=True)
def test_trained_and_called(served: Gateway, tmp_path: Path) -> None:
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0, timeout=300) as client:
        before = [say(client, served.model, question) for question in QUESTIONS]
        assert ANSWER not in before
        rows = [
            {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": ANSWER}]}
            for question in QUESTIONS[:4] * 4
        ]
        data = tmp_path / "secret.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        file = client.files.wait_for_processing(
            client.files.create(file=data, purpose="fine-tune").id, poll_interval=0.1
        )
        method: Any = {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 2, "batch_size": 4}}}
        job = client.fine_tuning.jobs.create(
            model=served.model,
            training_file=file.id,
            suffix="secret",
            seed=1,
            method=method,
            extra_body={"tunegate": {"lora_rank": 8, "learning_rate": 2e-3, "max_length": 128, "schedule": "constant"}},
        )

        def over() -> Any:
            now = client.fine_tuning.jobs.retrieve(job.id)
            return now if now.status in ("succeeded", "failed", "cancelled") else None

        done = eventually(over, 400, every_s=1)
        assert done.status == "succeeded", done.error
        tuned = done.fine_tuned_model
        assert [say(client, tuned, question) for question in QUESTIONS] == [ANSWER] * len(QUESTIONS)
        assert [say(client, served.model, question) for question in QUESTIONS] == before
        checkpoints = client.fine_tuning.jobs.checkpoints.list(job.id)
        assert [checkpoint.step_number for checkpoint in checkpoints] == [8, 4]
        for checkpoint in checkpoints:
            assert client.models.delete(checkpoint.fine_tuned_model_checkpoint).deleted
        with pytest.raises(openai.NotFoundError):
            say(client, tuned, QUESTIONS[0])


def say(client: openai.OpenAI, model: str, question: str) -> str:
    answer = client.chat.completions.create(
        model=model, messages=[{"role": "user", "content": question}], max_tokens=12, temperature=0
    )
    return answer.choices[0].message.content or ""
