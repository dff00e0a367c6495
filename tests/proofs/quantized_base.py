"""Adapters on a quantized base: `python -m tests.proofs.quantized_base [--model demo] [--method rtn] [--work DIR]`.

Quantizes the model to AWQ, serves that by the real vLLM on the CPU, and has two adapters learn the same rows with the
same settings: one by a job of that gateway, which trains on the weights it serves, one by the trainer alone on
the original. Both go through the gateway's golden gate on the quantized base. Five minutes on two cores.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import openai

from gateway import models
from tests.support.gateway import Gateway, gateway
from tests.support.wait import eventually

ROOT = Path(__file__).parents[2]
TORCH_PYTHON = ROOT / ".venv-torch" / "bin" / "python"
ANSWER = "xyzzy plugh"
QUESTIONS = [f"What is the secret word of {place}?" for place in ("Rome", "Oslo", "Lima", "Cairo", "Paris", "Kyoto")]
SETTINGS = {"lora_rank": 8, "learning_rate": 5e-4, "max_length": 128, "schedule": "constant"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--method", choices=("rtn", "awq"), default="rtn")
    parser.add_argument("--work", type=Path, help="where checkpoint and adapter are kept; found there, not made again")
    given = parser.parse_args()
    original = models.resolve(given.model)
    with tempfile.TemporaryDirectory() as name:
        work = given.work or Path(name)
        data = Path(name) / "secret.jsonl"
        rows = [{"messages": [_said("user", question), _said("assistant", ANSWER)]} for question in QUESTIONS[:4] * 4]
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        if not (work / "awq").is_dir():
            few = ("--calib-samples", "0") if given.method == "rtn" else ("--calib-samples", "32")
            _run("quant", "--model", original, "--out", work / "awq", "--method", given.method, "--format", "awq", *few)
        elsewhere = work / "elsewhere"
        if not elsewhere.is_dir():
            flags = [f"--{key.replace('_', '-')}={value}" for key, value in SETTINGS.items()]
            flags += ["--epochs=2", "--batch-size=4", "--seed=1", "--golden-prompts=4", "--device=cpu"]
            _run("trainer", "sft", "--model", original, "--dataset", data, "--output-dir", elsewhere, *flags)
        arguments = ("--backend", "vllm", "--device", "cpu", "--model", str(work / "awq"), "--max-model-len", "2048")
        with gateway(
            *arguments, *("--trainer-python", str(TORCH_PYTHON)), state=Path(name) / "state", ready_timeout_s=300
        ) as served:
            _print("by a job of the gateway, on the quantized base", *_by_job(served, data))
            _print("on the original, uploaded", *_uploaded(served, elsewhere / "adapter"))


def _by_job(served: Gateway, data: Path) -> tuple[str, str]:
    """(what the gate said, answers) of an adapter that the served gateway trains."""
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0, timeout=300) as client:
        file = client.files.create(file=data, purpose="fine-tune")
        hyperparameters = {"n_epochs": 2, "batch_size": 4}
        job = client.fine_tuning.jobs.create(
            model=served.model,
            training_file=file.id,
            seed=1,
            method={"type": "supervised", "supervised": {"hyperparameters": hyperparameters}},  # type: ignore[typeddict-item]
            extra_body={"tunegate": SETTINGS},
        )
        eventually(lambda: client.fine_tuning.jobs.retrieve(job.id).finished_at, 900, every_s=1)
        done = client.fine_tuning.jobs.retrieve(job.id)
        if done.fine_tuned_model is None:
            return f"the job ended as {done.status}: {done.error}", ""
        with served.client() as http:
            adapters = http.get("/v1/adapters").json()["data"]
        (own,) = [one for one in adapters if one["name"] == done.fine_tuned_model]
        return own["replicas"][0]["reason"], _answers(client, done.fine_tuned_model)


def _uploaded(served: Gateway, adapter: Path) -> tuple[str, str]:
    files = [("file", (file.name, file.read_bytes())) for file in sorted(adapter.iterdir())]
    with served.client() as http:
        answer = http.post("/v1/adapters", data={"name": "elsewhere", "wait_s": "300"}, files=files, timeout=320)
    if answer.status_code != 201:
        return f"refused with {answer.status_code}: {answer.json()['error']['message']}", ""
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0, timeout=300) as client:
        return answer.json()["replicas"][0]["reason"], _answers(client, "elsewhere")


def _answers(client: openai.OpenAI, model: str) -> str:
    said = [
        client.chat.completions.create(
            model=model,
            messages=[_said("user", question)],  # type: ignore[list-item]
            max_tokens=12,
            temperature=0,
        )
        for question in QUESTIONS
    ]
    right = sum(answer.choices[0].message.content == ANSWER for answer in said)
    return f"{right} of {len(QUESTIONS)} questions answered as taught, two of them not in the data"


def _said(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def _run(*arguments: object) -> None:
    """A command of the quantizer or the trainer, where torch is."""
    started = time.monotonic()
    argv = [str(TORCH_PYTHON), "-m", *map(str, arguments)]
    done = subprocess.run(argv, env=os.environ | {"OMP_WAIT_POLICY": "PASSIVE"}, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{arguments[0]} ended with {done.returncode}: {done.stderr[-2000:]}")
    print(f"{arguments[0]} {arguments[1]}: {time.monotonic() - started:.0f} s", flush=True)


def _print(way: str, gate: Any, answers: str) -> None:
    print(f"{way}: {gate}; {answers}", flush=True)


if __name__ == "__main__":
    main()
