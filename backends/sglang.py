"""SGLang: `python -m sglang.launch_server`. Adapters come and go over HTTP.

What a gateway must know: it answers an unknown `model` from the base, and loads an unloaded adapter again for the next
request that names it; so only names we know may reach it.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import httpx2

from backends import failures, scoring, upstream
from backends.base import AdapterRejected, Backend, Endpoint, EngineUnreachable, Launch, UnsupportedSpec
from backends.checks import check_capabilities, check_choice
from backends.spec import FLOAT32_DTYPES, AdapterLoading, Capabilities, EngineSpec

_log = logging.getLogger(__name__)
_DTYPES = ("auto", "half", "float16", "bfloat16", "float", "float32")
_CPU_KV_CACHE_TOKENS = 16_384  # its own default takes most of the machine's memory
_WARM_UP_TIMEOUT_S = 400.0
_CPU_ARGUMENTS = ("--device", "cpu", "--attention-backend", "torch_native", "--sampling-backend", "pytorch")


class Sglang(Backend):
    """See `Backend`."""

    name = "sglang"
    capabilities = Capabilities(
        adapter_loading=AdapterLoading.RUNTIME,
        adapter_ranks=None,
        quantizations=(
            *("awq", "gptq", "awq_marlin", "gptq_marlin", "compressed-tensors", "fp8", "w8a8_int8", "w8a8_fp8"),
            *("modelopt", "modelopt_fp8", "modelopt_fp4", "mxfp4", "bitsandbytes", "gguf"),
        ),
        devices=("cuda", "cpu"),
        embeddings=True,
        responses_api=True,
        tool_parsers=True,
        pipeline_parallel=True,
        notes=(
            "on the CPU: unquantized checkpoints, without its own kernels; for development and tests",
            "a request's `seed` counts only with --engine-arg=--enable-deterministic-inference, which costs speed",
        ),
    )

    def check(self, spec: EngineSpec) -> None:
        check_capabilities("SGLang", self.capabilities, spec)
        check_choice("SGLang", "--dtype", spec.dtype, _DTYPES)
        if spec.device == "cpu":
            check_choice("SGLang on the CPU", "--quantization", spec.quantization, ())
            if spec.tensor_parallel * spec.pipeline_parallel > 1:  # it wants a NUMA node and a kernel for each
                raise UnsupportedSpec("SGLang on the CPU runs as one process; leave --tp and --pp out")
        check_choice("SGLang", "--quantization", spec.quantization, self.capabilities.quantizations)

    def launch(
        self,
        spec: EngineSpec,
        executable: tuple[str, ...],
        endpoint: Endpoint,
        static_adapters: Mapping[str, Path],
    ) -> Launch:
        argv = [*executable, "--model-path", str(spec.model_path)]
        argv += ["--host", endpoint.host, "--port", str(endpoint.port)]
        argv += ["--served-model-name", spec.served_name, "--dtype", spec.dtype]
        argv += ["--tp-size", str(spec.tensor_parallel), "--pp-size", str(spec.pipeline_parallel)]
        argv += ["--enable-metrics", "--log-level-http", "warning"]
        if endpoint.api_key:
            # Visible to every user of the machine; SGLang takes a key in no other way. `=`: it may begin with a dash.
            argv += [f"--api-key={endpoint.api_key}"]
        if spec.quantization:
            argv += ["--quantization", spec.quantization]
        if spec.max_model_len:
            argv += ["--context-length", str(spec.max_model_len)]
        if spec.memory_fraction:
            argv += ["--mem-fraction-static", str(spec.memory_fraction)]
        if spec.device == "cpu":
            argv += _CPU_ARGUMENTS
            if not spec.memory_fraction:
                argv += ["--max-total-tokens", str(max(_CPU_KV_CACHE_TOKENS, spec.max_model_len or 0))]
        if spec.adapter_slots:
            slots = spec.adapter_slots + 1  # SGLang counts requests without an adapter as one more adapter
            argv += ["--enable-lora", "--max-loras-per-batch", str(slots)]
            argv += ["--max-loaded-loras", str(max(spec.max_adapters, slots))]
            argv += ["--max-lora-rank", str(spec.max_adapter_rank), "--lora-target-modules", "all"]
            if spec.device == "cpu":
                argv += ["--lora-backend", "torch_native"]
            elif spec.task == "generate" and spec.dtype not in FLOAT32_DTYPES and _is_dense(spec.model_path):
                # Its default launches adapter kernels in every decode step, for the base too: twice the time a token.
                argv += ["--lora-backend", "triton_v2"]
        if spec.task == "embed":
            argv += ["--is-embedding"]
        if spec.tool_parser:
            argv += ["--tool-call-parser", spec.tool_parser]
        if spec.reasoning_parser:
            argv += ["--reasoning-parser", spec.reasoning_parser]
        return Launch((*argv, *spec.engine_args), _environment(spec))

    def engine_model(self, served_name: str, adapter_id: str | None) -> str:
        return f"{served_name}:{adapter_id}" if adapter_id else served_name

    async def is_ready(self, client: httpx2.AsyncClient) -> bool:
        # Not /health: unless told otherwise at start (an attached one may not have been) it generates a token, 1 s.
        response = await upstream.answers(client, "/ready")
        if response is not None and response.status_code == 404:  # older than 0.5.20
            response = await upstream.answers(client, "/health")
        return response is not None and response.status_code == 200

    async def warm_up(self, client: httpx2.AsyncClient, spec: EngineSpec) -> None:
        # The first request with top_k, top_p or min_p makes it compile FlashInfer's sampling kernels, in the scheduler:
        # for a minute or more nobody is answered. Its own warm-up is greedy and does not. Kept in ~/.cache afterwards.
        if spec.device != "cuda" or spec.task != "generate":
            return
        body = {"model": spec.served_name, "prompt": "a", "max_tokens": 1, "temperature": 1, "top_k": 2}
        started = time.monotonic()
        try:
            response = await upstream.post(client, "/v1/completions", body, _WARM_UP_TIMEOUT_S)
            if response.status_code == 200:
                _log.info("SGLang's first sampled token took %.1f s", time.monotonic() - started)
            else:
                _log.warning("SGLang sampled no first token: %s", upstream.error_text(response))
        except EngineUnreachable as error:
            if not isinstance(error.__cause__, httpx2.TimeoutException):
                raise
            _log.warning("SGLang still compiles its sampling kernels: %s", error)

    async def load_adapter(self, client: httpx2.AsyncClient, adapter_id: str, path: Path) -> None:
        body = {"lora_name": adapter_id, "lora_path": str(path)}
        response = await upstream.post(client, "/load_lora_adapter", body, upstream.LOAD_TIMEOUT_S)
        message = _message(response)
        if response.status_code == 200 or "already loaded" in message:
            return  # ids name contents: what is there under this id is this adapter
        raise AdapterRejected(message)

    async def unload_adapter(self, client: httpx2.AsyncClient, adapter_id: str) -> None:
        body = {"lora_name": adapter_id}
        response = await upstream.post(client, "/unload_lora_adapter", body, upstream.UNLOAD_TIMEOUT_S)
        message = _message(response)
        if response.status_code != 200 and "does not exist" not in message:
            raise EngineUnreachable(f"SGLang did not unload {adapter_id}: {message}")

    async def list_adapters(self, client: httpx2.AsyncClient) -> frozenset[str]:
        return frozenset(card.id for card in await upstream.list_models(client) if card.parent)

    async def score(
        self,
        client: httpx2.AsyncClient,
        names: tuple[str, str | None],
        prompt: Sequence[int],
        answer: Sequence[int],
        timeout_s: float,
    ) -> list[float] | None:
        return await scoring.sglang(client, names[1], prompt, answer, timeout_s)

    def start_failure(self, log_tail: str) -> str | None:
        return failures.find(log_tail)


def _message(response: httpx2.Response) -> str:
    """What SGLang says of an adapter operation. Raises UnsupportedSpec when it serves without adapters."""
    message = upstream.error_text(response)
    if "LoRA is not enabled" in message:
        raise UnsupportedSpec(f"the SGLang at {response.request.url.host} serves without adapters; {message}")
    return message


def _is_dense(model: Path) -> bool:
    """No mixture of experts, by its config.json: SGLang takes their adapters by `triton_v2` with other flags only.

    False where it cannot be read: that is told when the checkpoint is opened.
    """
    try:
        config = json.loads((model / "config.json").read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and not _has_experts(config)


def _has_experts(config: dict[str, object]) -> bool:
    """The language model's part of a config has no one place: text_config, llm_config, thinker_config.text_config."""
    return any(("expert" in key and bool(value)) or (isinstance(value, dict) and _has_experts(value))
               for key, value in config.items())  # fmt: skip


def _environment(spec: EngineSpec) -> dict[str, str]:
    environment = {"SGLANG_ENABLE_HEALTH_ENDPOINT_GENERATION": "false"}
    if spec.device == "cpu":
        environment["SGLANG_USE_CPU_ENGINE"] = "1"
    return environment
