"""The serve configuration: one pydantic model; flags, YAML keys, `--print-config` and docs/cli.md come from it.

A flag wins over the file. An unknown key fails and names the nearest key.
"""

from __future__ import annotations

import difflib
import os
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic_core import PydanticCustomError

from backends.spec import DEFAULT_MAX_ADAPTER_RANK, BackendName, Device, Task

DEMO_MODEL = "demo"
_SECRETS = frozenset({"api_key", "attach_key", "database_url"})  # never shown in messages


class ConfigError(Exception):
    """A configuration that cannot be used; the message lists every fault, one a line."""


def home() -> Path:
    """Where engine environments, models and state live: $TUNEGATE_HOME, else ~/.tunegate."""
    return Path(os.environ.get("TUNEGATE_HOME") or Path.home() / ".tunegate")


def _option(default: Any, group: str, help: str, envvar: str | None = None, **rules: Any) -> Any:
    """A field that is also a flag: its group, help and environment variable are the flag's."""
    return Field(default=default, description=help, json_schema_extra={"group": group, "envvar": envvar}, **rules)


_MODEL, _ENGINE, _ADAPTERS, _SERVER = "Model", "Engine", "Adapters", "Server"
_TRAINING = "Files and training"


class ServeConfig(BaseModel):
    """All that `gateway serve` takes."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str = _option(DEMO_MODEL, _MODEL, "Checkpoint directory, hub id, or `demo` (SmolLM2-135M-Instruct).")
    model_name: str | None = _option(None, _MODEL, "Name clients call the model by. Default: the last part of --model.")
    task: Task = _option("generate", _MODEL, "`embed` serves /v1/embeddings instead of chat.")
    dtype: str = _option("auto", _MODEL, "Weights and activations: auto, bfloat16, float16, float32.")
    quantization: str | None = _option(
        None,
        _MODEL,
        "awq or gptq quantizes a plain checkpoint once and serves that; else the format, where the engine cannot tell.",
    )
    max_model_len: int | None = _option(None, _MODEL, "Longest prompt plus answer, in tokens.", ge=1)

    backend: BackendName = _option("vllm", _ENGINE, "The engine: vllm, sglang or lmdeploy. Changes nothing else.")
    engine_version: str | None = _option(
        None,
        _ENGINE,
        "Installed engine version, or `emulator` for a fake engine (tests). Default: the pinned one.",
    )
    device: Device | None = _option(None, _ENGINE, "cuda or cpu. Default: cuda where there is one.")
    tp: int = _option(1, _ENGINE, "Tensor-parallel GPUs a replica.", ge=1)
    pp: int = _option(1, _ENGINE, "Pipeline-parallel stages a replica.", ge=1)
    replicas: int = _option(1, _ENGINE, "Engine processes to start.", ge=1)
    memory_fraction: float | None = _option(None, _ENGINE, "Share of device memory an engine may take.", gt=0, lt=1)
    tool_call_parser: str | None = _option(None, _ENGINE, "The engine's parser for tool calls, e.g. hermes.")
    reasoning_parser: str | None = _option(None, _ENGINE, "The engine's parser for reasoning, e.g. qwen3.")
    engine_arg: tuple[str, ...] = _option((), _ENGINE, "Passed to the engine as it is; repeatable.")
    attach: tuple[str, ...] = _option((), _ENGINE, "URL of an engine that already runs; repeatable. Starts none.")
    attach_key: str = _option("", _ENGINE, "API key of the attached engines.")
    start_timeout_s: int = _option(1200, _ENGINE, "Give up on an engine that is not ready by then.", ge=1)

    adapter_slots: int = _option(4, _ADAPTERS, "Adapters in one batch of an engine; 0 turns adapters off.", ge=0)
    max_adapters: int = _option(16, _ADAPTERS, "Adapters kept loaded on a replica; more may be registered.", ge=0)
    adapter_wait_s: int = _option(60, _ADAPTERS, "Longest wait of a request for its adapter to be loaded.", ge=1)
    max_adapter_rank: int = _option(DEFAULT_MAX_ADAPTER_RANK, _ADAPTERS, "Highest LoRA rank accepted.", ge=1)
    max_adapter_mb: int = _option(2048, _ADAPTERS, "Largest adapter upload, unpacked, in MB.", ge=1)
    golden_tolerance: float | None = _option(
        None,
        _ADAPTERS,
        "Nats by which an adapter's golden answers may differ from its trainer's. Default: by --dtype.",
        gt=0,
    )
    canary_score: str | None = _option(
        None, _ADAPTERS, "Command asked before a canary is promoted, as `COMMAND NAME@v1 NAME@v2 URL`."
    )
    canary_score_timeout_s: int = _option(600, _ADAPTERS, "How long that command, or --train-score, may take.", ge=1)
    adapter_root: tuple[str, ...] = _option(
        (), _ADAPTERS, "Directory that /v1/load_lora_adapter may read; repeatable. Default: `import` in --state."
    )

    trainer_python: Path | None = _option(
        None, _TRAINING, "Python of an environment with `tunegate[train]`. Default: the gateway's own."
    )
    train_device: str = _option(
        "auto",
        _TRAINING,
        "Where jobs train: auto, cpu, cuda, or cuda:N, a GPU that no replica uses.",
        pattern="^(auto|cpu|cuda|cuda:[0-9]{1,3})$",
    )
    train_pause_wait_ms: int | None = _option(
        None,
        _TRAINING,
        "Pause training when requests queue for so long; 0: never. Default: 2000 on a shared device.",
        ge=0,
    )
    train_score: str | None = _option(
        None, _TRAINING, "Command asked before a tuned model is served, as `COMMAND BASE MODEL URL`."
    )
    max_file_mb: int = _option(512, _TRAINING, "Largest file of /v1/files, in MB.", ge=1)
    max_files_gb: float = _option(
        100.0, _TRAINING, "All files that one key keeps there, in GB.", gt=0, allow_inf_nan=False
    )

    host: str = _option("127.0.0.1", _SERVER, "Address to listen on.")
    port: int = _option(8000, _SERVER, "Port to listen on.", ge=0, le=65535)
    relays: int = _option(1, _SERVER, "Relay processes that share the port.", ge=1, le=64)
    api_key: tuple[str, ...] = _option(
        (),
        _SERVER,
        "Key clients must send; repeatable [$TUNEGATE_API_KEYS]. Default: open access.",
        "TUNEGATE_API_KEYS",
    )
    tls_cert: Path | None = _option(None, _SERVER, "Serve HTTPS with this certificate chain, PEM; with --tls-key.")
    tls_key: Path | None = _option(None, _SERVER, "The certificate's private key, PEM, without a passphrase.")
    max_body_mb: int = _option(16, _SERVER, "Largest inference request body, in MB.", ge=1)
    request_timeout_s: int = _option(600, _SERVER, "Longest silence of an engine within a request.", ge=1)
    routing: Literal["least-load", "affinity", "engine-load"] = _option(
        "least-load", _SERVER, "How a replica is chosen; docs/results/routing.md compares the ways."
    )
    max_in_flight: int = _option(1024, _SERVER, "Requests sent to a replica at a time; the rest wait here.", ge=1)
    max_waiting: int = _option(1024, _SERVER, "Requests that wait for a replica; more are refused.", ge=0)
    max_wait_s: int = _option(60, _SERVER, "Longest such wait.", ge=1)
    settle_s: int = _option(0, _SERVER, "At a stop, how long to answer on as not ready, for load balancers.", ge=0)
    drain_timeout_s: int = _option(30, _SERVER, "How long a stop waits for requests in flight.", ge=0)
    state: Path | None = _option(None, _SERVER, "Registry, adapters and logs. Default: $TUNEGATE_HOME/state.")
    database_url: str | None = _option(None, _SERVER, "SQLAlchemy URL of the registry. Default: SQLite in --state.")

    @field_validator("api_key", mode="before")
    @classmethod
    def _keys(cls, value: Any) -> Any:
        """One key or many, without the white space that files and environments leave around them."""
        keys = (value,) if isinstance(value, str) else value
        if isinstance(keys, (list, tuple)):
            keys = tuple(str(key).strip() for key in keys)
            if not all(keys):
                raise ValueError("a key is empty; leave it out for open access")
        return keys

    @model_validator(mode="after")
    def _tls_pair(self) -> Self:
        if (self.tls_cert is None) != (self.tls_key is None):
            raise PydanticCustomError("tls_pair", "give both of --tls-cert and --tls-key, or neither")
        return self

    @property
    def state_dir(self) -> Path:
        return self.state or home() / "state"

    @property
    def public_name(self) -> str:
        """The base model's name for clients."""
        return self.model_name or self.model.rstrip("/").rsplit("/", 1)[-1].partition("@")[0]


