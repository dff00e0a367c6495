"""Readiness, adapter operations and recognition, against answers recorded from the real engines."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2
import pytest

from backends import registry, upstream
from backends.base import AdapterRejected, Endpoint, EngineUnreachable, UnsupportedSpec
from backends.spec import BACKEND_NAMES, BackendName, EngineSpec

RECORDINGS = Path(registry.__file__).parent / "emulator" / "recordings"
ADAPTER = Path("/adapters/good")
Handler = Callable[[httpx2.Request], httpx2.Response]


def recorded(engine: str, setup: str, case: str) -> httpx2.Response:
    """One recorded answer, as httpx2 would give it."""
    answer = json.loads((RECORDINGS / engine / f"{setup}.json").read_text())["cases"][case]["response"]
    content = json.dumps(answer["json"]) if "json" in answer else answer.get("text", "")
    return httpx2.Response(answer["status"], content=content, headers=answer["headers"])


def client(handler: Handler) -> httpx2.AsyncClient:
    return httpx2.AsyncClient(base_url="http://engine", transport=httpx2.MockTransport(handler))


def answering(*answers: httpx2.Response, seen: list[tuple[str, Any]] | None = None) -> httpx2.AsyncClient:
    """A client of an engine that gives these answers in this order."""
    waiting = list(answers)

    def handle(request: httpx2.Request) -> httpx2.Response:
        if seen is not None:
            seen.append((request.url.path, json.loads(request.content) if request.content else None))
        return waiting.pop(0)

    return client(handle)


def unreachable(request: httpx2.Request) -> httpx2.Response:
    raise httpx2.ConnectError("connection refused", request=request)


def hanging(request: httpx2.Request) -> httpx2.Response:
    raise httpx2.ReadTimeout("", request=request)


async def load(engine: BackendName, *answers: httpx2.Response) -> None:
    await registry.get(engine).load_adapter(answering(*answers), "good", ADAPTER)


@pytest.mark.parametrize(("engine", "path"), [("vllm", "/v1/load_lora_adapter"), ("sglang", "/load_lora_adapter")])
async def test_load(engine: BackendName, path: str) -> None:
    seen: list[tuple[str, Any]] = []
    http = answering(recorded(engine, "lora", "load"), seen=seen)
    await registry.get(engine).load_adapter(http, "good", ADAPTER)
    assert seen == [(path, {"lora_name": "good", "lora_path": "/adapters/good"})]


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
async def test_what_is_loaded_already_is_loaded(engine: BackendName) -> None:
    await load(engine, recorded(engine, "lora", "load_again"))


@pytest.mark.parametrize(
    ("engine", "case", "message"),
    [
        ("vllm", "load_rank_too_high", "LoRA rank 64 is greater than max_lora_rank 16."),
        ("vllm", "load_dora", "vLLM does not yet support DoRA."),
        ("vllm", "load_missing_path", "No adapter found for"),
        ("sglang", "load_no_config", "No such file or directory"),
        ("sglang", "load_no_weights", "Cannot find any model weights"),
    ],
)
async def test_a_refused_adapter_carries_the_engines_own_words(engine: BackendName, case: str, message: str) -> None:
    with pytest.raises(AdapterRejected) as refused:
        await load(engine, recorded(engine, "lora", case))
    assert message in str(refused.value)


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
async def test_an_engine_started_without_adapters(engine: BackendName) -> None:
    with pytest.raises(UnsupportedSpec, match="--enable-lora"):
        await load(engine, recorded(engine, "lora_off", "load_without_lora"))
    with pytest.raises(UnsupportedSpec, match="--enable-lora"):
        answer = recorded(engine, "lora_off", "unload_without_lora")
        await registry.get(engine).unload_adapter(answering(answer), "good")


async def test_a_dead_engine_core_is_not_the_adapters_fault() -> None:
    message = "EngineCore encountered an issue. See stack trace (above) for the root cause."
    with pytest.raises(EngineUnreachable, match="engine core has died"):
        await load("vllm", httpx2.Response(500, json={"error": {"message": message}}))


@pytest.mark.parametrize(
    ("engine", "case"),
    [("vllm", "unload"), ("vllm", "unload_again"), ("sglang", "unload"), ("sglang", "unload_unknown")],
)
async def test_unload_of_a_known_and_of_an_unknown_adapter(engine: BackendName, case: str) -> None:
    await registry.get(engine).unload_adapter(answering(recorded(engine, "lora", case)), "good")


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
async def test_an_unload_that_fails(engine: BackendName) -> None:
    with pytest.raises(EngineUnreachable, match="did not unload good: broken"):
        await registry.get(engine).unload_adapter(answering(httpx2.Response(500, json={"message": "broken"})), "good")


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
@pytest.mark.parametrize(("failure", "message"), [(unreachable, "cannot be reached"), (hanging, "did not answer")])
async def test_no_answer(engine: BackendName, failure: Handler, message: str) -> None:
    backend = registry.get(engine)
    for operation in (
        backend.load_adapter(client(failure), "good", ADAPTER),
        backend.unload_adapter(client(failure), "good"),
        backend.list_adapters(client(failure)),
    ):
        with pytest.raises(EngineUnreachable, match=message):
            await operation


@pytest.mark.parametrize(
    ("engine", "case", "adapters"),
    [
        ("vllm", "models_with_adapter", {"good"}),
        ("vllm", "models_with_many", {"smaller", "second", "third", "fourth", "fifth"}),
        ("sglang", "models_with_adapter", {"good"}),
        ("sglang", "models_after_unload", {"modules_to_save"}),
        ("lmdeploy", "models_with_adapter", {"good", "second"}),
    ],
)
async def test_the_adapters_an_engine_lists(engine: BackendName, case: str, adapters: set[str]) -> None:
    answer = recorded(engine, "lora", case)
    assert await registry.get(engine).list_adapters(answering(answer)) == adapters


async def test_lmdeploy_takes_adapters_only_at_its_start() -> None:
    backend = registry.get("lmdeploy")
    with pytest.raises(UnsupportedSpec, match="started again"):
        await backend.load_adapter(answering(), "good", ADAPTER)
    with pytest.raises(UnsupportedSpec, match="started again"):
        await backend.unload_adapter(answering(), "good")


@pytest.mark.parametrize(
    ("engine", "answers", "ready"),
    [
        ("vllm", [recorded("vllm", "models", "health")], True),
        ("vllm", [httpx2.Response(503)], False),
        ("sglang", [recorded("sglang", "models", "ready")], True),
        ("sglang", [httpx2.Response(503)], False),
        ("sglang", [httpx2.Response(404), httpx2.Response(200)], True),  # an older one has no /ready
        ("lmdeploy", [recorded("lmdeploy", "models", "health")], True),
        ("lmdeploy", [httpx2.Response(503, json={"status": "initializing"})], False),
        ("lmdeploy", [httpx2.Response(200, json={"status": "sleeping"})], False),
        ("lmdeploy", [httpx2.Response(200, text="fine")], False),
    ],
)
async def test_readiness(engine: BackendName, answers: list[httpx2.Response], ready: bool) -> None:
    assert await registry.get(engine).is_ready(answering(*answers)) is ready


@pytest.mark.parametrize("engine", BACKEND_NAMES)
@pytest.mark.parametrize("failure", [unreachable, hanging])
async def test_an_engine_that_does_not_answer_is_not_ready(engine: BackendName, failure: Handler) -> None:
    assert await registry.get(engine).is_ready(client(failure)) is False


def spec(engine: BackendName, **fields: Any) -> EngineSpec:
    given = {"version": "1", "model_path": "/m", "served_name": "base", "device": "cuda"} | fields
    return EngineSpec(backend=engine, **given)


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        (httpx2.Response(200), "first sampled token took"),
        (httpx2.Response(400, json={"message": "no"}), "sampled no first token: no"),
    ],
)
async def test_sglang_samples_once_before_it_serves(
    answer: httpx2.Response, told: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The first request with top_k compiles its kernels; how it is answered does not matter, and is told."""
    caplog.set_level("INFO")
    seen: list[tuple[str, Any]] = []
    await registry.get("sglang").warm_up(answering(answer, seen=seen), spec("sglang"))
    assert told in caplog.text
    [(path, body)] = seen
    assert (path, body["model"], body["top_k"], body["max_tokens"]) == ("/v1/completions", "base", 2, 1)
    assert body["temperature"] > 0  # a greedy request does not sample


