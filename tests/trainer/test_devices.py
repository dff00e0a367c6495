"""What a step reports lies on the model's device, where it is stacked. Torch's `meta` stands in for a GPU."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="needs torch")

from tests.trainer.test_numerics import CPU, make_learner, random_sequences  # noqa: E402
from trainer.learner import Learner  # noqa: E402
from trainer.objectives import Dpo, Grpo, Kto, Orpo, PerToken, Simpo  # noqa: E402
from trainer.pack import pack_sequences  # noqa: E402
from trainer.readback import Readback  # noqa: E402

DEVICE = torch.device("meta")


def test_a_step_without_gradients(checkpoint: Path) -> None:
    """As in GRPO when the answers of every group are worth the same."""
    on_cpu = make_learner(checkpoint)
    learner = Learner(replace(on_cpu.base, device=DEVICE), on_cpu.adapter, weight_decay=0.0)
    reported = learner.optim_step(1e-4, 1.0)
    assert {name: value.device for name, value in reported.items()} == {"grad_norm": DEVICE, "skipped": DEVICE}


@pytest.mark.parametrize(
    "objective",
    [Dpo(0.1, 0.1), Orpo(0.1), Simpo(2.0, 0.5), Kto(0.1, 1, 1), Grpo(0.1, 0.2, 0.2)],
    ids=lambda objective: type(objective).__name__,
)
def test_what_an_objective_reports(objective: PerToken) -> None:
    row = pack_sequences(random_sequences((9, 7)), CPU)
    tensors = {name: getattr(row, name).to(DEVICE) for name in ("rows_K", "targets_K", "weights_K", "sequence_K")}
    logprobs_K = torch.empty(len(row.targets_K), device=DEVICE)
    columns = {"desirable_S": torch.empty(2, dtype=torch.bool, device=DEVICE)}
    columns |= {"sampled_K": logprobs_K, "advantage_K": logprobs_K}
    if isinstance(objective, Kto):
        objective.kl = torch.empty((), device=DEVICE)
    loss, reported = objective.loss(logprobs_K, logprobs_K, replace(row, columns=columns, **tensors))
    assert {value.device for value in (loss, *reported.values())} == {DEVICE}


@pytest.mark.parametrize("late", [True, False])
def test_metrics_come_with_the_step_or_one_later(late: bool) -> None:
    readback = Readback(CPU, late=late)
    found = [readback.push({"step": step}, {"loss": torch.tensor(step / 2)}) for step in (1, 2)]
    first, second = {"step": 1, "loss": 0.5}, {"step": 2, "loss": 1.0}
    assert found == ([[], [first]] if late else [[first], [second]])
    assert readback.drain() == ([second] if late else [])
