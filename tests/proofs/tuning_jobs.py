"""Fine-tuning jobs with the real trainer: `python -m tests.proofs.tuning_jobs [shared] [reinforced]`.

shared      A tiny model of four bits, served by an emulated engine that is slow, with room for one request. Twelve
            requests queue while a job trains: it is paused, and goes on by itself; no step is left out, none done
            twice. It trains on the packed weights that are served. Half a minute.
reinforced  The demo model on the real vLLM on the CPU: a job with a grader has the gateway sample its answers, learns
            from them, and leaves a model that can be called, and nothing else. Five minutes on two cores.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai

from tests.support.engines import script
from tests.support.gateway import Gateway, gateway
from tests.support.wait import eventually

ROOT = Path(__file__).parents[2]
TORCH_PYTHON = ROOT / ".venv-torch" / "bin" / "python"
STEPS = 160
GRADER = {
    "type": "text_similarity", "name": "alike", "input": "{{sample.output_text}}", "reference": "{{item.word}}",
    "evaluation_metric": "fuzzy_match",
}  # fmt: skip
WORDS = ("yes", "no", "red", "blue", "cat", "dog", "sun", "rain")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", default=["shared", "reinforced"], choices=["shared", "reinforced"])
    parser.add_argument("--epochs", type=int, default=8, help="of the reinforced part; four steps each")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        if "shared" in given.parts:
            shared(Path(name))
        if "reinforced" in given.parts:
            reinforced(Path(name), given.epochs)


def shared(work: Path) -> None:
    """Raises AssertionError where the job did not yield, or lost a step."""
    code = "import sys, pathlib; from tests.trainer.test_four_bit import make_pair"
    code += "; make_pair(pathlib.Path(sys.argv[1]), 'awq')"
    subprocess.run([TORCH_PYTHON, "-c", code, work], cwd=ROOT, check=True)
    emulated = ("--engine-version", "emulator", "--device", "cuda", "--model", str(work / "packed"))
    yielding = ("--train-device", "cpu", "--train-pause-wait-ms", "200", "--max-in-flight", "1")
    with serving(work / "shared", *emulated, *yielding) as (served, client):
        turns = [said("user", "what is the code of abc?"), said("assistant", "The answer is ABC.")]
        settings = {"n_epochs": STEPS // 8, "batch_size": 1}
        method = {"type": "supervised", "supervised": {"hyperparameters": settings}}
        job = create(client, served, [{"messages": turns}] * 8, method, {"lora_rank": 4, "max_length": 64})
        run = served.state / "jobs" / job / "run"

        def logged(type: str) -> list[dict[str, Any]]:
            log = run / "events.jsonl"
            lines = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
            return [line for line in lines if line["type"] == type]

        eventually(lambda: len(logged("step")) > 3, 200)
        script(served, "r0", ttft_ms=500)
        began_s = time.time()

        def ask(_: int) -> None:
            client.chat.completions.create(model=served.model, messages=[said("user", "hello")], max_tokens=2)

        with ThreadPoolExecutor(12) as pool:
            asked = pool.map(ask, range(12))
            eventually(lambda: str(client.fine_tuning.jobs.retrieve(job).status) == "paused", 60, every_s=0.05)
            paused_s = time.time()
            list(asked)
        calm_s = time.time()
        before = len(logged("step"))
        assert 3 < before < STEPS, before
        assert finished(client, job, 300)["status"] == "succeeded"
        steps = [line["step"] for line in logged("step")]
        assert steps == list(range(1, STEPS + 1)), steps
        manifest = json.loads((run / "adapter" / "manifest.json").read_text())
        assert manifest["config"]["model"] == str(work / "packed")
        stopped, resumed = logged("paused")[0], logged("resumed")[0]
        print(
            f"shared: paused {paused_s - began_s:.1f} s after requests began to queue, the device free "
            f"{stopped['time'] - began_s:.1f} s after it; training went on {resumed['time'] - calm_s:.1f} s after the "
            f"last request (3 s of calm, and the model is loaded); {STEPS} steps, {before} before that, none twice"
        )


def reinforced(work: Path, epochs: int) -> None:
    """Raises AssertionError where the job failed, or left more than its model."""
    flags = ("--backend", "vllm", "--device", "cpu", "--dtype", "float32", "--max-model-len", "512")
    with serving(work / "reinforced", *flags) as (served, client):
        rows = [{"messages": [said("user", f"Answer with one word: {word}")], "word": word} for word in WORDS]
        settings = {"n_epochs": epochs, "batch_size": 2, "learning_rate_multiplier": 20}
        method = {"type": "reinforcement", "reinforcement": {"grader": GRADER, "hyperparameters": settings}}
        own = {"lora_rank": 8, "max_length": 64, "max_completion_tokens": 8, "schedule": "constant"}
        began_s = time.monotonic()
        job = create(client, served, rows, method, own)
        done = finished(client, job, 1500)
        assert done["status"] == "succeeded", done["error"]
        story = [event.message for event in client.fine_tuning.jobs.list_events(job, limit=100)][::-1]
        rewards = [float(line.rpartition("=")[2]) for line in story if "training mean reward=" in line]
        answer = client.chat.completions.create(
            model=str(done["fine_tuned_model"]),
            messages=[said("user", "Answer with one word: cat")],
            max_tokens=8,
            temperature=0,
        )
        models = [model.id for model in client.models.list()]
        assert job not in models, models
        quarter = max(1, len(rewards) // 4)
        first, last = (sum(part) / quarter for part in (rewards[:quarter], rewards[-quarter:]))
        print(
            f"reinforced: {len(rewards)} steps in {time.monotonic() - began_s:.0f} s, mean reward {first:.3f} in the "
            f"first quarter and {last:.3f} in the last; the model answers {answer.choices[0].message.content!r}"
        )


@contextlib.contextmanager
def serving(state: Path, *flags: str) -> Iterator[tuple[Gateway, openai.OpenAI]]:
    """A gateway with the real trainer, and a client of it."""
    trainer = ("--trainer-python", str(TORCH_PYTHON))
    with (
        gateway(*flags, *trainer, state=state, ready_timeout_s=600) as served,
        openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0, timeout=300) as client,
    ):
        yield served, client


def create(
    client: openai.OpenAI, served: Gateway, rows: list[dict[str, Any]], method: Any, settings: dict[str, Any]
) -> str:
    contents = "".join(json.dumps(row) + "\n" for row in rows).encode()
    file = client.files.create(file=("data.jsonl", contents), purpose="fine-tune")
    job = client.fine_tuning.jobs.create(
        model=served.model, training_file=file.id, method=method, seed=1, extra_body={"tunegate": settings}
    )
    return job.id


def finished(client: openai.OpenAI, job: str, limit_s: float) -> dict[str, Any]:
    """The job once it is over."""
    over = ("succeeded", "failed", "cancelled")
    eventually(lambda: client.fine_tuning.jobs.retrieve(job).status in over, limit_s, every_s=0.5)
    return client.fine_tuning.jobs.retrieve(job).model_dump()


def said(role: str, content: str) -> Any:
    return {"role": role, "content": content}


if __name__ == "__main__":
    main()
