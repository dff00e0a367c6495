"""Which examples share a forward pass, and the one row of tensors they become. There is no padding anywhere.

A batch of the optimizer is a set of examples. Packing only groups them into rows of at most a budget of tokens, and
the loss of the whole batch is one weighted mean, so packing changes speed and nothing else.

Shapes: T tokens of a row, K targets (tokens with a weight), S sequences in the row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
import torch

from trainer.dataset import TokenDataset


class Segments(NamedTuple):
    """Where sequences lie in a row; attention stays within each."""

    offsets_S1: torch.Tensor  # int32 [S + 1], on the device of the row
    lengths: tuple[int, ...]  # the same on the host, in tokens
    longest: int
    uniform: bool = False  # all of one length, for which a dense kernel is worth preparing


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """One row for one forward pass."""

    token_ids_1T: torch.Tensor
    positions_1T: torch.Tensor
    segments: Segments
    rows_K: torch.Tensor  # which of the T hidden states predict a target
    targets_K: torch.Tensor
    weights_K: torch.Tensor  # float32
    sequence_K: torch.Tensor  # which sequence each target belongs to
    sequences: int  # S
    columns: dict[str, torch.Tensor] = field(default_factory=dict)  # what a method adds, named by its shape

    @property
    def tokens(self) -> int:
        """T."""
        return self.token_ids_1T.shape[1]

    def sum_by_sequence(self, values_K: torch.Tensor) -> torch.Tensor:
        """[S] sums of a per-target value."""
        return torch.zeros(self.sequences, dtype=values_K.dtype, device=values_K.device).index_add(
            0, self.sequence_K, values_K
        )


def plan(lengths: Sequence[int], budget_tokens: int) -> list[list[int]]:
    """Group items into bins of at most the budget, by best fit of the longest first; an item over it gets its own bin.

    Pure and deterministic; each bin lists its items in ascending order.
    """
    bins: list[list[int]] = []
    free: list[int] = []
    for item in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        fitting = [b for b, room in enumerate(free) if room >= lengths[item]]
        if fitting:
            best = min(fitting, key=lambda b: free[b])
            bins[best].append(item)
            free[best] -= lengths[item]
        else:
            bins.append([item])
            free.append(budget_tokens - lengths[item])
    return [sorted(items) for items in bins]


def shares(lengths: Sequence[int], count: int) -> list[list[int]]:
    """Items dealt to so many processes, about as many tokens to each: longest first, to the one with the least.

    Pure and deterministic; each share lists its items in ascending order, and may be empty.
    """
    dealt: list[list[int]] = [[] for _ in range(count)]
    tokens = [0] * count
    for item in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        least = min(range(count), key=lambda process: (tokens[process], process))
        dealt[least].append(item)
        tokens[least] += lengths[item]
    return [sorted(items) for items in dealt]


def own_rows(
    lengths: Sequence[int], budget_tokens: int, *, packing: bool = True, rank: int = 0, count: int = 1
) -> list[list[int]]:
    """The items of one process, grouped for a forward pass each.

    Every process gets as many groups: where it has fewer than others, the last ones are empty.
    """
    plans = []
    for share in shares(lengths, count):
        bins = plan([lengths[i] for i in share], budget_tokens) if packing else [[k] for k in range(len(share))]
        plans.append([[share[k] for k in items] for items in bins])
    own = plans[rank]
    return own + [[] for _ in range(max(map(len, plans)) - len(own))]


def collate(dataset: TokenDataset, examples: Sequence[int], device: torch.device) -> PackedBatch:
    """The examples' sequences, one after the other, on the device. Each gives all but its last token as input."""
    pairs = [sequence for example in examples for sequence in dataset.sequences(example)]
    return pack_sequences(pairs, device)


def pack_sequences(pairs: Sequence[tuple[np.ndarray, np.ndarray]], device: torch.device) -> PackedBatch:
    """A row from (token ids, weights) of whole sequences."""
    lengths = tuple(len(ids) - 1 for ids, _ in pairs)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    weights_T = np.concatenate([weights[1:] for _, weights in pairs])
    rows_K = np.flatnonzero(weights_T)
    columns = {
        "token_ids": np.concatenate([ids[:-1] for ids, _ in pairs]).astype(np.int64)[None],
        "positions": np.concatenate([np.arange(length) for length in lengths])[None],
        "offsets": offsets.astype(np.int32),
        "rows": rows_K,
        "targets": np.concatenate([ids[1:] for ids, _ in pairs]).astype(np.int64)[rows_K],
        "weights": weights_T[rows_K].astype(np.float32),
        "sequence": np.repeat(np.arange(len(pairs)), lengths)[rows_K],
    }
    on_device = {name: _to_device(column, device) for name, column in columns.items()}
    return PackedBatch(
        token_ids_1T=on_device["token_ids"],
        positions_1T=on_device["positions"],
        segments=Segments(on_device["offsets"], lengths, max(lengths), _uniform(lengths, device)),
        rows_K=on_device["rows"],
        targets_K=on_device["targets"],
        weights_K=on_device["weights"],
        sequence_K=on_device["sequence"],
        sequences=len(pairs),
    )


