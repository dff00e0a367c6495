"""Linear layers frozen in four bits: a quantized checkpoint's own weights, so training sees what is served.

Whatever the file's layout, a weight is held as compressed-tensors packs it: eight values along the input in a word, the
first in its lowest bits, with a scale and a zero point for each group of inputs.

Shapes: O outputs, I inputs, W = I / 8 words, G groups of inputs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from trainer.errors import ModelError
from trainer.products import BITS, Frozen, dequantize, products

_PER_WORD = 32 // BITS
_AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)  # where AutoAWQ's gemm layout keeps each of a word's columns

Pieces = dict[str, Tensor]  # the tensors of one layer, by the last part of their names


class PackedLinear(nn.Module):
    """A frozen linear layer of four bits a weight."""

    def __init__(self, words_OW: Tensor, scale_OG: Tensor, zero_OG: Tensor, bias_O: Tensor | None) -> None:
        super().__init__()
        self.out_features, self.in_features = words_OW.shape[0], words_OW.shape[1] * _PER_WORD
        self.register_buffer("words", words_OW)
        self.register_buffer("scale", scale_OG)
        self.register_buffer("zero", zero_OG)
        self.register_buffer("bias", bias_O)

    @property
    def weight(self) -> Tensor:
        """[O, I] made dense, in the type of the scales."""
        return dequantize(self.words, self.scale, self.zero, self.scale.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """[..., I] -> [..., O]."""
        (y_TO,) = products(x.reshape(-1, x.shape[-1]), [Frozen(self.words, self.scale, self.zero, self.bias)], [])
        return y_TO.view(*x.shape[:-1], -1)


def pack(q_OI: Tensor) -> Tensor:
    """Values 0..15 [O, I] into words [O, W]."""
    q_OWV = q_OI.to(torch.int32).unflatten(1, (-1, _PER_WORD))
    words = torch.zeros_like(q_OWV[:, :, 0])
    for slot in range(_PER_WORD):
        words |= q_OWV[:, :, slot] << (BITS * slot)
    return words


def is_packed(pieces: Pieces) -> bool:
    """Whether these tensors are a layer of four bits in a layout known here."""
    return "qweight" in pieces or "weight_packed" in pieces


def read_layer(pieces: Pieces, settings: dict[str, Any], dtype: torch.dtype) -> PackedLinear:
    """The layer of a checkpoint with `quantization_config` settings. Raises ModelError."""
    method = settings.get("quant_method")
    bias = pieces["bias"].to(dtype) if "bias" in pieces else None
    if method == "compressed-tensors":
        _check_group_order(pieces.get("weight_g_idx"), pieces["weight_scale"].shape[1])
        words, scale = pieces["weight_packed"], pieces["weight_scale"]
        packed_zero = pieces.get("weight_zero_point")
        zero = torch.full_like(scale, 8, dtype=torch.uint8) if packed_zero is None else _values(packed_zero, 0)
    elif method == "awq":
        order = list(_AWQ_ORDER)
        words = pack(_columns(pieces["qweight"], order).t())
        scale, zero = pieces["scales"].t(), _columns(pieces["qzeros"], order).t()
    else:
        _check_group_order(pieces.get("g_idx"), pieces["scales"].shape[0])
        words, scale = pieces["qweight"].t(), pieces["scales"].t()
        stored = _values(pieces["qzeros"], 1).t()
        zero = stored if settings.get("checkpoint_format") == "gptq_v2" else (stored + 1) & 15
    return PackedLinear(words.contiguous(), scale.contiguous(), zero.contiguous(), bias)


def check_settings(settings: dict[str, Any], source: object) -> None:
    """Refuse a quantization that cannot be trained on. Raises ModelError."""
    method = settings.get("quant_method")
    if method not in ("awq", "gptq", "compressed-tensors"):
        raise ModelError(
            f"{source} is quantized by {method!r}; the trainer takes awq, gptq, compressed-tensors (pack-quantized), "
            "or the unquantized checkpoint"
        )
    groups = list((settings.get("config_groups") or {}).values())
    weights = [group["weights"] for group in groups] if method == "compressed-tensors" else [settings]
    bits = {one.get("num_bits", one.get("bits", one.get("w_bit"))) for one in weights}
    if bits != {BITS}:
        raise ModelError(f"{source} has weights of {', '.join(map(str, bits))} bits; the trainer takes {BITS}")
    if method == "compressed-tensors" and any(
        group.get("format", settings.get("format")) != "pack-quantized" or group.get("input_activations")
        for group in groups
    ):
        raise ModelError(f"{source} is not in the pack-quantized format, or quantizes activations too")


def _columns(words: Tensor, order: list[int]) -> Tensor:
    """Values of words packed along the last dimension, word by word in the given order of slots."""
    return _values(words, 1).unflatten(1, (-1, _PER_WORD))[:, :, order].flatten(1)


def _values(words: Tensor, dim: int) -> Tensor:
    """Values of words packed along `dim`, lowest bits first: uint8."""
    slots = [((words >> (BITS * slot)) & 15).to(torch.uint8) for slot in range(_PER_WORD)]
    return torch.stack(slots, dim=dim + 1).flatten(dim, dim + 1)


def _check_group_order(index: Tensor | None, groups: int) -> None:
    """Raises ModelError. index: the group of each input, or -1 throughout where they are in order."""
    if index is None or bool((index == -1).all()):
        return
    natural = torch.arange(len(index), device=index.device) // (len(index) // groups)
    if not torch.equal(index.long(), natural):
        raise ModelError("these weights were stored in activation order, whose groups are not runs of inputs")
