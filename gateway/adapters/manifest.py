"""Read adapter_config.json: strict where a wrong reading would change what the adapter answers.

Engines ignore much of what peft can do, and then answer wrongly with a 200. So every variant of LoRA that is not
exactly served is refused here, each with its own message and what to do instead.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from backends.spec import BackendName, Capabilities
from gateway.errors import InvalidRequest

_MAX_BYTES = 1 << 20
_HARMLESS_INITS = frozenset({"gaussian", "orthogonal", "eva", "true", "false"})  # these leave the base's weights alone
_PATTERN = re.compile(r"[\w.\\^$*-]{1,256}")  # engines match these; a group could make a match take for ever
_MERGE = "merge it into the base (`model.merge_and_unload()`) and serve the merged checkpoint, or train without it"


class _PeftConfig(msgspec.Struct):
    """The keys of peft's LoraConfig that decide what is computed."""

    peft_type: str
    r: int
    lora_alpha: float
    target_modules: list[str] | str | None = None
    base_model_name_or_path: str | None = None
    bias: str = "none"
    lora_bias: bool = False
    use_dora: bool = False
    use_rslora: bool = False
    init_lora_weights: bool | str | None = True
    modules_to_save: list[str] | None = None
    layer_replication: list[Any] | None = None
    trainable_token_indices: list[Any] | dict[str, Any] | None = None
    target_parameters: list[str] | None = None
    alora_invocation_tokens: list[int] | None = None
    megatron_config: dict[str, Any] | None = None
    arrow_config: dict[str, Any] | None = None
    rank_pattern: dict[str, int] | None = None
    alpha_pattern: dict[str, float] | None = None


@dataclass(frozen=True, slots=True)
class Server:
    """What the adapter would be served by, one for each kind of engine that runs."""

    backend: BackendName
    capabilities: Capabilities
    max_rank: int


@dataclass(frozen=True, slots=True)
class AdapterConfig:
    """What adapter_config.json says, once it is known to be servable."""

    r: int  # of the modules that rank_pattern does not name
    alpha: float
    use_rslora: bool
    rank_pattern: dict[str, int]
    alpha_pattern: dict[str, float]
    base_name: str  # as the trainer called the base; "" when it did not say
    canonical: bytes  # the whole file with sorted keys, so that layout does not change the content id

    @property
    def rank(self) -> int:
        """The highest rank of any module."""
        return max(self.r, *self.rank_pattern.values()) if self.rank_pattern else self.r


def parse_config(path: Path) -> AdapterConfig:
    """Read adapter_config.json and refuse the kinds of adapter that no engine here serves.

    Raises InvalidRequest, OSError.
    """
    values = _json_object(path)
    kind = values.get("peft_type")
    if kind != "LORA":
        raise _unsupported(f"peft_type is {kind!r}; only LORA is served. For other kinds, {_MERGE}")
    try:
        config = msgspec.convert(values, _PeftConfig)
    except msgspec.ValidationError as error:
        raise InvalidRequest(f"adapter_config.json: {error}", param="file", code="bad_config") from error
    _refuse_variants(config, values)
    ranks = [config.r, *(config.rank_pattern or {}).values()]
    for pattern in (*(config.rank_pattern or {}), *(config.alpha_pattern or {})):
        if not _PATTERN.fullmatch(pattern) or pattern.count("*") > 2:
            raise _unsupported(f"pattern {pattern[:200]!r} is too clever; use plain module names, '.' and '*'")
    if min(ranks) < 1:
        raise InvalidRequest(f"adapter_config.json: rank {min(ranks)} is not positive", param="file", code="bad_config")
    return AdapterConfig(
        r=config.r,
        alpha=config.lora_alpha,
        use_rslora=config.use_rslora,
        rank_pattern=config.rank_pattern or {},
        alpha_pattern=config.alpha_pattern or {},
        base_name=config.base_model_name_or_path or "",
        canonical=msgspec.json.format(msgspec.json.encode(values, order="sorted"), indent=2),
    )


