"""rsLoRA, patterns and PiSSA answer on real engines as on peft, and adapters that would answer wrongly stay out."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.engine.conftest import Oracle
from tests.support.gateway import Gateway

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]

MAX_TOKENS = 24
WEIGHTS = "adapter_model.safetensors"
KINDS = ("patterns", "pissa")  # the first is rsLoRA too


def send(http: httpx2.Client, name: str, directory: Path) -> httpx2.Response:
    files = [("file", (file.name, file.read_bytes())) for file in sorted(directory.iterdir())]
    return http.post("/v1/adapters", data={"name": name, "wait_s": "300"}, files=files, timeout=320)


def greedy_text(http: httpx2.Client, model: str, prompt: str) -> str:
    messages = [{"role": "user", "content": prompt}]
    body = {"model": model, "messages": messages, "max_tokens": MAX_TOKENS, "temperature": 0}
    answer = http.post("/v1/chat/completions", json=body, timeout=300).raise_for_status().json()
    return str(answer["choices"][0]["message"]["content"])


def copy_of(directory: Path, to: Path, **config: Any) -> Path:
    """The adapter's own files, with these values in its configuration."""
    to.mkdir()
    for name in ("adapter_config.json", WEIGHTS, "manifest.json"):
        shutil.copyfile(directory / name, to / name)
    path = to / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return to


@pytest.mark.parametrize("kind", KINDS)
def test_they_answer_as_peft_does(served: Gateway, odd_oracle: Oracle, kind: str, tmp_path: Path) -> None:
    with served.client() as http:
        answer = send(http, kind, copy_of(odd_oracle.adapter(kind), tmp_path / kind))
        assert answer.status_code == 201, answer.text
        shown = answer.json()
        assert "logprobs differ by" in shown["replicas"][0]["reason"], shown
        print(f"{kind}: {shown['replicas'][0]['reason']}; {shown['metadata']}")
        for prompt, text in odd_oracle.expected[kind].items():
            assert greedy_text(http, kind, prompt) == text
        assert http.delete(f"/v1/adapters/{kind}").status_code == 200


def test_corrupted_adapters_are_stopped(served: Gateway, odd_oracle: Oracle, tmp_path: Path) -> None:
    good = odd_oracle.adapter("patterns")
    zeroed = copy_of(good, tmp_path / "zeroed")
    tensors = load_file(zeroed / WEIGHTS)
    save_file({n: np.zeros_like(value) if "lora_B" in n else value for n, value in tensors.items()}, zeroed / WEIGHTS)
    weak = copy_of(good, tmp_path / "weak", use_rslora=False)  # by the square roots of the ranks
    # The untrained start of PiSSA fits only the base that PiSSA made of ours: same shapes, other weights.
    other = copy_of(odd_oracle.adapter("pissa"), tmp_path / "other")
    shutil.copyfile(odd_oracle.adapter("pissa") / "initial" / WEIGHTS, other / WEIGHTS)
    shutil.copyfile(odd_oracle.adapter("pissa") / "initial" / "adapter_config.json", other / "adapter_config.json")
    with served.client() as http:
        assert send(http, "guarded", copy_of(good, tmp_path / "good")).status_code == 201
        prompt, text = next(iter(odd_oracle.expected["patterns"].items()))
        for directory in (zeroed, weak, other):
            answer = send(http, "guarded", directory)
            message = answer.json()["error"]["message"]
            print(f"{directory.name}: {message}")
            assert answer.status_code == 400 and "golden prompt" in message, answer.text
            assert ("the adapter is ignored" in message) == (directory is zeroed)
            assert greedy_text(http, "guarded", prompt) == text  # traffic stays on the version that passed
        assert http.delete("/v1/adapters/guarded").status_code == 200
