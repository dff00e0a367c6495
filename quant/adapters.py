"""Do adapters survive a quantized base? Their trainer's golden prompts, run through it layer by layer.

The reference is what every engine computes: dequantized weights with the adapter's update added, in float32. The golden
answers stand in an adapter's manifest.json: prompt, greedy answer, and the answer's log-probabilities.

Legend: T tokens of prompt and answer, V vocabulary, r rank.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from quant.checkpoint import Checkpoint
from quant.errors import BadAdapter, BadCheckpoint
from quant.headers import read_json
from quant.skeleton import Skeleton

# An adapter survives when the gateway's own check of golden prompts would let it in over a quantized base.
WORST_NATS = 1.5  # by which one token's log-probability may differ
MEAN_NATS = 0.375  # by which all may differ on average

_PREFIX = "base_model.model."
_KEY = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<side>[AB])\.weight")


@dataclass(frozen=True, slots=True)
class Survival:
    """One adapter on the new base, over the tokens of its golden answers."""

    adapter: str
    survives: bool
    prompts: int
    tokens: int
    same_choice: float  # share of the tokens that are still the likeliest
    mean_nats: float  # mean and largest difference of log-probabilities from the trainer's
    worst_nats: float
    gain_kept: float | None  # share of what the adapter gained over the original base; None: the manifest lacks that


@dataclass(slots=True)
class _Adapter:
    name: str
    goldens: list[dict[str, Any]]
    updates: dict[str, tuple[Tensor, Tensor]]  # module -> A [r, K] and B [N, r], the scale in B
    hidden: list[Tensor]  # of each golden, [1, T, H]


def find_adapters(directories: Sequence[Path]) -> list[Path]:
    """Adapter directories among the given ones and right below them. Raises BadAdapter where there is none."""
    found: list[Path] = []
    for directory in directories:
        own = [directory] if (directory / "adapter_config.json").is_file() else []
        own += sorted(file.parent for file in directory.glob("*/adapter_config.json"))
        if not own:
            raise BadAdapter(f"{directory} is no adapter and holds none: there is no adapter_config.json")
        found += own
    return found


@torch.no_grad()
def survivals(
    directory: Path,
    adapters: Sequence[Path],
    device: torch.device,
    on_layer: Callable[[int, int], None] = lambda layer, layers: None,
) -> list[Survival]:
    """How each adapter does on the checkpoint. Raises BadAdapter, BadCheckpoint, UnsupportedModel."""
    skeleton = Skeleton(Checkpoint(directory), device)
    loaded = [_read(adapter, skeleton) for adapter in adapters]
    for adapter in loaded:
        adapter.hidden = [skeleton.embed(_tokens(golden)).cpu() for golden in adapter.goldens]
    for index in range(len(skeleton.layers)):
        prefix = skeleton.layer_prefix(index)
        weights = skeleton.checkpoint.weights(prefix)
        for adapter in loaded:
            with skeleton.loaded(index, _updated(weights, adapter.updates, prefix)) as layer:
                adapter.hidden = [skeleton.run(layer, index, hidden.to(device)).cpu() for hidden in adapter.hidden]
        on_layer(index + 1, len(skeleton.layers))
    return [_judge(adapter, skeleton) for adapter in loaded]


def _updated(
    weights: Mapping[str, Tensor], updates: Mapping[str, tuple[Tensor, Tensor]], prefix: str
) -> dict[str, Tensor]:
    changed = dict(weights)
    for module, (a_rK, b_Nr) in updates.items():
        name = f"{module}.weight".removeprefix(prefix)
        if module.startswith(prefix):
            changed[name] = weights[name].to(b_Nr.device).float() + b_Nr @ a_rK
    return changed


def _judge(adapter: _Adapter, skeleton: Skeleton) -> Survival:
    differences: list[float] = []
    same, gained, kept = 0, 0.0, 0.0
    bases_known = True
    for golden, hidden in zip(adapter.goldens, adapter.hidden, strict=True):
        answer = torch.tensor(golden["token_ids"])
        logits_TV = skeleton.logits(_tokens(golden), hidden.to(skeleton.device))[0, -len(answer) - 1 : -1]
        logprobs_TV = logits_TV.float().log_softmax(-1).cpu()
        found = logprobs_TV.gather(-1, answer.unsqueeze(-1)).squeeze(-1).tolist()
        same += int((logprobs_TV.argmax(-1) == answer).sum())
        differences += [abs(now - then) for now, then in zip(found, golden["logprobs"], strict=True)]
        base = golden.get("base_logprobs")
        bases_known = bases_known and base is not None
        if base is not None:
            gained, kept = gained + sum(golden["logprobs"]) - sum(base), kept + sum(found) - sum(base)
    mean, worst = sum(differences) / len(differences), max(differences)
    return Survival(
        adapter=adapter.name,
        survives=worst <= WORST_NATS and mean <= MEAN_NATS,
        prompts=len(adapter.goldens),
        tokens=len(differences),
        same_choice=same / len(differences),
        mean_nats=mean,
        worst_nats=worst,
        gain_kept=kept / gained if bases_known and gained > 0 else None,
    )


def _tokens(golden: Mapping[str, Any]) -> Tensor:
    return torch.tensor([[*golden["prompt_token_ids"], *golden["token_ids"]]])


def _read(directory: Path, skeleton: Skeleton) -> _Adapter:
    try:
        config = read_json(directory / "adapter_config.json")
        goldens = read_json(directory / "manifest.json").get("golden")
        tensors = load_file(directory / "adapter_model.safetensors")
    except (SafetensorError, OSError, BadCheckpoint) as error:
        raise BadAdapter(f"the adapter {directory} cannot be read: {error}") from error
    if not goldens:
        raise BadAdapter(f"{directory} has no golden prompts in its manifest.json: add some by `gateway train golden`")
    vocabulary = skeleton.model.get_input_embeddings().num_embeddings
    for number, golden in enumerate(goldens if isinstance(goldens, list) else [goldens], start=1):
        if fault := _golden_fault(golden, vocabulary):
            raise BadAdapter(
                f"golden prompt {number} in {directory}/manifest.json {fault}: make them anew by `gateway train golden`"
            )
    rank = config.get("r")
    if not isinstance(rank, int) or rank < 1 or not isinstance(config.get("lora_alpha"), int | float):
        raise BadAdapter(f"{directory}/adapter_config.json says no rank (r) and lora_alpha, as peft writes them")
    if config.get("use_dora"):
        raise BadAdapter(f"{directory} is a DoRA adapter; merge it or train a plain LoRA")
    sides: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        match = _KEY.fullmatch(name)
        if match is None:
            raise BadAdapter(f"{directory} holds {name}, which is no part of a plain LoRA on linear layers")
        sides.setdefault(match["module"], {})[match["side"]] = tensor.float().to(skeleton.device)
    shapes = {name: tuple(tensor.shape) for name, tensor in skeleton.model.state_dict().items()}
    updates = {}
    for module, pair in sides.items():
        own = shapes.get(f"{module}.weight")
        fits = pair.keys() == {"A", "B"} and own == (pair["B"].shape[0], pair["A"].shape[1])
        if not fits or not module.startswith(f"{skeleton.prefix}."):
            raise BadAdapter(f"{directory} changes {module} as {skeleton.checkpoint.directory} does not have it")
        updates[module] = (pair["A"], pair["B"] * _scale(config, module))
    return _Adapter(directory.name, goldens, updates, [])


def _golden_fault(golden: Any, vocabulary: int) -> str:
    """What a golden prompt lacks, in words; empty when it can be judged."""
    if not isinstance(golden, dict):
        return f"is {type(golden).__name__}, expected an object"
    for name in ("prompt_token_ids", "token_ids"):
        ids = golden.get(name)
        if not isinstance(ids, list) or not ids or not all(type(one) is int and 0 <= one < vocabulary for one in ids):
            return f"has no {name} that this model's {vocabulary} tokens hold"
    answer = len(golden["token_ids"])
    for name in ("logprobs", *(("base_logprobs",) if golden.get("base_logprobs") is not None else ())):
        values = golden.get(name)
        numbers = [value for value in values if type(value) in (int, float)] if isinstance(values, list) else []
        if values != numbers or len(numbers) != answer:
            return f"has no {name} for each of its {answer} token_ids"
    return ""


def _scale(config: Mapping[str, Any], module: str) -> float:
    """What the update is multiplied by, as peft reads the configuration."""
    rank = _by_pattern(config.get("rank_pattern"), module, config["r"])
    alpha = _by_pattern(config.get("alpha_pattern"), module, config["lora_alpha"])
    return float(alpha / (math.sqrt(rank) if config.get("use_rslora") else rank))


def _by_pattern(patterns: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default
