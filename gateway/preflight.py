"""From the configuration to what an engine is started with; what can be known to be wrong before anything starts."""

from __future__ import annotations

import sys

from backends import envs, registry
from backends.progress import PlainProgress
from backends.spec import EngineSpec
from gateway import models
from gateway.config import ServeConfig


def engine_spec(config: ServeConfig) -> EngineSpec:
    """What one replica is started from. Raises ConfigError (model) or BackendError (engine not on offer)."""
    device = config.device or envs.default_device()
    return EngineSpec(
        backend=config.backend,
        version=envs.lookup(config.backend, config.engine_version, device).version,
        model_path=models.resolve(config.model),
        served_name=config.public_name,
        device=device,
        task=config.task,
        dtype=config.dtype,
        tensor_parallel=config.tp,
        pipeline_parallel=config.pp,
        quantization=config.quantization,
        max_model_len=config.max_model_len,
        memory_fraction=config.memory_fraction,
        adapter_slots=config.adapter_slots,
        max_adapters=config.max_adapters,
        max_adapter_rank=config.max_adapter_rank,
        tool_parser=config.tool_call_parser,
        reasoning_parser=config.reasoning_parser,
        engine_args=config.engine_arg,
    )


def check(config: ServeConfig) -> None:
    """Bring the model if it is not here, and refuse what cannot be served. Raises ConfigError or BackendError."""
    if config.attach:
        return
    # The engine first: a missing one should not be found out after a long download.
    env = envs.find(config.backend, config.engine_version, config.device)
    models.ensure(config.model, PlainProgress(sys.stderr))
    registry.get(env.name).check(engine_spec(config))
