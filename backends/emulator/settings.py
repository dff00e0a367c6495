"""What an emulator takes from the real engine's command line. Flags are those of the engine's own parser."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from backends.emulator.recordings import Book

_DEFAULT_CONTEXT_TOKENS = 8192
_EVERY_ADDRESS = "0.0.0.0"  # noqa: S104  (the engines' own default)


@dataclass(frozen=True)
class Settings:
    """One emulated engine, whatever its kind."""

    model_path: str
    served_name: str
    host: str
    port: int
    api_keys: tuple[str, ...]
    context_tokens: int
    max_running: int
    hidden_size: int | None  # of the base model; None: its config.json is not there
    lora: bool
    runtime_lora: bool  # adapters can be loaded over HTTP
    max_rank: int
    batch_adapters: int | None  # different adapters in one batch; None: any number
    host_adapters: int | None  # adapters kept in memory; None: any number
    static_adapters: Mapping[str, str] = field(default_factory=dict)
    tool_parser: bool = False
    embeddings: bool = False
    metrics: bool = True
    logprobs: bool = True
    seeds: bool = True  # a request's `seed` counts
    backend: str = "pytorch"  # LMDeploy's: pytorch or turbomind


def parse(engine: str, book: Book, argv: Sequence[str]) -> Settings:
    """Read the engine's own arguments. Exits with status 2 on what its parser rejects, as the engine does."""
    return _READERS[engine](_Arguments(engine, book, argv))


class _Arguments:
    """The parsed command line: `values[flag]` by its first long name, without dashes, as argparse gives it."""

    def __init__(self, engine: str, book: Book, argv: Sequence[str]) -> None:
        parser = argparse.ArgumentParser(prog=engine, add_help=False, allow_abbrev=engine != "vllm")
        for flag in book.documents["flags"]["flags"]:
            _add(parser, flag)
        words = list(argv)
        for prefix in _PREFIXES[engine]:
            if words[: len(prefix)] == prefix:
                words = words[len(prefix) :]
                break
        if engine != "sglang":
            parser.add_argument("model_positional", nargs="?" if engine == "vllm" else None)
        if engine == "vllm":
            words = [_dashed(word) for word in words]
        self.values: dict[str, Any] = vars(parser.parse_args(words))

    def __getitem__(self, name: str) -> Any:
        return self.values[name.replace("-", "_")]


_PREFIXES = {
    "vllm": [["serve"], ["-m", "vllm.entrypoints.openai.api_server"]],
    "sglang": [["-m", "sglang.launch_server"], ["serve"]],
    "lmdeploy": [["serve", "api_server"], ["-m", "lmdeploy", "serve", "api_server"]],
}


def _add(parser: argparse.ArgumentParser, flag: Mapping[str, Any]) -> None:
    long_names = [name for name in flag["names"] if name.startswith("--")]
    dest = (long_names or flag["names"])[0].lstrip("-").replace("-", "_")
    if flag["takes"] == 0:
        on = [name for name in flag["names"] if not name.startswith("--no-")]
        off = [name for name in flag["names"] if name.startswith("--no-")]
        if on:
            parser.add_argument(*on, dest=dest, action="store_true")
        if off:
            parser.add_argument(*off, dest=dest if on else dest.removeprefix("no_"), action="store_false", default=None)
        return
    kind: Callable[[str], Any] = {"int": int, "float": float}.get(flag["kind"], str)
    options: dict[str, Any] = {"dest": dest, "type": kind, "default": None, "required": flag["required"]}
    if flag["takes"] != 1:
        options["nargs"] = flag["takes"]
    if flag["choices"] is not None:
        options["choices"] = flag["choices"]
    parser.add_argument(*flag["names"], **options)


def _dashed(word: str) -> str:
    """vLLM takes `--max_model_len` for `--max-model-len`."""
    name, equals, value = word.partition("=")
    return name.replace("_", "-") + equals + value if word.startswith("--") else word


def _model_config(path: str) -> dict[str, Any]:
    file = Path(path) / "config.json"
    config: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}
    return config


def _common(model_path: str, name: str | None, limit: int | None) -> dict[str, Any]:
    config = _model_config(model_path)
    return {
        "model_path": model_path,
        "served_name": name or model_path,
        "context_tokens": limit or config.get("max_position_embeddings") or _DEFAULT_CONTEXT_TOKENS,
        "hidden_size": config.get("hidden_size"),
    }


