"""A gateway that stops and starts again, and one that attaches to engines it did not start."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.emulator import ENGINES, emulator, lora_arguments
from tests.support.engines import adapter, chat, checkpoint, upload
from tests.support.gateway import gateway
from tests.support.wait import eventually


@pytest.mark.parametrize("engine", ENGINES)
def test_restart_keeps_adapters(engine: str, tmp_path: Path) -> None:
    base = checkpoint(tmp_path / "base")
    flags = ("--backend", engine, "--engine-version", "emulator", "--device", "cuda", "--model", str(base))
    with gateway(*flags, state=tmp_path / "state") as first:
        for name in ("kept", "deleted"):
            upload(first, name, adapter(tmp_path / name, seed=len(name)))
        answers = [chat(first, name).json()["choices"][0]["message"]["content"] for name in ("base", "kept")]
        assert answers[0] != answers[1]
        with first.client() as client:
            assert client.delete("/v1/adapters/deleted").status_code == 200
            assert chat(first, "deleted").status_code == 404
        assert first.stop() == 0
    with gateway(*flags, state=tmp_path / "state") as second:
        with second.client() as client:
            names = [model["id"] for model in client.get("/v1/models").json()["data"]]
        assert names == ["base", "kept"]
        # Callable from the ready line on, or within the moment that its load takes.
        eventually(lambda: chat(second, "kept").status_code == 200, 30)
        again = [chat(second, name).json()["choices"][0]["message"]["content"] for name in ("base", "kept")]
        assert again == answers
        assert chat(second, "deleted").status_code == 404


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_attached_engine_is_recognised_and_takes_adapters(engine: str, tmp_path: Path) -> None:
    base = checkpoint(tmp_path / "base")
    with emulator(engine, *lora_arguments(engine), model="base", model_path=base, api_key="its-own") as running:
        flags = ("--attach", running.url, "--attach-key", "its-own", "--model", str(base))
        with gateway(*flags, state=tmp_path / "state", api_key="ours") as serving:
            assert serving.replicas()[0]["backend"] == engine
            plain = chat(serving).json()["choices"][0]["message"]["content"]
            upload(serving, "tuned", adapter(tmp_path / "tuned"))
            assert chat(serving, "tuned").json()["choices"][0]["message"]["content"] != plain
        assert running.process.poll() is None  # not ours to stop
