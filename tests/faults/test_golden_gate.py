"""Adapters that would be served wrongly: engines get files that they read alike, and must prove what they serve."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from backends.emulator import language
from backends.emulator.adapters import read
from gateway.adapters.canonical import canonicalise
from gateway.adapters.manifest import parse_config
from tests.support.engines import adapter, checkpoint, script, state_of, upload
from tests.support.gateway import Gateway, gateway

PROMPT = "Who goes there?"
LOAD_ROUTES = ("/v1/load_lora_adapter", "/load_lora_adapter")


@pytest.fixture(scope="module", params=["vllm", "sglang", "lmdeploy"])
def running(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    model = checkpoint(tmp_path_factory.mktemp("model") / "base")
    flags = ("--backend", request.param, "--engine-version", "emulator", "--device", "cuda", "--model", str(model))
    with gateway(*flags, "--golden-tolerance", "0.05", state=tmp_path_factory.mktemp("state")) as serving:
        yield serving


@pytest.fixture
def engine(running: Gateway) -> Iterator[Gateway]:
    script(running, "r0")
    yield running
    script(running, "r0")


def backend(gateway: Gateway) -> str:
    return str(gateway.replicas()[0]["backend"])


def odd_adapter(directory: Path, seed: int) -> Path:
    """One that engines read in different ways as it is."""
    adapter(directory, seed)
    change_config(directory, use_rslora=True, alpha_pattern={"v_proj": 3})
    return directory


def change_config(directory: Path, **values: Any) -> None:
    path = directory / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def with_goldens(directory: Path) -> Path:
    """Add what the emulated model answers with this adapter as it will be stored."""
    copy = directory.with_name(directory.name + "-stored")
    shutil.copytree(directory, copy)
    config = copy / "adapter_config.json"
    canonicalise(config, copy / "adapter_model.safetensors", parse_config(config), 1 << 30)
    tokens = list(islice(language.generate(read(str(copy)).weights, PROMPT), 6))
    prompt, answer = language.tokenize(PROMPT), [token.id for token in tokens]
    golden = {
        "prompt_token_ids": prompt,
        "token_ids": answer,
        "logprobs": [token.logprob for token in tokens],
        "base_logprobs": language.score("", [*prompt, *answer])[-6:],
    }
    (directory / "manifest.json").write_text(json.dumps({"golden": [golden], "dtype": "float32"}))
    return directory


def refusal(gateway: Gateway, name: str, directory: Path) -> str:
    files = [("file", (file.name, file.read_bytes())) for file in sorted(directory.iterdir())]
    with gateway.client() as client:
        answer = client.post("/v1/adapters", data={"name": name}, files=files)
    assert answer.status_code == 400, answer.text
    return str(answer.json()["error"]["message"])


def text(gateway: Gateway, name: str) -> str:
    body = {"model": name, "prompt": PROMPT, "max_tokens": 6, "temperature": 0}
    with gateway.client() as client:
        return str(client.post("/v1/completions", json=body).raise_for_status().json()["choices"][0]["text"])


def given_to_the_engine(gateway: Gateway) -> list[Path]:
    """The adapter directories that the engine loaded."""
    state = state_of(gateway, "r0")
    url = f"http://127.0.0.1:{state['port']}"
    sights = httpx2.get(f"{url}/emulator/seen", trust_env=False).json()
    loads = [Path(sight["body"]["lora_path"]) for sight in sights if sight["path"] in LOAD_ROUTES]
    return loads or sorted((gateway.state / "adapters").iterdir())  # LMDeploy reads them when it starts


def test_engines_get_the_canonical_form(engine: Gateway, tmp_path: Path) -> None:
    shown = upload(engine, "odd", with_goldens(odd_adapter(tmp_path / "odd", seed=1)))
    stored = given_to_the_engine(engine)[-1]
    assert stored.name == f"a-{shown['sha256'][:12]}"
    config = json.loads((stored / "adapter_config.json").read_text())
    assert (config["lora_alpha"], config["r"], config["use_rslora"]) == (4, 4, False)
    assert config["alpha_pattern"] == {}
    weights, original = (load_file(path / "adapter_model.safetensors") for path in (stored, tmp_path / "odd"))
    key = "base_model.model.model.layers.0.self_attn.v_proj.lora_B.weight"
    assert abs(weights[key] - original[key] * 3 / math.sqrt(4)).max() < 1e-6
    seen = shown["replicas"][0]["reason"]
    if backend(engine) == "lmdeploy":
        assert "golden prompts not asked" in seen
    else:
        assert seen == "1 golden prompt, 6 tokens: logprobs differ by 0.0000 at most, tolerance 0.05"


def test_what_the_gate_stops(engine: Gateway, tmp_path: Path) -> None:
    if backend(engine) == "lmdeploy":
        pytest.skip("LMDeploy scores no given tokens")
    upload(engine, "guard", with_goldens(adapter(tmp_path / "good", seed=2)))
    before = text(engine, "guard")
    script(engine, "r0", faults=[{"kind": "ignore", "on": "load"}])
    ignored = refusal(engine, "guard", with_goldens(adapter(tmp_path / "ignored", seed=3)))
    assert "golden prompt 1: logprob of token" in ignored and "tolerance 0.05" in ignored
    assert "the adapter is ignored" in ignored
    script(engine, "r0")
    zeroed = with_goldens(adapter(tmp_path / "zeroed", seed=4))
    path = zeroed / "adapter_model.safetensors"
    save_file({n: value if "lora_A" in n else np.zeros_like(value) for n, value in load_file(path).items()}, path)
    assert "the base model's own logprobs" in refusal(engine, "guard", zeroed)
    scaled = with_goldens(adapter(tmp_path / "scaled", seed=5))
    change_config(scaled, lora_alpha=1)
    message = refusal(engine, "guard", scaled)
    assert "golden prompt 1: logprob of token" in message and "ignored" not in message
    assert text(engine, "guard") == before  # traffic stayed on the version that passed
    with engine.client() as client:
        shown = client.get("/v1/adapters/guard").raise_for_status().json()
        failed = client.get("/v1/adapters/guard@v4").raise_for_status().json()
    assert (shown["version"], shown["state"], failed["state"]) == (1, "ready", "failed")
    assert "golden prompt 1: logprob of token" in failed["reason"]


def test_an_adapter_without_goldens_says_so(engine: Gateway, tmp_path: Path) -> None:
    shown = upload(engine, "plain", adapter(tmp_path / "plain", seed=6))
    assert shown["metadata"]["gate"] == "none"
    assert shown["replicas"][0]["reason"] is None
