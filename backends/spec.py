"""The leaf that every part may import: what to serve, what an engine can do, what an adapter directory says.

Only pydantic and the standard library are imported here.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

BackendName = Literal["vllm", "sglang", "lmdeploy"]
Device = Literal["cuda", "cpu"]
Task = Literal["generate", "embed"]

BACKEND_NAMES: tuple[BackendName, ...] = ("vllm", "sglang", "lmdeploy")
DEFAULT_MAX_ADAPTER_RANK = 64
FLOAT32_DTYPES = ("float", "float32")  # what `--dtype` calls it


class EngineSpec(BaseModel):
    """Everything that decides how one engine replica is started. `--backend` changes `backend` and nothing else."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    backend: BackendName
    version: str  # of the engine environment, "emulator" for the emulated one
    model_path: Path  # local checkpoint directory
    served_name: str  # the name the engine answers to for the base model
    device: Device
    task: Task = "generate"
    dtype: str = "auto"
    tensor_parallel: int = Field(default=1, ge=1)
    pipeline_parallel: int = Field(default=1, ge=1)
    quantization: str | None = None
    max_model_len: int | None = Field(default=None, ge=1)  # tokens
    memory_fraction: float | None = Field(default=None, gt=0, lt=1)  # of the device's memory
    adapter_slots: int = Field(default=4, ge=0)  # adapters in one batch; 0 turns LoRA off
    max_adapters: int = Field(default=16, ge=0)  # adapters kept loaded on one replica
    max_adapter_rank: int = Field(default=DEFAULT_MAX_ADAPTER_RANK, ge=1)
    tool_parser: str | None = None
    reasoning_parser: str | None = None
    engine_args: tuple[str, ...] = ()  # passed through unread, after ours


class AdapterLoading(StrEnum):
    """How an engine takes a new adapter."""

    RUNTIME = "runtime"  # over HTTP, while it serves
    AT_START = "at-start"  # listed on its command line: a change is a restart
    NONE = "none"


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What one engine can do, as data: shown by `gateway engines list`, used for clear refusals."""

    adapter_loading: AdapterLoading
    adapter_ranks: tuple[int, ...] | None  # allowed values of the engine's rank limit; None: any
    quantizations: tuple[str, ...]
    devices: tuple[Device, ...]
    embeddings: bool
    responses_api: bool
    tool_parsers: bool
    pipeline_parallel: bool
    notes: tuple[str, ...] = ()
