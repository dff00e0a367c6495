"""The questions about adapters: each engine has its own routes and its own hazards."""

from __future__ import annotations

from typing import Any

from scripts.recorder.cases import CHAT, MODEL, Case, chat, complete, get


def _vllm_load(name: str, path: str, adapter: str | None = None, **more: Any) -> Case:
    body = {"lora_name": adapter or path, "lora_path": f"{{adapters}}/{path}"} | more
    return Case(name, "/v1/load_lora_adapter", body)


def _vllm_unload(name: str, adapter: str) -> Case:
    return Case(name, "/v1/unload_lora_adapter", {"lora_name": adapter})


VLLM = [
    _vllm_load("load", "good"),
    get("models_with_adapter", "/v1/models"),
    get("retrieve_adapter", "/v1/models/good"),
    chat("chat_base", max_tokens=12),
    chat("chat_adapter", model="good", max_tokens=12),
    chat("chat_adapter_stream", model="good", stream=True),
    complete("completion_adapter", model="good"),
    Case("tokenize_adapter", "/tokenize", {"model": "good", "prompt": "Hello world"}),
    _vllm_load("load_again", "good"),
    _vllm_load("load_in_place", "second", "good", load_inplace=True),
    chat("chat_adapter_replaced", model="good", max_tokens=12),
    _vllm_load("load_as_base", "second", "base"),
    _vllm_load("load_missing_path", "nowhere"),
    Case("load_repo_path", "/v1/load_lora_adapter", {"lora_name": "x", "lora_path": "some/repo"}),
    _vllm_load("load_rank_too_high", "rank64"),
    _vllm_load("load_dora", "dora"),
    _vllm_load("load_modules_to_save", "modules_to_save"),
    _vllm_load("load_truncated", "truncated"),
    _vllm_load("load_no_weights", "no_weights"),
    _vllm_load("load_no_config", "no_config"),
    _vllm_load("load_bad_config", "bad_config"),
    _vllm_load("load_larger_base", "larger"),
    _vllm_load("load_smaller_base", "smaller"),
    chat("chat_smaller_base", model="smaller", max_tokens=12),
    Case("load_no_name", "/v1/load_lora_adapter", {"lora_path": "{adapters}/good"}),
    Case("load_empty_name", "/v1/load_lora_adapter", {"lora_name": "", "lora_path": "{adapters}/good"}),
    Case("load_bad_json", "/v1/load_lora_adapter", b"{"),
    _vllm_unload("unload", "good"),
    chat("chat_unloaded", model="good"),
    _vllm_unload("unload_again", "good"),
    Case("unload_no_name", "/v1/unload_lora_adapter", {}),
    _vllm_unload("unload_base", "base"),
    *[_vllm_load(f"load_{name}", name) for name in ("second", "third", "fourth", "fifth")],
    *[chat(f"chat_{name}", model=name) for name in ("second", "third", "fourth", "fifth")],
    chat("chat_second_again", model="second"),
    get("models_with_many", "/v1/models"),
    Case("sagemaker_load", "/adapters", {"name": "sage", "src": "{adapters}/good"}),
    Case("sagemaker_unload", "/adapters/sage", method="DELETE"),
]

VLLM_OFF = [
    _vllm_load("load_without_lora", "good"),
    _vllm_unload("unload_without_lora", "good"),
]


def _sglang_load(name: str, path: str, adapter: str | None = None, **more: Any) -> Case:
    return Case(name, "/load_lora_adapter", {"lora_name": adapter or path, "lora_path": f"{{adapters}}/{path}"} | more)


def _sglang_unload(name: str, adapter: str) -> Case:
    return Case(name, "/unload_lora_adapter", {"lora_name": adapter})


