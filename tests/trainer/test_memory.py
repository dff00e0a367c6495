"""Out of memory, and compiled layers: the same mathematics by other means."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs torch")

from tests.trainer.models import make_checkpoint, preference_rows, write_jsonl  # noqa: E402
from tests.trainer.test_numerics import CPU, gradients, make_learner, random_sequences  # noqa: E402
from trainer import config, model, run  # noqa: E402
from trainer.errors import ModelError  # noqa: E402
from trainer.events import curve, read_events  # noqa: E402
from trainer.learner import Learner  # noqa: E402
from trainer.objectives import Sft  # noqa: E402
from trainer.pack import halves, pack_sequences  # noqa: E402


def limit_memory(monkeypatch: pytest.MonkeyPatch, tokens: int) -> list[int]:
    """Let rows over so many tokens fail after their gradients were added, as a backward pass on a device may."""
    seen: list[int] = []
    whole = Learner.forward_backward

    def limited(self: Learner, batch: Any, objective: Any, normaliser: float) -> Any:
        metrics = whole(self, batch, objective, normaliser)
        seen.append(batch.tokens)
        if batch.tokens > tokens:
            raise torch.OutOfMemoryError("out of memory")
        return metrics

    monkeypatch.setattr(Learner, "forward_backward", limited)
    return seen


def dpo(checkpoint: Path, tmp_path: Path, name: str, **settings: Any) -> config.TrainConfig:
    data = write_jsonl(tmp_path / "pairs.jsonl", preference_rows(8))
    values = {"model": str(checkpoint), "device": "cpu", "dataset": [data], "output_dir": tmp_path / name}
    return config.load(
        "dpo",
        None,
        values | {"batch_size": 4, "max_steps": 3, "learning_rate": 1e-3, "micro_batch_tokens": 2048} | settings,
    )


def test_backing_off_keeps_the_curve(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run.start(dpo(checkpoint, tmp_path, "whole"))
    seen = limit_memory(monkeypatch, 130)
    run.start(dpo(checkpoint, tmp_path, "split", oom_backoff=True))
    assert sum(tokens > 130 for tokens in seen) == 1  # one failure, and no more
    whole, split = (tmp_path / name / "events.jsonl" for name in ("whole", "split"))
    assert list(curve(split).values()) == pytest.approx(list(curve(whole).values()), rel=1e-4)
    assert any("are split from now on" in event.get("message", "") for event in read_events(split))


def test_out_of_memory_says_what_to_do(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limit_memory(monkeypatch, 10)
    with pytest.raises(ModelError, match="--oom-backoff"):
        run.start(dpo(checkpoint, tmp_path, "plain"))
    with pytest.raises(ModelError, match="--micro-batch-tokens"):  # one pair alone is too much
        run.start(dpo(checkpoint, tmp_path, "too-small", oom_backoff=True))


def test_halves_are_the_row(checkpoint: Path) -> None:
    learner = make_learner(checkpoint)
    batch = pack_sequences(random_sequences((20, 9, 40, 31)), CPU)
    whole = learner.forward_backward(batch, Sft(), 10.0)["loss"]
    expected = gradients(learner)
    parts = halves(batch, 2)
    assert [part.segments.lengths for part in parts] == [(19, 8), (39, 30)]
    torch.testing.assert_close(sum(learner.forward_backward(part, Sft(), 10.0)["loss"] for part in parts), whole)
    for name, gradient in gradients(learner).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-6)
    assert halves(parts[0], 2) == []


@pytest.mark.filterwarnings("ignore")  # of the compiler, about itself
def test_compiled_layers_give_the_same_loss_and_gradients(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model, "_COMPILER", "aot_eager")  # its tracing is what can break; its kernels take minutes here
    path = make_checkpoint(tmp_path / "m", family="qwen3")
    plain, compiled = make_learner(path), make_learner(path)
    model.prepare_layers(compiled.base.model, checkpointing=False, compiled=True)
    for lengths in ((7, 20, 13), (30, 5)):
        batch = pack_sequences(random_sequences(lengths), CPU)
        batch.weights_K.copy_(torch.from_numpy(np.ones(len(batch.weights_K), np.float32)))
        losses = [learner.forward_backward(batch, Sft(), 10.0)["loss"] for learner in (plain, compiled)]
        torch.testing.assert_close(losses[0], losses[1])
        expected = gradients(plain)
        for name, gradient in gradients(compiled).items():
            torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-6)
