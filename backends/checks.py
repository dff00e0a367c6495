"""Refusals that follow from an engine's capabilities, before anything is started."""

from __future__ import annotations

from backends.base import UnsupportedSpec
from backends.envs import EMULATOR
from backends.spec import Capabilities, EngineSpec


def check_capabilities(engine: str, capabilities: Capabilities, spec: EngineSpec) -> None:
    """Refuse a spec that goes beyond the data. Raises UnsupportedSpec: what was asked, what is allowed."""
    # The emulator stands in for an engine on any machine.
    if spec.device not in capabilities.devices and spec.version != EMULATOR:
        raise UnsupportedSpec(
            f"{engine} does not run on --device {spec.device}; it needs {_or(capabilities.devices)}. "
            "On a machine without a GPU use --backend vllm."
        )
    if spec.task == "embed" and not capabilities.embeddings:
        raise UnsupportedSpec(f"{engine} does not serve embeddings; use --backend vllm or sglang for --task embed")
    if spec.pipeline_parallel > 1 and not capabilities.pipeline_parallel:
        raise UnsupportedSpec(
            f"{engine} has no pipeline parallelism; use --tp instead of --pp {spec.pipeline_parallel}"
        )
    if spec.tool_parser and not capabilities.tool_parsers:
        raise UnsupportedSpec(f"{engine} does not parse tool calls; leave --tool-call-parser out")
    ranks = capabilities.adapter_ranks
    if spec.adapter_slots and ranks and spec.max_adapter_rank > max(ranks):
        raise UnsupportedSpec(
            f"{engine} takes adapters up to rank {max(ranks)}; --max-adapter-rank {spec.max_adapter_rank} is above it"
        )


def check_choice(engine: str, option: str, given: str | None, allowed: tuple[str, ...]) -> None:
    """Refuse a value that is not among those allowed; None is always fine. Raises UnsupportedSpec."""
    if given is not None and given not in allowed:
        advice = f"use {_or(allowed)}" if allowed else "leave it out or use --backend vllm"
        raise UnsupportedSpec(f"{engine} does not take {option} {given}; {advice}")


def _or(values: tuple[str, ...]) -> str:
    return " or ".join(filter(None, (", ".join(values[:-1]), values[-1])))
