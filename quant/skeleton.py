"""A transformers model whose decoder layers hold no memory until they are loaded, one at a time.

The model's own code runs everything: the embedding and the head through its own forward with the layers stubbed out,
and each layer with the very arguments (masks, rotary tables) its model hands it. Layers are found by structure: the
longest list of modules that sits beside an embedding.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from quant.checkpoint import Checkpoint
from quant.errors import BadCheckpoint, UnsupportedModel
from quant.experts import unfuse_experts

_DERIVED = "rotary_emb.inv_freq"  # in old checkpoints; computed from the configuration


class _LastLayerReached(Exception):
    """What a run was made for is known: what comes after the layers, the head above all, need not run."""


class Skeleton:
    """The model of a checkpoint, ready to run layer by layer on `device`, in float32: one layer's worth fits."""

    def __init__(self, checkpoint: Checkpoint, device: torch.device, runs_head: bool = True) -> None:
        """Loads what is outside the layers. Raises UnsupportedModel, BadCheckpoint.

        runs_head: whether `logits` will be asked for; if not, a head with weights of its own takes no memory.
        """
        self.checkpoint, self.device = checkpoint, device
        self.model = _empty_model(checkpoint)
        self.prefix, self.layers = find_layers(self.model)
        for layer in self.layers:
            unfuse_experts(layer)
        self._check_names()
        self._load_outside(runs_head)
        self._arguments: dict[torch.Size, list[tuple[tuple[Any, ...], dict[str, Any]]]] = {}  # by [B, T], by layer

    def layer_prefix(self, index: int) -> str:
        """What the names of a layer's tensors start with: `model.layers.3.`"""
        return f"{self.prefix}.{index}."

    @property
    def outside_names(self) -> list[str]:
        """Names of the checkpoint's tensors that belong to no decoder layer."""
        return [name for name in self.checkpoint.entries if not name.startswith(f"{self.prefix}.")]

    @contextlib.contextmanager
    def loaded(self, index: int, weights: dict[str, Tensor]) -> Iterator[nn.Module]:
        """One layer with the given weights (relative names), in memory only inside the block."""
        layer = self.layers[index]
        cast = {name: tensor.to(self.device).float() for name, tensor in weights.items()}
        missing, unexpected = layer.load_state_dict(cast, strict=False, assign=True)
        if missing or unexpected:
            raise BadCheckpoint(f"layer {index}: missing {missing[:3]}, unknown {unexpected[:3]}")
        layer.requires_grad_(False)
        try:
            yield layer
        finally:
            layer.to("meta")

    @torch.no_grad()
    def embed(self, tokens_BT: Tensor) -> Tensor:
        """The hidden states [B, T, H] that enter the first layer."""
        captured: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        entering: list[Tensor] = []

        def capture(hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            if not entering:
                entering.append(hidden)
            captured.append((args, kwargs))
            if len(captured) == len(self.layers):
                raise _LastLayerReached
            return hidden

        with contextlib.suppress(_LastLayerReached):
            self._run_stubbed(tokens_BT, capture)
        self._arguments[tokens_BT.shape] = captured
        return entering[0]

    @torch.no_grad()
    def run(self, layer: nn.Module, index: int, hidden_BTH: Tensor) -> Tensor:
        """One loaded layer over one batch, of a size that `embed` has seen."""
        args, kwargs = self.arguments(index, hidden_BTH)
        return first_tensor(layer(hidden_BTH, *args, **kwargs))

    def arguments(self, index: int, hidden_BTH: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """What the model passes to a layer beside the hidden states, for a batch of this size."""
        return self._arguments[hidden_BTH.shape[:2]][index]

    @torch.no_grad()
    def logits(self, tokens_BT: Tensor, hidden_BTH: Tensor) -> Tensor:
        """[B, T, V] from the hidden states that leave the last layer."""
        return self._run_stubbed(tokens_BT, lambda hidden, *args, **kwargs: hidden_BTH)

    def _run_stubbed(self, tokens_BT: Tensor, stub: Callable[..., Tensor]) -> Tensor:
        for layer in self.layers:
            layer.forward = stub
        try:
            return self.model(input_ids=tokens_BT.to(self.device), use_cache=False).logits
        finally:
            for layer in self.layers:
                del layer.forward

    def _check_names(self) -> None:
        expected, given = set(self.model.state_dict()), set(self.checkpoint.entries)
        for module in self.checkpoint.quantized_modules:
            given = given - set(self.checkpoint.packed_names(module)) | {f"{module}.weight"}
        if self.model.config.tie_word_embeddings:
            given |= expected & {"lm_head.weight"}
        lost = sorted(expected - given)
        extra = sorted(name for name in given - expected if not name.endswith(_DERIVED))
        if lost or extra:
            raise UnsupportedModel(
                f"the checkpoint's tensors are not those of {type(self.model).__name__}: {len(lost)} missing "
                f"({', '.join(lost[:2]) or '-'}), {len(extra)} unknown ({', '.join(extra[:2]) or '-'})"
            )

    def _load_outside(self, runs_head: bool) -> None:
        names = [name for name in self.outside_names if not name.endswith(_DERIVED)]
        cast: dict[str, Tensor] = {}
        for name, tensor in self.checkpoint.tensors(names).items():
            stored = tensor.to(self.device)
            check_finite({name: stored})
            if runs_head or name not in self._head_names():
                cast[name] = stored.float()
        self.model.load_state_dict(cast, strict=False, assign=True)
        self.model.tie_weights()
        for module in self.model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                module.register_buffer(name, buffer.to(self.device), persistent=False)
        self.model.eval().requires_grad_(False)

    def _head_names(self) -> list[str]:
        head = self.model.get_output_embeddings()
        return [f"{name}.weight" for name, module in self.model.named_modules() if module is head]


def find_layers(model: nn.Module) -> tuple[str, Sequence[nn.Module]]:
    """(name, modules) of the decoder layers: the longest ModuleList whose parent owns an embedding of tokens."""
    found: tuple[str, Sequence[nn.Module]] = ("", [])
    for name, module in model.named_modules():
        if not any(isinstance(child, nn.Embedding) for child in module.children()):
            continue
        for child_name, child in module.named_children():
            if isinstance(child, nn.ModuleList) and len(child) > len(found[1]):
                found = (f"{name}.{child_name}" if name else child_name, list(child))
    if not found[1]:
        raise UnsupportedModel(f"{type(model).__name__} has no list of decoder layers beside a token embedding")
    return found


def first_tensor(output: Tensor | tuple[Tensor, ...]) -> Tensor:
    """The hidden states out of what a layer returns."""
    return output if isinstance(output, Tensor) else output[0]


def check_finite(weights: dict[str, Tensor]) -> None:
    """Raises BadCheckpoint naming the first tensor that holds NaN or infinity."""
    for name, tensor in weights.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise BadCheckpoint(f"{name} holds NaN or infinity: these weights are broken, fetch or train them again")


def _empty_model(checkpoint: Checkpoint) -> nn.Module:
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(checkpoint.directory)
    except ValueError as error:
        raise UnsupportedModel(f"transformers does not know this model: {error}") from error
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    if type(config) not in AutoModelForCausalLM._model_mapping:
        raise UnsupportedModel(f"{type(config).__name__} is not a text-generating model")
    with _parameters_on_meta():
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="sdpa")
    gc.collect()
    return model


@contextlib.contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Inside, modules get parameters without memory; buffers (rotary tables) stay real: nothing would refill them."""
    original = nn.Module.register_parameter

    def register(self: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and parameter.device.type != "meta":
            parameter = nn.Parameter(parameter.to("meta"), requires_grad=False)
        original(self, name, parameter)

    nn.Module.register_parameter = register
    try:
        yield
    finally:
        nn.Module.register_parameter = original
