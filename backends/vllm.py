"""vLLM: `vllm serve`. Adapters come and go over HTTP."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import httpx2

from backends import failures, scoring, upstream
from backends.base import AdapterRejected, Backend, Endpoint, EngineUnreachable, Launch, UnsupportedSpec
from backends.checks import check_capabilities, check_choice
from backends.spec import AdapterLoading, Capabilities, Device, EngineSpec

_DTYPES = ("auto", "half", "float16", "bfloat16", "float", "float32")
_CPU_QUANTIZATIONS = ("awq", "gptq", "compressed-tensors")  # fp8 loads on the CPU and never answers
_CPU_KV_CACHE_BYTES = 2 << 30  # vLLM's own default takes 0.9 of the machine's memory
# On CUDA it copies an adapter tensor by tensor into pinned memory, in the loop that steps the model. With a thread for
# each core that took 4 s for 504 tensors; with one, 0.1 s. By its source it sets this itself with --tp.
_DEFAULTS: Mapping[Device, Mapping[str, str]] = {"cuda": {"OMP_NUM_THREADS": "1"}, "cpu": {}}
_TCMALLOC = (
    "/usr/lib/x86_64-linux-gnu/libtcmalloc_minimal.so.4",
    "/usr/lib/aarch64-linux-gnu/libtcmalloc_minimal.so.4",
)


class Vllm(Backend):
    """See `Backend`."""

    name = "vllm"
    capabilities = Capabilities(
        adapter_loading=AdapterLoading.RUNTIME,
        adapter_ranks=(1, 8, 16, 32, 64, 128, 256, 320, 512),
        quantizations=("awq", "gptq", "awq_marlin", "gptq_marlin", "compressed-tensors", "fp8", "modelopt", "mxfp4"),
        devices=("cuda", "cpu"),
        embeddings=True,
        responses_api=True,
        tool_parsers=True,
        pipeline_parallel=True,
        notes=("on the CPU: awq, gptq and compressed-tensors checkpoints; no CUDA graphs, no compilation",),
    )

    def check(self, spec: EngineSpec) -> None:
        check_capabilities("vLLM", self.capabilities, spec)
        check_choice("vLLM", "--dtype", spec.dtype, _DTYPES)
        if spec.device == "cpu":
            check_choice("vLLM on the CPU", "--quantization", spec.quantization, _CPU_QUANTIZATIONS)
        check_choice("vLLM", "--quantization", spec.quantization, self.capabilities.quantizations)

    def launch(
        self,
        spec: EngineSpec,
        executable: tuple[str, ...],
        endpoint: Endpoint,
        static_adapters: Mapping[str, Path],
    ) -> Launch:
        argv = [*executable, "serve", str(spec.model_path)]
        argv += ["--host", endpoint.host, "--port", str(endpoint.port)]
        argv += ["--served-model-name", spec.served_name, "--dtype", spec.dtype]
        argv += ["--tensor-parallel-size", str(spec.tensor_parallel)]
        argv += ["--pipeline-parallel-size", str(spec.pipeline_parallel)]
        argv += ["--disable-uvicorn-access-log"]  # a line a request, which we write ourselves
        if spec.quantization:
            argv += ["--quantization", spec.quantization]
        if spec.max_model_len:
            argv += ["--max-model-len", str(spec.max_model_len)]
        if spec.memory_fraction:
            argv += ["--gpu-memory-utilization", str(spec.memory_fraction)]
        if spec.device == "cpu":
            # Compiling takes a minute more to start for a quarter more tokens/s, and vLLM skips it where LoRA is on.
            argv += ["--enforce-eager"]
            if not spec.memory_fraction:
                argv += ["--kv-cache-memory-bytes", str(_CPU_KV_CACHE_BYTES)]
        if spec.adapter_slots:
            argv += ["--enable-lora", "--max-loras", str(spec.adapter_slots)]
            argv += ["--max-cpu-loras", str(max(spec.max_adapters, spec.adapter_slots))]
            argv += ["--max-lora-rank", str(self._rank_limit(spec.max_adapter_rank))]
        if spec.task == "embed":
            argv += ["--runner", "pooling", "--convert", "embed"]
        if spec.tool_parser:
            argv += ["--enable-auto-tool-choice", "--tool-call-parser", spec.tool_parser]
        if spec.reasoning_parser:
            argv += ["--reasoning-parser", spec.reasoning_parser]
        return Launch((*argv, *spec.engine_args), _environment(spec, executable, endpoint), _DEFAULTS[spec.device])

    def _rank_limit(self, rank: int) -> int:
        """The smallest limit vLLM allows that admits `rank`."""
        return next(allowed for allowed in self.capabilities.adapter_ranks or () if allowed >= rank)

    def engine_model(self, served_name: str, adapter_id: str | None) -> str:
        return adapter_id or served_name

    async def is_ready(self, client: httpx2.AsyncClient) -> bool:
        # The port opens when the model is loaded; /health then answers 503 once the engine core has died.
        response = await upstream.answers(client, "/health")
        return response is not None and response.status_code == 200

    async def load_adapter(self, client: httpx2.AsyncClient, adapter_id: str, path: Path) -> None:
        body = {"lora_name": adapter_id, "lora_path": str(path)}
        response = await upstream.post(client, "/v1/load_lora_adapter", body, upstream.LOAD_TIMEOUT_S)
        message = _message(response)
        if response.status_code == 200 or "has already been loaded" in message:
            return  # ids name contents: what is there under this id is this adapter
        if "EngineCore encountered an issue" in message:
            raise EngineUnreachable(f"vLLM's engine core has died: {message}")
        raise AdapterRejected(message)

    async def unload_adapter(self, client: httpx2.AsyncClient, adapter_id: str) -> None:
        body = {"lora_name": adapter_id}
        response = await upstream.post(client, "/v1/unload_lora_adapter", body, upstream.UNLOAD_TIMEOUT_S)
        message = _message(response)
        if response.status_code not in (200, 404):
            raise EngineUnreachable(f"vLLM did not unload {adapter_id}: {message}")

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
        return await scoring.vllm(client, self.engine_model(*names), prompt, answer, timeout_s)

    def start_failure(self, log_tail: str) -> str | None:
        return failures.find(log_tail)


def _message(response: httpx2.Response) -> str:
    """What vLLM says of an adapter operation. Raises UnsupportedSpec when it has no such route."""
    message = upstream.error_text(response)
    if response.status_code == 404 and message == "Not Found":  # FastAPI's own words; vLLM's name the adapter
        raise UnsupportedSpec(
            f"the vLLM at {response.request.url.host} takes no adapters while it serves; start it with --enable-lora "
            "and VLLM_ALLOW_RUNTIME_LORA_UPDATING=True in its environment"
        )
    return message


def _environment(spec: EngineSpec, executable: tuple[str, ...], endpoint: Endpoint) -> dict[str, str]:
    environment = {"VLLM_NO_USAGE_STATS": "1"}
    if endpoint.api_key:
        environment["VLLM_API_KEY"] = endpoint.api_key  # arguments are visible to every user of the machine
    if spec.adapter_slots:
        environment["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] = "True"
    if spec.device == "cpu" and (libraries := _preloads(Path(executable[0]).parent.parent)):
        environment["LD_PRELOAD"] = ":".join(libraries)
    return environment


def _preloads(engine_root: Path) -> list[str]:
    """The faster OpenMP runtime and allocator that vLLM asks for on the CPU, where they are installed."""
    candidates = (engine_root / "lib" / "libiomp5.so", *map(Path, _TCMALLOC))
    return [str(library) for library in candidates if library.exists()]
