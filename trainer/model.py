"""The base model and its tokenizer, loaded for training on packed rows."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from trainer import attention, ranks, sharding
from trainer.config import TrainConfig
from trainer.errors import ModelError
from trainer.pack import PackedBatch
from trainer.packed import PackedLinear
from trainer.quantized import load_quantized

_COMPILER = "inductor"

# Ways in which a model changes its logits after the vocabulary matrix; `logprobs.py` computes none of them.
_LOGIT_QUIRKS = {"final_logit_softcapping": None, "logits_scaling": 1.0, "logit_scale": None}


@dataclass(frozen=True, slots=True)
class BaseModel:
    """A causal language model, its tokenizer, and where they came from."""

    model: Any
    tokenizer: Any
    path: Path
    device: torch.device
    dtype: torch.dtype

    @property
    def head_VH(self) -> torch.Tensor:
        """The vocabulary matrix."""
        head: torch.Tensor = self.model.get_output_embeddings().weight
        return head

    def multiplied_weights(self) -> int:
        """Weights that every token is multiplied with: those of all linear layers, the vocabulary matrix among them."""
        linears = (module for module in self.model.modules() if isinstance(module, nn.Linear | PackedLinear))
        return sum(linear.in_features * linear.out_features for linear in linears)

    @property
    def stop_ids(self) -> list[int]:
        """Tokens that end an answer, beside the tokenizer's own."""
        ids = self.model.generation_config.eos_token_id
        return [] if ids is None else [ids] if isinstance(ids, int) else list(ids)

    def hidden_KH(self, batch: PackedBatch) -> torch.Tensor:
        """The last hidden states that predict a target, of one forward pass over the row."""
        output = self.model.base_model(
            input_ids=batch.token_ids_1T,
            position_ids=batch.positions_1T,
            segments=batch.segments,
            use_cache=False,
        )
        hidden: torch.Tensor = output.last_hidden_state[0].index_select(0, batch.rows_K)
        return hidden


def load_base(config: TrainConfig) -> BaseModel:
    """Load model and tokenizer as the configuration says. Raises ModelError."""
    path = ranks.lead(lambda: resolve_model(config.model))
    device = ranks.local_device(config)
    dtype = _dtype(config, device)
    disable_progress_bar()
    with _as_model_error(path):
        settings = AutoConfig.from_pretrained(path)
        _refuse_unsupported(settings, path)
        tokenizer = AutoTokenizer.from_pretrained(path)
        if quantization := getattr(settings, "quantization_config", None):
            if config.tuning == "full":
                raise ModelError(f"{path} is quantized: only an adapter can be trained on it, not --tuning full")
            if config.parallel == "fsdp":
                raise ModelError(f"{path} is quantized: its packed weights cannot be sharded; use --parallel ddp")
            model = load_quantized(path, settings, dict(quantization), device, dtype)
        elif config.parallel == "fsdp" and ranks.count() > 1:
            model = _load_in_shards(path, device, dtype)
        else:
            model = _load(path, dtype)
            model.to(device)
    prepare_layers(model, checkpointing=config.gradient_checkpointing, compiled=config.compile)
    return BaseModel(model, tokenizer, path, device, dtype)


def _load(path: Path, dtype: torch.dtype) -> Any:
    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype, attn_implementation=attention.NAME)


def _load_in_shards(path: Path, device: torch.device, dtype: torch.dtype) -> Any:
    """One process after the other, so that the host holds one whole model at a time."""
    mesh = sharding.make_mesh(device)
    for turn in range(ranks.count()):
        if turn == ranks.rank():
            model = _load(path, dtype)
            sharding.shard(model, mesh, device)
        ranks.wait()
    return model


def prepare_layers(model: Any, *, checkpointing: bool, compiled: bool) -> None:
    """Recompute each decoder layer in the backward pass, and compile it: one layer's code serves them all."""
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if compiled:
        # Else the first layer's input has no gradient, and it would be compiled apart.
        model.enable_input_require_grads()
        for layer in model.base_model.layers:
            layer.forward = _compiled_to_train(layer.forward)


def _compiled_to_train(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Compiled where gradients are wanted; evaluation and greedy answers are not worth compiling for."""
    compiled = torch.compile(forward, backend=_COMPILER)

    def either(*args: Any, **kwargs: Any) -> Any:
        return (compiled if torch.is_grad_enabled() else forward)(*args, **kwargs)

    return either


def resolve_model(name: str) -> Path:
    """The checkpoint directory of a path, `demo` or hub id. Raises ModelError."""
    if (Path(name).expanduser() / "config.json").is_file():
        return Path(name).expanduser().absolute()
    if name == "demo":
        home = Path(os.environ.get("TUNEGATE_HOME") or Path.home() / ".tunegate")
        if (home / "models" / "demo" / "config.json").is_file():
            return home / "models" / "demo"
        raise ModelError("the demo model is not there yet: run `gateway models pull demo`")
    if Path(name).expanduser().exists() or name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise ModelError(f"--model {name}: no config.json there; give a checkpoint directory, a hub id, or `demo`")
    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ModelError(f"--model {name} could not be fetched from the hub: {error}") from error


def _refuse_unsupported(settings: Any, path: Path) -> None:
    text = settings.get_text_config()
    for name, harmless in _LOGIT_QUIRKS.items():
        value = getattr(text, name, None)
        if value is not None and value != harmless:
            raise ModelError(f"{path} scales its logits ({name}={value}), which the trainer cannot do yet")
    odd = {kind for kind in getattr(text, "layer_types", None) or () if kind not in _ATTENTION_LAYERS}
    if odd:
        raise ModelError(f"{path} has layers of kind {', '.join(sorted(odd))}; the trainer packs attention layers only")


_ATTENTION_LAYERS = ("full_attention", "sliding_attention")


def _dtype(config: TrainConfig, device: torch.device) -> torch.dtype:
    if config.tuning == "full" and config.dtype == "bfloat16":
        raise ModelError(
            "full-parameter training in bfloat16 loses small updates; use --dtype float32, or --tuning lora"
        )
    if config.dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" and config.tuning == "lora" else torch.float32
    return torch.bfloat16 if config.dtype == "bfloat16" else torch.float32


@contextmanager
def _as_model_error(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"{path} cannot be loaded: {error}") from error
