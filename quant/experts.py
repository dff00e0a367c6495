"""Mixture-of-experts blocks, opened up so that each expert is three ordinary linears with an input of its own.

transformers fuses all experts of a layer into two 3-D parameters; checkpoints and engines keep one matrix an expert.
The bank below has the checkpoint's names and computes the same thing.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from quant.errors import UnsupportedModel


class Expert(nn.Module):
    """down(act(gate(x)) * up(x))"""

    def __init__(self, hidden: int, intermediate: int, activation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden, intermediate, bias=False, device="meta")
        self.up_proj = nn.Linear(hidden, intermediate, bias=False, device="meta")
        self.down_proj = nn.Linear(intermediate, hidden, bias=False, device="meta")
        self.act_fn = activation

    def forward(self, x_TH: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x_TH)) * self.up_proj(x_TH))


class ExpertBank(nn.ModuleList):
    """The experts of one layer, called as the fused module is: tokens, chosen experts [T, k], their weights [T, k]."""

    def forward(self, x_TH: Tensor, chosen_Tk: Tensor, weight_Tk: Tensor) -> Tensor:
        output_TH = torch.zeros_like(x_TH)
        for index in chosen_Tk.unique().tolist():
            token_M, slot_M = torch.where(chosen_Tk == index)
            answer_MH = self[index](x_TH[token_M]) * weight_Tk[token_M, slot_M, None]
            output_TH.index_add_(0, token_M, answer_MH.to(output_TH.dtype))
        return output_TH


def unfuse_experts(layer: nn.Module) -> None:
    """Replace every fused expert module below `layer` by an ExpertBank (without weights yet)."""
    for name, module in list(layer.named_modules()):
        parameters = dict(module.named_parameters(recurse=False))
        if not any(parameter.dim() == 3 for parameter in parameters.values()):
            continue
        parent_name, _, own_name = name.rpartition(".")
        setattr(layer.get_submodule(parent_name), own_name, _open(name, module, parameters))


def _open(name: str, module: nn.Module, parameters: dict[str, nn.Parameter]) -> ExpertBank:
    gate_up, down = parameters.get("gate_up_proj"), parameters.get("down_proj")
    known = len(parameters) == 2 and hasattr(module, "act_fn")
    if not known or gate_up is None or down is None or tuple(gate_up.shape[1:]) != (2 * down.shape[2], down.shape[1]):
        raise UnsupportedModel(
            f"{name} ({type(module).__name__}) holds experts of an unknown layout: expected gate_up_proj "
            "[E, 2I, H] and down_proj [E, H, I] without biases"
        )
    count, hidden, intermediate = down.shape
    return ExpertBank([Expert(hidden, intermediate, module.act_fn) for _ in range(count)])
