"""Read adapter_config.json: strict where a wrong reading would change what the adapter answers.

Engines ignore much of what peft can do, and then answer wrongly with a 200. So every variant of LoRA that
`canonical.py` cannot write as a plain one is refused here, each with its own message and what to do instead.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from gateway.adapters.patterns import BadPattern, Patterns
from gateway.errors import InvalidRequest

_MAX_BYTES = 1 << 20
_MAX_ALPHA = 1e6
_KNOWN_USES = frozenset({"use_rslora", "use_dora"})
_HARMLESS_INITS = frozenset({"gaussian", "orthogonal", "eva", "true", "false"})  # these leave the base's weights alone
_MERGE = (
    "merge it into the base (`gateway adapters merge DIR --model BASE --out NEW`) and serve that, or train without it"
)
_MERGE_BY_PEFT = "merge it into the base (peft's `model.merge_and_unload()`) and serve that, or train without it"


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

    def __post_init__(self) -> None:
        alphas = (self.lora_alpha, *(self.alpha_pattern or {}).values())
        if not all(abs(alpha) <= _MAX_ALPHA for alpha in alphas):
            raise ValueError(f"lora_alpha and alpha_pattern must lie between {-_MAX_ALPHA:g} and {_MAX_ALPHA:g}")


@dataclass(frozen=True, slots=True)
class AdapterConfig:
    """What adapter_config.json says, once it is known to be servable."""

    r: int  # of the modules that rank_pattern does not name
    alpha: float
    use_rslora: bool
    rank_pattern: Patterns[int]
    alpha_pattern: Patterns[float]
    base_name: str  # as the trainer called the base; "" when it did not say
    canonical: bytes  # the whole file with sorted keys, so that layout does not change the content id

    @property
    def rank(self) -> int:
        """The highest rank of any module."""
        ranks: list[int] = [self.r, *self.rank_pattern]
        return max(ranks)

    @property
    def is_plain(self) -> bool:
        """Whether every module is scaled by alpha / r, and all engines read it so."""
        return not (self.use_rslora or self.rank_pattern or self.alpha_pattern)

    def rank_of(self, module: str) -> int:
        """The rank of a module, by its name in the base model."""
        return self.rank_pattern.of(module, self.r)

    def scale_of(self, module: str) -> float:
        """What a module's B A is multiplied by."""
        rank, alpha = self.rank_of(module), self.alpha_pattern.of(module, self.alpha)
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)


def parse_config(path: Path) -> AdapterConfig:
    """Read adapter_config.json and refuse the kinds of adapter that no engine here serves.

    Raises InvalidRequest, OSError.
    """
    return _parse(path, _refuse_unserved)


def parse_mergeable(path: Path) -> AdapterConfig:
    """Read adapter_config.json and refuse the kinds of adapter that cannot be merged into a base here.

    Raises InvalidRequest, OSError.
    """
    return _parse(path, _refuse_unmergeable)


def _parse(path: Path, refuse: Callable[[_PeftConfig, dict[str, Any]], None]) -> AdapterConfig:
    values = json_object(path)
    kind = values.get("peft_type")
    if kind != "LORA":
        raise _unsupported(f"peft_type is {kind!r}; only LORA is served. For other kinds, {_MERGE_BY_PEFT}")
    try:
        config = msgspec.convert(values, _PeftConfig)
    except msgspec.ValidationError as error:
        raise InvalidRequest(f"adapter_config.json: {error}", param="file", code="bad_config") from error
    refuse(config, values)
    ranks = [config.r, *(config.rank_pattern or {}).values()]
    if min(ranks) < 1:
        raise InvalidRequest(f"adapter_config.json: rank {min(ranks)} is not positive", param="file", code="bad_config")
    try:
        rank_pattern, alpha_pattern = Patterns(config.rank_pattern or {}), Patterns(config.alpha_pattern or {})
    except BadPattern as error:
        raise _unsupported(str(error)) from error
    return AdapterConfig(
        r=config.r,
        alpha=config.lora_alpha,
        use_rslora=config.use_rslora,
        rank_pattern=rank_pattern,
        alpha_pattern=alpha_pattern,
        base_name=config.base_model_name_or_path or "",
        canonical=msgspec.json.format(msgspec.json.encode(values, order="sorted"), indent=2),
    )


def check_rank(config: AdapterConfig, max_rank: int) -> None:
    """Refuse a rank that engines were not started for. Raises InvalidRequest."""
    if config.rank > max_rank:
        raise InvalidRequest(
            f"the adapter's rank is {config.rank}, the limit {max_rank}; restart with "
            f"--max-adapter-rank {config.rank} or train with a lower rank",
            param="file",
            code="rank_too_high",
        )


def json_object(path: Path) -> dict[str, Any]:
    """Read a JSON file of an upload. Raises InvalidRequest when it is not a JSON object or too long, OSError."""
    size_bytes = path.stat().st_size
    if size_bytes > _MAX_BYTES:
        message = f"{path.name} has {size_bytes} bytes, more than {_MAX_BYTES}"
        raise InvalidRequest(message, param="file", code="bad_config")
    try:
        return msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidRequest(f"{path.name} is not a JSON object: {error}", param="file", code="bad_config") from error


def _refuse_unserved(config: _PeftConfig, values: dict[str, Any]) -> None:
    if config.use_dora:
        raise _unsupported(f"DoRA adapters are not served; {_MERGE}")
    if config.bias != "none" or config.lora_bias:
        raise _unsupported(
            f"the adapter trains biases; train with bias='none' and lora_bias=False, or {_MERGE_BY_PEFT}"
        )
    if config.modules_to_save:
        raise _unsupported(
            f"modules_to_save {config.modules_to_save} holds whole layers, which engines skip; {_MERGE}",
        )
    _refuse_unmergeable(config, values)


def _refuse_unmergeable(config: _PeftConfig, values: dict[str, Any]) -> None:
    if config.trainable_token_indices:
        raise _unsupported(f"trainable_token_indices changes embeddings, which engines skip; {_MERGE_BY_PEFT}")
    if config.layer_replication:
        raise _unsupported(f"layer_replication changes the base's layers; {_MERGE_BY_PEFT}")
    if config.target_parameters:
        raise _unsupported("target_parameters is not served; train with target_modules")
    if config.alora_invocation_tokens:
        raise _unsupported("activated LoRA (alora_invocation_tokens) is not served; train a plain LoRA")
    if config.megatron_config or config.arrow_config:
        raise _unsupported("megatron_config and arrow_config are not served; train a plain LoRA")
    _refuse_init(config.init_lora_weights)
    unknown = sorted(key for key in values if key.startswith("use_") and values[key] and key not in _KNOWN_USES)
    if unknown:
        raise _unsupported(f"{', '.join(unknown)}: this variant of LoRA is not served; train a plain LoRA")


def _refuse_init(init: bool | str | None) -> None:
    """PiSSA and its like change the base's weights too, so that the adapter fits only that changed base."""
    name = str(init).lower()
    if isinstance(init, bool) or init is None or name in _HARMLESS_INITS:
        return
    raise _unsupported(
        f"init_lora_weights={init!r} changed the base's own weights, so the adapter does not fit the base as served; "
        "save it converted into a plain LoRA, which is exact: "
        "`model.save_pretrained(DIR, path_initial_model_for_weight_conversion=INITIAL)`, "
        "where INITIAL holds the adapter as it was before training"
    )


def _unsupported(message: str) -> InvalidRequest:
    return InvalidRequest(message, param="file", code="unsupported_adapter")
