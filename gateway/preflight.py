"""From the configuration to what an engine is started with; what can be known to be wrong before anything starts."""

from __future__ import annotations

import sys

from backends import envs, registry
from backends.progress import PlainProgress
from backends.spec import EngineSpec
from gateway import models, quantizing, tls
from gateway.acceptance import check_checkpoint, check_facts
from gateway.config import ConfigError, ServeConfig


def engine_spec(config: ServeConfig) -> EngineSpec:
    """What one replica is started from. Raises ConfigError (model) or BackendError (engine not on offer)."""
    device = config.device or envs.default_device()
    path = models.resolve(config.model)
    recipe = quantizing.recipe(config, path)
    return EngineSpec(
        backend=config.backend,
        version=envs.lookup(config.backend, config.engine_version, device).version,
        model_path=recipe.target if recipe else path,
        served_name=config.public_name,
        device=device,
        task=config.task,
        dtype=config.dtype,
        tensor_parallel=config.tp,
        pipeline_parallel=config.pp,
        quantization=None if recipe else config.quantization,  # what we made says itself what it is
        max_model_len=config.max_model_len,
        memory_fraction=config.memory_fraction,
        adapter_slots=config.adapter_slots,
        max_adapters=config.max_adapters,
        max_adapter_rank=config.max_adapter_rank,
        tool_parser=config.tool_call_parser,
        reasoning_parser=config.reasoning_parser,
        engine_args=config.engine_arg,
    )


def check_tls(config: ServeConfig) -> None:
    """Refuse a certificate that cannot be used. Raises ConfigError."""
    if config.tls_cert is None or config.tls_key is None:
        return
    try:
        tls.server_context(config.tls_cert, config.tls_key)
    except tls.TlsError as error:
        raise ConfigError(str(error)) from error


def check(config: ServeConfig) -> None:
    """Bring the model if it is not here, and refuse what cannot be served. Raises ConfigError or BackendError."""
    check_tls(config)
    if config.attach:
        return
    # The engine first: a missing one should not be found out after a long download.
    env = envs.find(config.backend, config.engine_version, config.device)
    progress = PlainProgress(sys.stderr)
    path = models.ensure(config.model, progress)
    spec = engine_spec(config)
    registry.get(env.name).check(spec)
    recipe = quantizing.recipe(config, path)
    if recipe and not recipe.is_made:
        check_facts(recipe.facts(), spec)  # rather than minutes later
        quantizing.make(recipe, config.trainer_python, spec.device, progress)
    check_checkpoint(spec)
