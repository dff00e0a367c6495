"""Several runs on one frozen model: rows of different runs share a forward pass, each through its own adapter.

The frozen weights are read once for all of them. Every run keeps its own loss, optimizer, schedule and data, so its
curve is the one it would have alone, within rounding.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from trainer.errors import TrainError
from trainer.learner import loss_of
from trainer.loop import Ending, Row, Steps, Training, out_of_memory, steps
from trainer.lora import Mix, Span
from trainer.objectives import Metrics, Sft
from trainer.pack import join, plan

Outcome = Ending | TrainError


def train_together(runs: Sequence[Training], budget_tokens: int) -> list[Outcome]:
    """Drive all runs to their ends; how each ended. One that fails leaves the others alone.

    Raises ModelError when the device's memory is not enough: that ends all.
    """
    outcomes: dict[int, Outcome] = {}
    asking: dict[int, tuple[Steps, Row]] = {}
    try:
        for i, run in enumerate(runs):
            _advance(i, steps(run), None, asking, outcomes)
        while asking:
            waiting = dict(asking)
            order = list(waiting)
            for group in plan([waiting[i][1].batch.tokens for i in order], budget_tokens):
                members = [order[k] for k in group]
                results = forward_backward([waiting[i][1] for i in members])
                for i, metrics in zip(members, results, strict=True):
                    _advance(i, waiting[i][0], metrics, asking, outcomes)
    except torch.OutOfMemoryError as error:
        widest = max(runs, key=lambda run: run.config.budget_tokens)
        raise out_of_memory(widest.config, max(run.source.longest_tokens for run in runs)) from error
    return [outcomes[i] for i in range(len(runs))]


def _advance(
    i: int, run: Steps, metrics: Metrics | None, asking: dict[int, tuple[Steps, Row]], outcomes: dict[int, Outcome]
) -> None:
    """Let one run go on to its next row, or to its end."""
    try:
        asking[i] = (run, next(run) if metrics is None else run.send(metrics))
    except StopIteration as stop:
        asking.pop(i, None)
        outcomes[i] = stop.value
    except TrainError as error:
        asking.pop(i, None)
        outcomes[i] = error


def forward_backward(rows: Sequence[Row]) -> list[Metrics]:
    """One pass over all rows, each through its own adapter; for each what `Learner.forward_backward` gives."""
    if len(rows) == 1:
        row = rows[0]
        return [row.learner.forward_backward(row.batch, row.objective, row.normaliser)]
    base = rows[0].learner.base
    rows[0].learner.set_mode(training=True)
    references = _references(rows)
    batch = join([row.batch for row in rows])
    mix, spans = _spans(rows)
    with mix.spans(*spans):
        hidden_KH = base.hidden_KH(batch)
        total = torch.zeros((), device=base.device)
        results: list[Metrics] = []
        for row, reference_K, mine_KH in zip(rows, references, _split(hidden_KH, rows), strict=True):
            loss, metrics = loss_of(mine_KH, base.head_VH, reference_K, row.batch, row.objective, row.normaliser)
            total = total + loss
            results.append(metrics)
        total.backward()
    return results


def _references(rows: Sequence[Row]) -> list[torch.Tensor | None]:
    """Log-probabilities by the base for the rows that need them, in one pass."""
    needing = [row for row in rows if not isinstance(row.objective, Sft) and row.objective.needs_reference]
    if not needing:
        return [None] * len(rows)
    together = needing[0].learner.reference(join([row.batch for row in needing]))
    found = dict(zip(map(id, needing), _split(together, needing), strict=True))
    return [found.get(id(row)) for row in rows]


def _split(values_K: torch.Tensor, rows: Sequence[Row]) -> Sequence[torch.Tensor]:
    parts: Sequence[torch.Tensor] = values_K.split([len(row.batch.targets_K) for row in rows])
    return parts


def _spans(rows: Sequence[Row]) -> tuple[Mix, list[Span]]:
    adapters = [row.learner.adapter for row in rows]
    spans, first = [], 0
    for row, adapter in zip(rows, adapters, strict=True):
        assert adapter is not None, "only adapters share a model"
        spans.append(Span(adapter.number, first, first + row.batch.tokens))
        first += row.batch.tokens
    assert adapters[0] is not None
    return adapters[0].mix, spans
