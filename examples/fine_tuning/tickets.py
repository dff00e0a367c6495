"""Upload a file, train on it, call the model that comes of it: the official `openai` client, and nothing of Tunegate's.

    gateway serve --model demo --trainer-python /path/to/python-with-torch
    python examples/fine_tuning/tickets.py

Takes OPENAI_BASE_URL and OPENAI_API_KEY from the environment, like any script of that client.
"""

from __future__ import annotations

import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai

DATA = Path(__file__).parents[1] / "train" / "data"
SETTINGS = {"lora_rank": 8, "learning_rate": 1e-3, "max_length": 256}  # what OpenAI's API has no field for


def main() -> None:
    os.environ.setdefault("OPENAI_BASE_URL", "http://127.0.0.1:8000/v1")
    os.environ.setdefault("OPENAI_API_KEY", "none")
    client = openai.OpenAI()
    base = client.models.list().data[0].id
    held_out = [json.loads(line)["messages"] for line in (DATA / "eval.jsonl").open()]

    before = answers(client, base, held_out)
    print(f"{base}: {score(before, held_out):.1%} of {len(held_out)} held-out tickets answered word for word")

    training, validation = (
        client.files.wait_for_processing(
            client.files.create(file=DATA / f"{part}.jsonl", purpose="fine-tune").id, poll_interval=0.1
        ).id
        for part in ("train", "eval")
    )
    started = time.monotonic()
    job = client.fine_tuning.jobs.create(
        model=base,
        training_file=training,
        validation_file=validation,
        suffix="tickets",
        seed=7,
        method={"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 1, "batch_size": 8}}},
        extra_body={"tunegate": SETTINGS},
    )
    follow(client, job.id)
    job = client.fine_tuning.jobs.retrieve(job.id)
    if job.status != "succeeded":
        raise SystemExit(f"{job.id} {job.status}: {job.error and job.error.message}")
    print(f"{job.fine_tuned_model}: {job.trained_tokens} tokens in {time.monotonic() - started:.0f} s")

    assert job.fine_tuned_model is not None
    print(f"tuned: {score(answers(client, job.fine_tuned_model, held_out), held_out):.1%}")
    print(f"base unchanged: {answers(client, base, held_out) == before}")


def follow(client: openai.OpenAI, job_id: str) -> None:
    """Print the job's events as they come, until it is over."""
    shown: set[str] = set()
    while True:
        over = client.fine_tuning.jobs.retrieve(job_id).status in ("succeeded", "failed", "cancelled")
        for event in reversed(client.fine_tuning.jobs.list_events(job_id, limit=50).data):
            if event.id not in shown:
                shown.add(event.id)
                print(f"  {event.message}", flush=True)
        if over:
            return
        time.sleep(1)


def answers(client: openai.OpenAI, model: str, conversations: list[list[dict[str, str]]]) -> list[str]:
    """What a model says to the questions, greedily."""

    def ask(messages: list[dict[str, str]]) -> str:
        answer = client.chat.completions.create(
            model=model,
            messages=messages[:1],  # type: ignore[arg-type]  # read from a file
            max_tokens=8,
            temperature=0,
        )
        return answer.choices[0].message.content or ""

    with ThreadPoolExecutor(8) as pool:
        return list(pool.map(ask, conversations))


def score(given: list[str], conversations: list[list[dict[str, str]]]) -> float:
    """The share of answers that are the wanted ones word for word."""
    wanted = [messages[1]["content"] for messages in conversations]
    return sum(one == other for one, other in zip(given, wanted, strict=True)) / len(wanted)


if __name__ == "__main__":
    main()