def check_served(config: AdapterConfig, server: Server) -> None:
    """Refuse what this engine would ignore or reject. Raises InvalidRequest."""
    engine, can = server.backend, server.capabilities
    if config.rank > server.max_rank:
        raise InvalidRequest(
            f"the adapter's rank is {config.rank}, the limit {server.max_rank}; "
            f"restart with --max-adapter-rank {config.rank} "
            "or train with a lower rank",
            param="file",
            code="rank_too_high",
        )
    if config.use_rslora and not can.rslora:
        alpha = config.alpha * config.r**0.5
        raise _unsupported(
            f"{engine} ignores use_rslora and would apply the adapter too weakly; set use_rslora to false and "
            f"lora_alpha to {alpha:g} (lora_alpha * sqrt(r)) in adapter_config.json: the result is the same"
        )
    if config.rank_pattern and not can.rank_pattern:
        raise _unsupported(f"{engine} ignores rank_pattern; train with one rank for all modules, or serve with vllm")
    if config.alpha_pattern and not can.alpha_pattern:
        raise _unsupported(f"{engine} ignores alpha_pattern; train with one lora_alpha for all modules, or use vllm")


def parse_manifest(path: Path) -> dict[str, Any]:
    """Read the trainer's manifest.json. Raises InvalidRequest when it is not a JSON object, OSError."""
    return _json_object(path)


def _json_object(path: Path) -> dict[str, Any]:
    size_bytes = path.stat().st_size
    if size_bytes > _MAX_BYTES:
        message = f"{path.name} has {size_bytes} bytes, more than {_MAX_BYTES}"
        raise InvalidRequest(message, param="file", code="bad_config")
    try:
        return msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidRequest(f"{path.name} is not a JSON object: {error}", param="file", code="bad_config") from error


def _refuse_variants(config: _PeftConfig, values: dict[str, Any]) -> None:
    if config.use_dora:
        raise _unsupported(f"DoRA adapters are not served; {_MERGE}")
    if config.bias != "none" or config.lora_bias:
        raise _unsupported("the adapter trains biases; train with bias='none' and lora_bias=False")
    if config.modules_to_save:
        raise _unsupported(
            f"modules_to_save {config.modules_to_save} holds whole layers, which engines skip; {_MERGE}",
        )
    if config.trainable_token_indices:
        raise _unsupported(f"trainable_token_indices changes embeddings, which engines skip; {_MERGE}")
    if config.layer_replication:
        raise _unsupported(f"layer_replication changes the base's layers; {_MERGE}")
    if config.target_parameters:
        raise _unsupported("target_parameters is not served; train with target_modules")
    if config.alora_invocation_tokens:
        raise _unsupported("activated LoRA (alora_invocation_tokens) is not served; train a plain LoRA")
    if config.megatron_config or config.arrow_config:
        raise _unsupported("megatron_config and arrow_config are not served; train a plain LoRA")
    _refuse_init(config.init_lora_weights)
    unknown = sorted(key for key in values if key.startswith("use_") and values[key] and key != "use_rslora")
    if unknown:
        raise _unsupported(f"{', '.join(unknown)}: this variant of LoRA is not served; train a plain LoRA")


def _refuse_init(init: bool | str | None) -> None:
    """PiSSA and its like change the base's weights too, so that the adapter fits only that changed base."""
    name = str(init).lower()
    if isinstance(init, bool) or init is None or name in _HARMLESS_INITS:
        return
    raise _unsupported(
        f"init_lora_weights={init!r} changed the base's own weights, so the adapter does not fit the base as served; "
        "convert it: `model.save_pretrained(DIR, path_initial_model_for_weight_conversion=INITIAL_ADAPTER)`"
    )


def _unsupported(message: str) -> InvalidRequest:
    return InvalidRequest(message, param="file", code="unsupported_adapter")
