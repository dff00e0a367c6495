"""The exact command line and environment of each engine, and what is refused before anything starts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from backends import registry
from backends.base import Endpoint, UnsupportedSpec
from backends.process import engine_environment
from backends.spec import BACKEND_NAMES, AdapterLoading, BackendName, EngineSpec

ENDPOINT = Endpoint("127.0.0.1", 21000, "-k3y")
ADAPTERS = {"a-bbb": Path("/adapters/bbb"), "a-aaa": Path("/adapters/aaa")}


def spec(backend: BackendName, **changes: Any) -> EngineSpec:
    fields = {"version": "1", "model_path": Path("/models/m"), "served_name": "m", "device": "cuda", "adapter_slots": 0}
    return EngineSpec(backend=backend, **(fields | changes))


def argv(given: EngineSpec, adapters: dict[str, Path] | None = None) -> str:
    """The command line after the executable, as one string."""
    launch = registry.get(given.backend).launch(given, ("/env/bin/x",), ENDPOINT, adapters or {})
    assert launch.argv[0] == "/env/bin/x"
    return " ".join(launch.argv[1:])


VLLM = "serve /models/m --host 127.0.0.1 --port 21000 --served-model-name m --dtype"
SGLANG = "--model-path /models/m --host 127.0.0.1 --port 21000 --served-model-name m --dtype"
SGLANG_COMMON = "--enable-metrics --log-level-http warning --api-key=-k3y"
LMDEPLOY = "serve api_server /models/m --server-name 127.0.0.1 --server-port 21000 --model-name m --dtype"
SGLANG_CPU = "--device cpu --attention-backend torch_native --sampling-backend pytorch"

GOLDEN = [
    pytest.param(
        spec("vllm"),
        f"{VLLM} auto --tensor-parallel-size 1 --pipeline-parallel-size 1 --disable-uvicorn-access-log",
        id="vllm-plain",
    ),
    pytest.param(
        spec(
            "vllm",
            dtype="float16",
            tensor_parallel=2,
            pipeline_parallel=2,
            quantization="awq",
            max_model_len=4096,
            memory_fraction=0.5,
            adapter_slots=4,
            max_adapters=16,
            max_adapter_rank=48,
            tool_parser="hermes",
            reasoning_parser="qwen3",
            engine_args=("--max-num-seqs", "8"),
        ),
        f"{VLLM} float16 --tensor-parallel-size 2 --pipeline-parallel-size 2 --disable-uvicorn-access-log "
        "--quantization awq --max-model-len 4096 --gpu-memory-utilization 0.5 "
        "--enable-lora --max-loras 4 --max-cpu-loras 16 --max-lora-rank 64 "
        "--enable-auto-tool-choice --tool-call-parser hermes --reasoning-parser qwen3 --max-num-seqs 8",
        id="vllm-everything",
    ),
    pytest.param(
        spec("vllm", device="cpu", adapter_slots=4, max_adapters=2, max_adapter_rank=8),
        f"{VLLM} auto --tensor-parallel-size 1 --pipeline-parallel-size 1 --disable-uvicorn-access-log "
        "--enforce-eager --kv-cache-memory-bytes 2147483648 "
        "--enable-lora --max-loras 4 --max-cpu-loras 4 --max-lora-rank 8",
        id="vllm-cpu-fewer-adapters-than-slots",
    ),
    pytest.param(
        spec("vllm", device="cpu", memory_fraction=0.25, task="embed"),
        f"{VLLM} auto --tensor-parallel-size 1 --pipeline-parallel-size 1 --disable-uvicorn-access-log "
        "--gpu-memory-utilization 0.25 --enforce-eager --runner pooling --convert embed",
        id="vllm-cpu-embed",
    ),
    pytest.param(
        spec("sglang"),
        f"{SGLANG} auto --tp-size 1 --pp-size 1 {SGLANG_COMMON}",
        id="sglang-plain",
    ),
    pytest.param(
        spec(
            "sglang",
            dtype="bfloat16",
            tensor_parallel=4,
            pipeline_parallel=2,
            quantization="gptq",
            max_model_len=4096,
            memory_fraction=0.5,
            adapter_slots=4,
            max_adapters=16,
            max_adapter_rank=48,
            tool_parser="qwen25",
            reasoning_parser="qwen3",
            engine_args=("--log-level-http", "info"),
        ),
        f"{SGLANG} bfloat16 --tp-size 4 --pp-size 2 {SGLANG_COMMON} "
        "--quantization gptq --context-length 4096 --mem-fraction-static 0.5 "
        "--enable-lora --max-loras-per-batch 5 --max-loaded-loras 16 --max-lora-rank 48 --lora-target-modules all "
        "--tool-call-parser qwen25 --reasoning-parser qwen3 --log-level-http info",
        id="sglang-everything",
    ),
    pytest.param(
        spec("sglang", device="cpu", adapter_slots=4, max_adapters=2, max_adapter_rank=8, max_model_len=32_768),
        f"{SGLANG} auto --tp-size 1 --pp-size 1 {SGLANG_COMMON} --context-length 32768 "
        f"{SGLANG_CPU} --max-total-tokens 32768 "
        "--enable-lora --max-loras-per-batch 5 --max-loaded-loras 5 --max-lora-rank 8 --lora-target-modules all "
        "--lora-backend torch_native",
        id="sglang-cpu",
    ),
    pytest.param(
        spec("sglang", device="cpu", memory_fraction=0.25, task="embed"),
        f"{SGLANG} auto --tp-size 1 --pp-size 1 {SGLANG_COMMON} --mem-fraction-static 0.25 {SGLANG_CPU} --is-embedding",
        id="sglang-cpu-embed",
    ),
    pytest.param(
        spec("lmdeploy", adapter_slots=4),
        f"{LMDEPLOY} auto --tp 1 --enable-prefix-caching --backend turbomind --api-keys=-k3y",
        id="lmdeploy-no-adapter-yet",
    ),
    pytest.param(
        spec(
            "lmdeploy",
            dtype="float16",
            tensor_parallel=2,
            quantization="awq",
            max_model_len=4096,
            memory_fraction=0.5,
            tool_parser="qwen",
            reasoning_parser="qwen-qwq",
            engine_args=("--max-batch-size", "8"),
        ),
        f"{LMDEPLOY} float16 --tp 2 --enable-prefix-caching --backend turbomind "
        "--model-format awq --session-len 4096 --cache-max-entry-count 0.5 "
        "--tool-call-parser qwen --reasoning-parser qwen-qwq --api-keys=-k3y --max-batch-size 8",
        id="lmdeploy-everything",
    ),
]


@pytest.mark.parametrize(("given", "expected"), GOLDEN)
def test_the_command_line(given: EngineSpec, expected: str) -> None:
    assert argv(given) == expected


def test_lmdeploy_serves_adapters_on_its_pytorch_engine() -> None:
    assert argv(spec("lmdeploy", adapter_slots=4), ADAPTERS) == (
        f"{LMDEPLOY} auto --tp 1 --enable-prefix-caching --backend pytorch "
        "--adapters a-aaa=/adapters/aaa a-bbb=/adapters/bbb --api-keys=-k3y"
    )


def environment(given: EngineSpec, executable: str = "/env/bin/x", endpoint: Endpoint = ENDPOINT) -> dict[str, str]:
    return dict(registry.get(given.backend).launch(given, (executable,), endpoint, {}).env)


def test_environments() -> None:
    assert environment(spec("vllm")) == {"VLLM_NO_USAGE_STATS": "1", "VLLM_API_KEY": "-k3y"}
    assert environment(spec("vllm", adapter_slots=1))["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] == "True"
    assert environment(spec("sglang", device="cpu")) == {
        "SGLANG_ENABLE_HEALTH_ENDPOINT_GENERATION": "false",
        "SGLANG_USE_CPU_ENGINE": "1",
    }
    assert environment(spec("lmdeploy")) == {"UVICORN_LOG_LEVEL": "warning"}


def test_vllm_on_cuda_has_one_openmp_thread_unless_told_otherwise() -> None:
    for device, defaults in (("cuda", {"OMP_NUM_THREADS": "1"}), ("cpu", {})):
        launch = registry.get("vllm").launch(spec("vllm", device=device), ("/env/bin/x",), ENDPOINT, {})
        assert launch.defaults == defaults
        assert engine_environment(launch, {}).get("OMP_NUM_THREADS") == defaults.get("OMP_NUM_THREADS")
        assert engine_environment(launch, {"OMP_NUM_THREADS": "4"})["OMP_NUM_THREADS"] == "4"


@pytest.mark.parametrize(
    ("config", "changes", "flagged"),
    [
        ('{"model_type": "llama"}', {}, True),
        ('{"model_type": "qwen3_moe", "num_experts": 128}', {}, False),
        ('{"text_config": {"n_routed_experts": 64}}', {}, False),
        ('{"thinker_config": {"text_config": {"num_experts": 128}}}', {}, False),
        ('{"num_local_experts": 0, "vision_config": {"depth": 2}}', {}, True),
        ('{"model_type": "llama"}', {"dtype": "float32"}, False),
        ('{"model_type": "llama"}', {"adapter_slots": 0}, False),
        ('{"model_type": "llama"}', {"task": "embed"}, False),
        ('{"model_type"', {}, False),
        ("[]", {}, False),
    ],
)
def test_sglang_spares_the_base_of_a_dense_model_the_adapters_kernels(
    tmp_path: Path, config: str, changes: dict[str, Any], flagged: bool
) -> None:
    (tmp_path / "config.json").write_text(config)
    given = argv(spec("sglang", **{"model_path": tmp_path, "adapter_slots": 4} | changes))
    assert ("--lora-backend triton_v2" in given) is flagged


def test_vllm_on_the_cpu_preloads_the_openmp_of_its_environment(tmp_path: Path) -> None:
    library = tmp_path / "lib" / "libiomp5.so"
    library.parent.mkdir()
    executable = str(tmp_path / "bin" / "vllm")
    on_cpu = spec("vllm", device="cpu")
    assert str(library) not in environment(on_cpu, executable).get("LD_PRELOAD", "")
    library.touch()
    assert environment(on_cpu, executable)["LD_PRELOAD"].split(":")[0] == str(library)
    assert "LD_PRELOAD" not in environment(spec("vllm"), executable)


@pytest.mark.parametrize("name", BACKEND_NAMES)
def test_no_key_where_none_is_wanted(name: BackendName) -> None:
    launch = registry.get(name).launch(spec(name), ("/env/bin/x",), Endpoint("127.0.0.1", 21000, ""), {})
    assert not [word for word in launch.argv if "api-key" in word]
    assert "VLLM_API_KEY" not in launch.env


@pytest.mark.parametrize(("served", "adapter"), [("vllm", "a-0123"), ("sglang", "m:a-0123"), ("lmdeploy", "a-0123")])
def test_engine_names(served: BackendName, adapter: str) -> None:
    backend = registry.get(served)
    assert backend.engine_model("m", None) == "m"
    assert backend.engine_model("m", "a-0123") == adapter


REFUSED = [
    (spec("vllm", dtype="int4"), "--dtype int4; use auto, half, float16, bfloat16, float or float32"),
    (spec("vllm", quantization="q4_k_m"), "vLLM does not take --quantization q4_k_m; use awq"),
    (spec("vllm", device="cpu", quantization="fp8"), "vLLM on the CPU does not take --quantization fp8; use awq"),
    (spec("vllm", adapter_slots=1, max_adapter_rank=513), "up to rank 512; --max-adapter-rank 513"),
    (spec("sglang", device="cpu", quantization="awq"), "leave it out or use --backend vllm"),
    (spec("sglang", device="cpu", tensor_parallel=2), "as one process; leave --tp and --pp out"),
    (spec("sglang", quantization="int3"), "SGLang does not take --quantization int3"),
    (spec("lmdeploy", device="cpu"), "--device cpu; it needs cuda. On a machine without a GPU use --backend vllm"),
    (spec("lmdeploy", pipeline_parallel=2), "no pipeline parallelism; use --tp instead of --pp 2"),
    (spec("lmdeploy", tensor_parallel=3), "not --tp 3"),
    (spec("lmdeploy", dtype="float32"), "--dtype float32; use auto, float16 or bfloat16"),
    (spec("lmdeploy", task="embed"), "does not serve embeddings; use --backend vllm or sglang"),
    (spec("lmdeploy", quantization="gguf"), "--quantization gguf"),
]


@pytest.mark.parametrize(("given", "message"), REFUSED)
def test_refusals(given: EngineSpec, message: str) -> None:
    with pytest.raises(UnsupportedSpec) as refused:
        registry.get(given.backend).check(given)
    assert message in str(refused.value)


@pytest.mark.parametrize(
    "given",
    [
        *(spec(name) for name in BACKEND_NAMES),
        spec("vllm", device="cpu", quantization="gptq", adapter_slots=4),
        spec("vllm", adapter_slots=0, max_adapter_rank=4096),
        spec("sglang", device="cpu", adapter_slots=4, max_adapter_rank=100, task="embed"),
        spec("lmdeploy", tensor_parallel=8),
        spec("lmdeploy", device="cpu", version="emulator"),
    ],
)
def test_what_can_be_served_is_not_refused(given: EngineSpec) -> None:
    registry.get(given.backend).check(given)


def test_capabilities_name_what_needs_the_gateways_help() -> None:
    loading = {name: registry.get(name).capabilities.adapter_loading for name in BACKEND_NAMES}
    assert loading == {
        "vllm": AdapterLoading.RUNTIME,
        "sglang": AdapterLoading.RUNTIME,
        "lmdeploy": AdapterLoading.AT_START,
    }