Flags = Annotated[dict[str, Any], "flag name -> value given on the command line"]


def load(file: Path | None, flags: Flags) -> ServeConfig:
    """Merge the YAML file (if any) under the flags. Raises ConfigError with every fault found."""
    values: dict[str, Any] = {}
    if file is not None:
        try:
            parsed = yaml.safe_load(file.read_text())
        except OSError as error:
            raise ConfigError(f"cannot read --config {file}: {error.strerror}") from error
        except yaml.YAMLError as error:
            raise ConfigError(f"{file} is not YAML: {error}") from error
        if parsed is not None and not isinstance(parsed, dict):
            raise ConfigError(f"{file} must hold `key: value` lines, found a {type(parsed).__name__}")
        values = {str(key).replace("-", "_"): value for key, value in (parsed or {}).items()}
    values |= flags
    try:
        return ServeConfig.model_validate(values)
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(fault) for fault in error.errors())) from error


def _explain(fault: Any) -> str:
    if not fault["loc"]:  # of several keys together
        return str(fault["msg"])
    key = str(fault["loc"][0])
    if fault["type"] == "extra_forbidden":
        nearest = difflib.get_close_matches(key, ServeConfig.model_fields, n=1)
        hint = f", did you mean `{nearest[0]}`?" if nearest else f"; known: {', '.join(ServeConfig.model_fields)}"
        return f"unknown key `{key}`{hint}"
    given = "" if key in _SECRETS else f", given {fault['input']!r}"
    return f"`{key}`: {fault['msg']}{given}"
