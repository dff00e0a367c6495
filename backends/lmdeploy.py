"""LMDeploy: `lmdeploy serve api_server`. Adapters are listed at its start; a change of them is a restart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import httpx2

from backends import failures, upstream
from backends.base import Backend, Endpoint, Launch, UnsupportedSpec
from backends.checks import check_capabilities, check_choice
from backends.spec import AdapterLoading, Capabilities, EngineSpec

_DTYPES = ("auto", "float16", "bfloat16")
_AT_START = "LMDeploy takes adapters only when it starts; the replica must be started again with the new set"


class Lmdeploy(Backend):
    """See `Backend`."""

    name = "lmdeploy"
    capabilities = Capabilities(
        adapter_loading=AdapterLoading.AT_START,
        adapter_ranks=None,
        quantizations=("awq", "gptq", "compressed-tensors", "fp8", "mxfp4"),
        devices=("cuda",),
        embeddings=False,
        responses_api=True,
        tool_parsers=True,
        pipeline_parallel=False,
        notes=(
            "adapters run on its PyTorch engine; without any its faster TurboMind serves, where it knows the model",
            "--memory-fraction is of the memory that the weights leave free, for the KV cache",
        ),
    )

    def check(self, spec: EngineSpec) -> None:
        check_capabilities("LMDeploy", self.capabilities, spec)
        check_choice("LMDeploy", "--dtype", spec.dtype, _DTYPES)
        check_choice("LMDeploy", "--quantization", spec.quantization, self.capabilities.quantizations)
        if spec.tensor_parallel & (spec.tensor_parallel - 1):
            raise UnsupportedSpec(f"LMDeploy takes 1, 2, 4, 8 … GPUs a replica, not --tp {spec.tensor_parallel}")

    def launch(
        self,
        spec: EngineSpec,
        executable: tuple[str, ...],
        endpoint: Endpoint,
        static_adapters: Mapping[str, Path],
    ) -> Launch:
        argv = [*executable, "serve", "api_server", str(spec.model_path)]
        argv += ["--server-name", endpoint.host, "--server-port", str(endpoint.port)]
        argv += ["--model-name", spec.served_name, "--dtype", spec.dtype]
        argv += ["--tp", str(spec.tensor_parallel), "--enable-prefix-caching"]
        # TurboMind drops --adapters without a word. It gives way to PyTorch by itself for models it does not know.
        argv += ["--backend", "pytorch" if static_adapters else "turbomind"]
        if spec.quantization:
            argv += ["--model-format", spec.quantization]
        if spec.max_model_len:
            argv += ["--session-len", str(spec.max_model_len)]
        if spec.memory_fraction:
            argv += ["--cache-max-entry-count", str(spec.memory_fraction)]
        if static_adapters:
            argv += ["--adapters", *(f"{adapter_id}={path}" for adapter_id, path in sorted(static_adapters.items()))]
        if spec.tool_parser:
            argv += ["--tool-call-parser", spec.tool_parser]
        if spec.reasoning_parser:
            argv += ["--reasoning-parser", spec.reasoning_parser]
        if endpoint.api_key:
            # Visible to every user of the machine; LMDeploy takes a key in no other way. `=`: it may begin with a dash.
            argv += [f"--api-keys={endpoint.api_key}"]
        return Launch((*argv, *spec.engine_args), {"UVICORN_LOG_LEVEL": "warning"})

    def engine_model(self, served_name: str, adapter_id: str | None) -> str:
        return adapter_id or served_name

    async def is_ready(self, client: httpx2.AsyncClient) -> bool:
        response = await upstream.answers(client, "/health")
        if response is None or response.status_code != 200:
            return False
        try:
            return bool(response.json()["status"] == "healthy")  # `sleeping` is 200 too, and answers no request
        except (ValueError, KeyError, TypeError):
            return False

    async def load_adapter(self, client: httpx2.AsyncClient, adapter_id: str, path: Path) -> None:
        raise UnsupportedSpec(_AT_START)

    async def unload_adapter(self, client: httpx2.AsyncClient, adapter_id: str) -> None:
        raise UnsupportedSpec(_AT_START)

    async def list_adapters(self, client: httpx2.AsyncClient) -> frozenset[str]:
        cards = await upstream.list_models(client)
        return frozenset(card.id for card in cards[1:])  # it names no parents; the base is first

    async def score(
        self,
        client: httpx2.AsyncClient,
        names: tuple[str, str | None],
        prompt: Sequence[int],
        answer: Sequence[int],
        timeout_s: float,
    ) -> list[float] | None:
        return None  # its /generate gives them, of the base alone

    def start_failure(self, log_tail: str) -> str | None:
        return failures.find(log_tail)
