"""How each engine is started for its recordings, and which groups of questions each start answers.

`SETUPS` are those that the emulators' recordings were made with; `ON_CUDA` the same starts on a GPU that others use
too, with little of its memory. Placeholders in arguments: {model_path}, {adapters}, {port}, {key}.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from scripts.recorder import cases, lora_cases
from scripts.recorder.cases import Case

KEY = "engine-key"
CONTEXT_TOKENS = "512"


@dataclass(frozen=True)
class Setup:
    """One start of an engine. `groups` empty: the start must fail, and its log is the recording."""

    name: str
    args: tuple[str, ...]
    groups: Mapping[str, list[Case]]  # file name -> cases
    env: Mapping[str, str] = field(default_factory=dict)
    key: str = ""
    occupy_port: bool = False


_SERVING = {
    "models": cases.MODELS,
    "chat": cases.CHATS,
    "structured": cases.STRUCTURED,
    "completions": cases.COMPLETE,
    "errors": cases.ERRORS,
    "tokenize": cases.TOKENIZE,
    "responses": cases.RESPONSES,
    "hang_up": cases.HANG_UP,
}
_NO_EMBEDDINGS = {"embeddings_off": cases.EMBEDDINGS[:1]}

_VLLM = ("serve", "{model_path}", "--host", "127.0.0.1", "--port", "{port}", "--served-model-name", "base",
         "--max-model-len", CONTEXT_TOKENS, "--dtype", "bfloat16", "--enforce-eager")  # fmt: skip
# The share is only what vLLM wants to find free; the cache's size is given.
_VLLM_CUDA = (*_VLLM, "--gpu-memory-utilization", "0.05", "--kv-cache-memory-bytes", str(1 << 30))
_SGLANG = ("--model-path", "{model_path}", "--host", "127.0.0.1", "--port", "{port}", "--served-model-name", "base",
           "--context-length", CONTEXT_TOKENS, "--max-total-tokens", "16384")  # fmt: skip
_SGLANG_CPU = (*_SGLANG, "--device", "cpu", "--attention-backend", "torch_native", "--sampling-backend", "pytorch")
# The cache is bounded by its tokens; a large share keeps neighbours that start meanwhile from making it negative.
_SGLANG_CUDA = (*_SGLANG, "--mem-fraction-static", "0.5", "--disable-cuda-graph")
_SGLANG_LORA = ("--enable-lora", "--max-lora-rank", "16", "--lora-target-modules", "all",
                "--max-loras-per-batch", "3", "--max-loaded-loras", "4")  # fmt: skip
_LMDEPLOY = ("serve", "api_server", "{model_path}", "--server-name", "127.0.0.1", "--server-port", "{port}",
             "--model-name", "base", "--session-len", CONTEXT_TOKENS, "--backend", "pytorch", "--eager-mode",
             "--max-batch-size", "64", "--cache-max-entry-count")  # fmt: skip


def _failures(base: tuple[str, ...]) -> list[Setup]:
    wrong_path = tuple("/no/such/model" if arg == "{model_path}" else arg for arg in base)
    return [
        Setup("start_unknown_flag", (*base, "--no-such-flag"), {}),
        Setup("start_no_model", wrong_path, {}),
        Setup("start_port_taken", base, {}, occupy_port=True),
    ]


def _vllm(base: tuple[str, ...]) -> list[Setup]:
    return [
        Setup(
            "main",
            (*base, "--api-key", KEY, "--enable-lora", "--max-loras", "2", "--max-cpu-loras", "4",
             "--max-lora-rank", "16", "--enable-auto-tool-choice", "--tool-call-parser", "hermes"),
            {"auth": cases.AUTH, **_SERVING, **_NO_EMBEDDINGS, "tools": cases.TOOLS, "lora": lora_cases.VLLM,
             "admin": lora_cases.ADMIN["vllm"], "metrics": cases.METRICS, "deadly": cases.DEADLY},
            env={"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True"},
            key=KEY,
        ),
        Setup("plain", base, {"tools_off": cases.TOOLS, "lora_off": lora_cases.VLLM_OFF}),
        Setup("embed", (*base, "--runner", "pooling", "--convert", "embed"),
              {"embeddings": [*cases.EMBEDDINGS, *cases.ON_AN_EMBEDDER]}),
        *_failures(base),
    ]  # fmt: skip


def _sglang(base: tuple[str, ...], lora: tuple[str, ...]) -> list[Setup]:
    return [
        Setup(
            "main",
            (*base, *lora, "--api-key", KEY, "--enable-metrics", "--tool-call-parser", "qwen25"),
            {"auth": cases.AUTH, **_SERVING, **_NO_EMBEDDINGS, "tools": cases.TOOLS, "lora": lora_cases.SGLANG,
             "admin": lora_cases.ADMIN["sglang"], "metrics": cases.METRICS, "deadly": cases.DEADLY,
             "lora_deadly": lora_cases.SGLANG_DEADLY},
            key=KEY,
        ),
        Setup("plain", base,
              {"tools_off": cases.TOOLS, "lora_off": lora_cases.SGLANG_OFF, "metrics_off": cases.METRICS}),
        Setup("embed", (*base, "--is-embedding"), {"embeddings": [*cases.EMBEDDINGS, *cases.ON_AN_EMBEDDER]}),
        *_failures(base),
    ]  # fmt: skip


def _lmdeploy(base: tuple[str, ...]) -> list[Setup]:
    turbomind = tuple("turbomind" if arg == "pytorch" else arg for arg in base if arg != "--eager-mode")
    return [
        Setup(
            "main",
            (*base, "--api-keys", KEY, "--adapters", "good={adapters}/good", "second={adapters}/second",
             "--tool-call-parser", "qwen2d5", "--logprobs-mode", "raw_logprobs"),
            {"auth": cases.AUTH, **_SERVING, **_NO_EMBEDDINGS, "tools": cases.TOOLS, "lora": lora_cases.LMDEPLOY,
             "admin": lora_cases.ADMIN["lmdeploy"], "metrics": cases.METRICS, "deadly": cases.DEADLY},
            key=KEY,
        ),
        Setup("plain", base, {"tools_off": cases.TOOLS,
              "logprobs_off": [case for case in cases.CHATS + cases.COMPLETE if "logprobs" in case.name]}),
        Setup("turbomind", turbomind,
              {"turbomind": [*cases.MODELS[:4], *cases.CHATS[:6], *cases.COMPLETE[:8], *cases.EMBEDDINGS[:1]]}),
        Setup("start_adapter_missing", (*base, "--adapters", "x={adapters}/nowhere"), {}),
        Setup("start_adapter_wrong_base", (*base, "--adapters", "x={adapters}/smaller"), {}),
        *_failures(base),
    ]  # fmt: skip


SETUPS: dict[str, list[Setup]] = {
    "vllm": _vllm(_VLLM),
    "sglang": _sglang(_SGLANG_CPU, (*_SGLANG_LORA, "--lora-backend", "torch_native")),
    "lmdeploy": _lmdeploy((*_LMDEPLOY, "0.1")),
}
ON_CUDA: dict[str, list[Setup]] = {
    "vllm": _vllm(_VLLM_CUDA),
    "sglang": _sglang(_SGLANG_CUDA, _SGLANG_LORA),
    "lmdeploy": _lmdeploy((*_LMDEPLOY, "0.02")),
}