def blank(batch: PackedBatch) -> PackedBatch:
    """The row with nothing to learn: it keeps a process in step with others that have a row more."""
    return replace(
        batch,
        rows_K=batch.rows_K[:0],
        targets_K=batch.targets_K[:0],
        weights_K=batch.weights_K[:0],
        sequence_K=batch.sequence_K[:0],
        sequences=0,
        columns={name: column[:0] for name, column in batch.columns.items()},
    )


def join(batches: Sequence[PackedBatch]) -> PackedBatch:
    """One row of several, in order. The targets of each stay together; what a method added is left out."""
    starts = [0]
    for batch in batches:
        starts.append(starts[-1] + batch.tokens)
    lengths = tuple(length for batch in batches for length in batch.segments.lengths)
    offsets = [batch.segments.offsets_S1[:-1] + start for batch, start in zip(batches, starts, strict=False)]
    offsets.append(torch.full_like(offsets[0][:1], starts[-1]))
    sequences = [sum(batch.sequences for batch in batches[:i]) for i in range(len(batches))]
    return PackedBatch(
        token_ids_1T=torch.cat([batch.token_ids_1T for batch in batches], 1),
        positions_1T=torch.cat([batch.positions_1T for batch in batches], 1),
        segments=Segments(torch.cat(offsets), lengths, max(lengths)),
        rows_K=torch.cat([batch.rows_K + start for batch, start in zip(batches, starts, strict=False)]),
        targets_K=torch.cat([batch.targets_K for batch in batches]),
        weights_K=torch.cat([batch.weights_K for batch in batches]),
        sequence_K=torch.cat([batch.sequence_K + first for batch, first in zip(batches, sequences, strict=True)]),
        sequences=sum(batch.sequences for batch in batches),
    )


def halves(batch: PackedBatch, per_example: int) -> list[PackedBatch]:
    """The row as two with about half of the tokens each; none when it is one example of so many sequences."""
    lengths = batch.segments.lengths
    ends = np.cumsum(lengths)
    cuts = range(per_example, len(lengths), per_example)
    if not cuts:
        return []
    cut = min(cuts, key=lambda at: abs(2 * int(ends[at - 1]) - batch.tokens))
    first = int(ends[cut - 1])
    targets = int((batch.rows_K < first).sum())
    return [_slice(batch, 0, cut, 0, first, 0, targets), _slice(batch, cut, None, first, None, targets, None)]


def _slice(
    batch: PackedBatch,
    sequence: int,
    sequences: int | None,
    token: int,
    tokens: int | None,
    target: int,
    targets: int | None,
) -> PackedBatch:
    """Sequences, tokens and targets from the first to before the second of each pair."""
    lengths = batch.segments.lengths[sequence:sequences]
    offsets = batch.segments.offsets_S1[sequence : None if sequences is None else sequences + 1] - token
    kept = {"S": slice(sequence, sequences), "K": slice(target, targets)}
    return PackedBatch(
        token_ids_1T=batch.token_ids_1T[:, token:tokens],
        positions_1T=batch.positions_1T[:, token:tokens],
        segments=Segments(offsets, lengths, max(lengths), batch.segments.uniform),
        rows_K=batch.rows_K[target:targets] - token,
        targets_K=batch.targets_K[target:targets],
        weights_K=batch.weights_K[target:targets],
        sequence_K=batch.sequence_K[target:targets] - sequence,
        sequences=len(lengths),
        columns={name: column[kept[name[-1]]] for name, column in batch.columns.items()},
    )


def _uniform(lengths: tuple[int, ...], device: torch.device) -> bool:
    """Whether Hopper's dense attention kernel should take the row.

    Preparing it costs 0.1 s for every new length, so only lengths that long texts are cut to come in question.
    """
    if device.type != "cuda" or len(set(lengths)) > 1 or lengths[0] < 1024 or lengths[0] % 64 not in (0, 63):
        return False
    return torch.cuda.get_device_capability(device) >= (9, 0)


def _to_device(column: np.ndarray, device: torch.device) -> torch.Tensor:
    tensor = torch.from_numpy(column)
    # A copy from pinned memory does not make the host wait for the device.
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor
