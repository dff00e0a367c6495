"""How much a quantized checkpoint differs from its original: perplexity, divergence, agreement, layer by layer.

Both models run side by side, one layer of each in memory at a time, so a model of any size can be compared.

Legend: B sequences, T tokens, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from quant.calib import cut, tokenizer_of
from quant.checkpoint import Checkpoint
from quant.errors import BadCalibration, BadCheckpoint
from quant.skeleton import Skeleton


@dataclass(frozen=True, slots=True)
class Quality:
    """Next-token statistics over the evaluated tokens."""

    tokens: int  # predicted
    original_perplexity: float
    perplexity: float
    kl_nats: float  # mean of KL(original || quantized) per token
    top1_agreement: float  # share of tokens where both would choose the same

    @property
    def perplexity_ratio(self) -> float:
        return self.perplexity / self.original_perplexity


def evaluate(
    original: Path,
    quantized: Path,
    tokens_BT: Tensor,
    device: torch.device,
    on_layer: Callable[[int, int], None] = lambda layer, layers: None,
) -> Quality:
    """Compare two checkpoints of one model on sequences of tokens. Raises QuantError."""
    (quality,) = evaluate_all(original, [quantized], tokens_BT, device, on_layer)
    return quality


def evaluate_all(
    original: Path,
    quantized: Sequence[Path],
    tokens_BT: Tensor,
    device: torch.device,
    on_layer: Callable[[int, int], None] = lambda layer, layers: None,
) -> list[Quality]:
    """Compare each of several checkpoints with their original, which runs once. Raises QuantError."""
    sides = [Skeleton(Checkpoint(directory), device) for directory in (original, *quantized)]
    sizes = [(len(side.layers), side.model.get_input_embeddings().num_embeddings) for side in sides]
    for directory, size in zip(quantized, sizes[1:], strict=True):
        if size != sizes[0]:
            raise BadCheckpoint(
                f"{directory} ({size[0]} layers, {size[1]} tokens in its vocabulary) was not made from {original} "
                f"({sizes[0][0]} layers, {sizes[0][1]} tokens): give the model that it was made from"
            )
    batches = tokens_BT.split(max(1, 4096 // tokens_BT.shape[1]))
    states = [[side.embed(batch).cpu() for batch in batches] for side in sides]
    layers = len(sides[0].layers)
    for index in range(layers):
        for side, hidden in zip(sides, states, strict=True):
            with side.loaded(index, side.checkpoint.weights(side.layer_prefix(index))) as layer:
                hidden[:] = [side.run(layer, index, batch.to(device)).cpu() for batch in hidden]
        on_layer(index + 1, layers)

    totals = torch.zeros(len(quantized), 4, dtype=torch.float64)
    for number, batch in enumerate(batches):
        for row in range(batch.shape[0]):  # one sequence at a time: logits are the widest tensor of all
            own = slice(row, row + 1)
            each_TV = (
                side.logits(batch[own], hidden[number][own].to(device))[0, :-1]
                for side, hidden in zip(sides, states, strict=True)
            )
            before_TV, target_T = next(each_TV), batch[row, 1:].to(device)
            totals += torch.stack([compare_logits(before_TV, after_TV, target_T) for after_TV in each_TV])
    count = tokens_BT.shape[0] * (tokens_BT.shape[1] - 1)
    for directory, sums in zip(quantized, totals, strict=True):
        if not bool(torch.isfinite(sums).all()):
            raise BadCheckpoint(
                f"what {directory} computes on this text is not finite: its weights or scales are broken"
            )
    means = (totals / count).tolist()
    return [Quality(count, math.exp(before), math.exp(after), kl, agreed) for before, after, kl, agreed in means]


def compare_logits(before_TV: Tensor, after_TV: Tensor, target_T: Tensor) -> Tensor:
    """Sums over tokens, float64 [4]: loss before, loss after, KL(before || after), same first choice."""
    before_TV, after_TV = before_TV.float().log_softmax(-1), after_TV.float().log_softmax(-1)
    index = target_T.unsqueeze(-1)
    kl = (before_TV.exp() * (before_TV - after_TV)).sum()
    agreed = (before_TV.argmax(-1) == after_TV.argmax(-1)).sum()
    losses = [-side.gather(-1, index).sum() for side in (before_TV, after_TV)]
    return torch.stack([*losses, kl, agreed]).double().cpu()


def evaluation_tokens(directory: Path, text: Path, samples: int, length_tokens: int) -> Tensor:
    """Sequences [B, T] from a plain text file, from its start and in order. Raises BadCalibration, BadCheckpoint."""
    try:
        words = text.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise BadCalibration(f"{text} is not plain text: {error}") from error
    ids = tokenizer_of(directory)(words, verbose=False)["input_ids"]
    if len(ids) < 2:
        raise BadCalibration(f"{text} holds {len(ids)} tokens: nothing to evaluate")
    return cut(ids, samples, length_tokens)