def _vllm(given: _Arguments) -> Settings:
    names, keys = given["served-model-name"], given["api-key"] or [os.environ.get("VLLM_API_KEY", "")]
    path = given["model_positional"] or given["model"] or "Qwen/Qwen3-0.6B"
    slots = given["max-loras"] or 1
    return Settings(
        **_common(path, names[0] if names else None, _tokens(given["max-model-len"])),
        host=given["host"] or _EVERY_ADDRESS,
        port=8000 if given["port"] is None else given["port"],
        api_keys=tuple(key for key in keys if key),
        max_running=given["max-num-seqs"] or 256,
        lora=given["enable-lora"],
        runtime_lora=os.environ.get("VLLM_ALLOW_RUNTIME_LORA_UPDATING", "").lower() in ("1", "true"),
        max_rank=given["max-lora-rank"] or 16,
        batch_adapters=slots,
        host_adapters=int(given["max-cpu-loras"] or slots),
        static_adapters=_named(given["lora-modules"] or [], "name", "path"),
        tool_parser=bool(given["enable-auto-tool-choice"] and given["tool-call-parser"]),
        embeddings=given["runner"] == "pooling" or given["convert"] == "embed",
    )


def _sglang(given: _Arguments) -> Settings:
    static = _named(given["lora-paths"] or [], "lora_name", "lora_path")
    return Settings(
        **_common(given["model-path"], given["served-model-name"], _tokens(given["context-length"])),
        host=given["host"] or "127.0.0.1",
        port=30000 if given["port"] is None else given["port"],
        api_keys=(given["api-key"],) if given["api-key"] else (),
        max_running=given["max-running-requests"] or 4096,
        lora=bool(given["enable-lora"] or static),
        runtime_lora=True,
        max_rank=given["max-lora-rank"] or 1 << 20,
        batch_adapters=(given["max-loras-per-batch"] or 8) - 1,  # one slot is the base's
        host_adapters=given["max-loaded-loras"],
        static_adapters=static,
        tool_parser=bool(given["tool-call-parser"]),
        embeddings=bool(given["is-embedding"]),
        metrics=bool(given["enable-metrics"]),
        seeds=bool(given["enable-deterministic-inference"]),
    )


def _lmdeploy(given: _Arguments) -> Settings:
    pytorch = given["backend"] == "pytorch"
    return Settings(
        **_common(given["model_positional"], given["model-name"], given["session-len"]),
        host=given["server-name"] or _EVERY_ADDRESS,
        port=23333 if given["server-port"] is None else given["server-port"],
        api_keys=tuple(key for key in given["api-keys"] or () if key),
        max_running=given["max-batch-size"] or 256,
        lora=pytorch,
        runtime_lora=False,
        max_rank=1 << 20,
        batch_adapters=None,
        host_adapters=None,
        static_adapters=_named(given["adapters"] or [], "name", "path") if pytorch else {},  # TurboMind drops them
        tool_parser=bool(given["tool-call-parser"]),
        metrics=not given["disable-metrics"],
        logprobs=not pytorch or given["logprobs-mode"] is not None,  # TurboMind needs no mode for them
        backend="pytorch" if pytorch else "turbomind",
    )


_READERS = {"vllm": _vllm, "sglang": _sglang, "lmdeploy": _lmdeploy}


def _tokens(text: str | int | None) -> int | None:
    """vLLM's lengths may be `8k` (8000) or `8K` (8192), and -1 or `auto` for the model's own."""
    if text is None or str(text) in ("-1", "auto"):
        return None
    unit = {"k": 1000, "K": 1024, "m": 10**6, "M": 1 << 20}.get(str(text)[-1])
    return int(float(str(text)[:-1]) * unit) if unit else int(text)


def _named(items: Sequence[str], name_key: str, path_key: str) -> dict[str, str]:
    """`name=path`, JSON with the two keys, or a path alone, which LMDeploy calls `default` and SGLang by the path."""
    named = {}
    for item in items:
        if item.startswith("{"):
            described = json.loads(item)
            named[described[name_key]] = described[path_key]
        else:
            name, equals, path = item.partition("=")
            named[name] = path if equals else item
    return named