SGLANG = [
    _sglang_load("load", "good"),
    get("models_with_adapter", "/v1/models"),
    get("retrieve_adapter", "/v1/models/good"),
    chat("chat_base", max_tokens=12),
    chat("chat_adapter", model="base:good", max_tokens=12),
    chat("chat_adapter_stream", model="base:good", stream=True),
    chat("chat_adapter_by_path_field", lora_path="good", max_tokens=12),
    chat("chat_adapter_name_alone", model="good", max_tokens=12),
    complete("completion_adapter", model="base:good"),
    chat("chat_never_loaded", model="base:nope"),
    chat("chat_never_loaded_stream", model="base:nope", stream=True),
    _sglang_load("load_again", "good"),
    _sglang_load("load_as_base", "second", "base"),
    _sglang_unload("unload_as_base", "base"),
    _sglang_load("load_missing_path", "nowhere"),
    Case("load_repo_path", "/load_lora_adapter", {"lora_name": "x", "lora_path": "some/repo"}),
    _sglang_load("load_rank_too_high", "rank64"),
    _sglang_load("load_dora", "dora"),
    _sglang_load("load_modules_to_save", "modules_to_save"),
    _sglang_load("load_truncated", "truncated"),
    _sglang_load("load_no_weights", "no_weights"),
    _sglang_load("load_no_config", "no_config"),
    _sglang_load("load_bad_config", "bad_config"),
    Case("load_no_name", "/load_lora_adapter", {"lora_path": "{adapters}/good"}),
    Case("load_bad_json", "/load_lora_adapter", b"{"),
    _sglang_unload("unload", "good"),
    get("models_after_unload", "/v1/models"),
    chat("chat_unloaded_reloads", model="base:good", max_tokens=12),
    get("models_after_reload", "/v1/models"),
    _sglang_unload("unload_reloaded", "good"),
    _sglang_unload("unload_unknown", "nope"),
    Case("unload_no_name", "/unload_lora_adapter", {}),
    *[_sglang_load(f"load_{name}", name) for name in ("second", "third", "fourth", "fifth")],
    *[chat(f"chat_{name}", model=f"base:{name}") for name in ("second", "third", "fourth", "fifth")],
    chat("chat_second_again", model="base:second"),
    get("models_with_many", "/v1/models"),
]

SGLANG_OFF = [
    _sglang_load("load_without_lora", "good"),
    _sglang_unload("unload_without_lora", "good"),
    chat("chat_without_lora", model="base:good"),
]

# Accepted at load; the first request with it ends the server. Last of its setup.
SGLANG_DEADLY = [
    _sglang_load("load_smaller_base", "smaller"),
    chat("chat_smaller_base", model="base:smaller"),
    get("models_after_death", "/v1/models"),
]

LMDEPLOY = [
    get("models_with_adapter", "/v1/models"),
    chat("chat_base", max_tokens=12),
    chat("chat_adapter", model="good", max_tokens=12),
    chat("chat_adapter_stream", model="good", stream=True),
    complete("completion_adapter", model="good"),
    chat("chat_unknown_adapter", model="nope"),
    chat("chat_colon_adapter", model="base:good"),
    _vllm_load("load_v1", "second"),
    Case("load", "/load_lora_adapter", {"lora_name": "x", "lora_path": "{adapters}/good"}),
]

_HI = {"model": MODEL, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2}
ADMIN = {
    "sglang": [
        Case("flush_cache", "/flush_cache"),
        Case("abort_request", "/abort_request", {"rid": "nope"}),
        get("server_info", "/server_info"),
        Case(
            "invocations",
            "/invocations",
            _HI,
        ),
    ],
    "vllm": [
        Case("reset_prefix_cache", "/reset_prefix_cache"),
        Case("sleep", "/sleep"),
        Case(
            "invocations",
            "/invocations",
            _HI,
        ),
        Case(
            "chat_with_request_id",
            CHAT,
            _HI,
            headers={"X-Request-Id": "tunegate-1"},
        ),
    ],
    "lmdeploy": [
        get("is_sleeping", "/is_sleeping"),
        get("terminate", "/terminate"),
        Case("abort_request", "/abort_request", {"abort_all": True}),
        get("engine_info", "/distserve/engine_info"),
    ],
}