async def test_a_warm_up_that_takes_too_long_is_given_up() -> None:
    await registry.get("sglang").warm_up(client(hanging), spec("sglang"))
    with pytest.raises(EngineUnreachable):
        await registry.get("sglang").warm_up(client(unreachable), spec("sglang"))


@pytest.mark.parametrize(
    "cold", [spec("sglang", device="cpu"), spec("sglang", task="embed"), spec("vllm"), spec("lmdeploy")]
)
async def test_nothing_to_warm_up(cold: EngineSpec) -> None:
    await registry.get(cold.backend).warm_up(client(unreachable), cold)


@pytest.mark.parametrize("engine", BACKEND_NAMES)
async def test_engines_are_recognised(engine: BackendName) -> None:
    assert (await registry.recognise(answering(recorded(engine, "models", "models")))).name == engine


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (httpx2.Response(200, json={"data": [{"id": "x", "owned_by": "ollama"}]}), "signed ollama"),
        (httpx2.Response(200, json={"data": []}), "signed by nobody"),
        (httpx2.Response(200, json={"models": []}), "no model list"),
        (httpx2.Response(200, text="<html>"), "no model list: <html>"),
        (httpx2.Response(200, json=[1]), "no model list"),
        (httpx2.Response(404, json={"detail": "Not Found"}), "answered 404: Not Found"),
        (httpx2.Response(401, json={"error": "Unauthorized"}), "refuses our API key"),
    ],
)
async def test_what_is_none_of_them_is_refused(answer: httpx2.Response, message: str) -> None:
    with pytest.raises(EngineUnreachable, match=message):
        await registry.recognise(answering(answer))


async def test_a_client_sends_the_engines_key() -> None:
    async with upstream.connect(Endpoint("127.0.0.1", 21000, "k3y")) as http:
        assert str(http.base_url) == "http://127.0.0.1:21000"
        assert http.headers["authorization"] == "Bearer k3y"
    async with upstream.connect(Endpoint("127.0.0.1", 21000, "")) as http:
        assert "authorization" not in http.headers


async def test_the_model_list_with_lengths() -> None:
    (card,) = await upstream.list_models(answering(recorded("vllm", "models", "models")))
    assert (card.id, card.parent, card.max_model_len) == ("base", None, 512)
