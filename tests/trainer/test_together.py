"""Several adapters trained at once: each as it would be alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

torch = pytest.importorskip("torch", reason="needs torch")

from safetensors.torch import load_file  # noqa: E402

from tests.trainer.models import chat_rows, labelled_rows, preference_rows, write_jsonl  # noqa: E402
from trainer import config, joint, run  # noqa: E402
from trainer.errors import ConfigError, DivergedError, RunError  # noqa: E402
from trainer.events import curve  # noqa: E402
from trainer.learner import Learner  # noqa: E402
from trainer.loop import Ending  # noqa: E402


@pytest.fixture
def runs(checkpoint: Path, tmp_path: Path) -> list[dict[str, Any]]:
    """Four methods, ranks, targets, rates, lengths and amounts of data."""
    shared = {"model": str(checkpoint), "device": "cpu", "golden_prompts": 1, "micro_batch_tokens": 1024}
    chats = write_jsonl(tmp_path / "chats.jsonl", chat_rows(20))
    own: list[dict[str, Any]] = [
        {"method": "sft", "dataset": chats, "lora_rank": 4, "learning_rate": 1e-2, "batch_size": 8, "max_steps": 7},
        {"method": "sft", "dataset": chats, "lora_rank": 8, "lora_target": ["q_proj"], "batch_size": 4, "max_steps": 4},
        {"method": "dpo", "dataset": write_jsonl(tmp_path / "pairs.jsonl", preference_rows(12)), "learning_rate": 1e-3},
        {"method": "kto", "dataset": write_jsonl(tmp_path / "labels.jsonl", labelled_rows(24)), "learning_rate": 1e-3},
    ]
    own[0] |= {"eval_dataset": write_jsonl(tmp_path / "eval.jsonl", chat_rows(5)), "eval_every": 3}
    own[2] |= {"batch_size": 4, "max_steps": 6, "seed": 3}
    own[3] |= {"batch_size": 6, "max_steps": 5}
    return [shared | run | {"output_dir": tmp_path / f"run-{i}"} for i, run in enumerate(own)]


def loaded(runs: list[dict[str, Any]]) -> list[config.TrainConfig]:
    lists = {"dataset", "eval_dataset"}
    return [
        config.load(
            str(values["method"]),
            None,
            {key: [value] if key in lists else value for key, value in values.items() if key != "method"},
        )
        for values in runs
    ]


def results(directory: Path) -> tuple[list[float], dict[str, torch.Tensor]]:
    return list(curve(directory / "events.jsonl").values()), load_file(
        directory / "adapter" / "adapter_model.safetensors"
    )


def test_each_curve_is_the_one_it_has_alone(
    runs: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared_rows = []
    forward_backward = joint.forward_backward
    monkeypatch.setattr(joint, "forward_backward", lambda rows: shared_rows.append(len(rows)) or forward_backward(rows))
    assert run.start_together(loaded(runs)) == [Ending.FINISHED] * 4
    assert max(shared_rows) >= 3  # rows of different runs really went through the model at once
    for i, alone in enumerate(
        loaded([values | {"output_dir": tmp_path / f"alone-{i}"} for i, values in enumerate(runs)])
    ):
        run.start(alone)
        (curve_alone, adapter_alone), (curve_shared, adapter_shared) = (
            results(tmp_path / name) for name in (f"alone-{i}", f"run-{i}")
        )
        assert curve_shared == pytest.approx(curve_alone, rel=1e-3, abs=1e-5)
        assert adapter_alone.keys() == adapter_shared.keys()
        for name, tensor in adapter_alone.items():
            torch.testing.assert_close(adapter_shared[name], tensor, rtol=1e-2, atol=2e-3)


def test_a_run_that_fails_leaves_the_others_alone(
    runs: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    optim_step = Learner.optim_step
    victim: list[Learner] = []

    def failing(self: Learner, *args: Any) -> Any:
        victim[:] = victim or [self]
        if self is victim[0]:
            raise DivergedError("it left the numbers")
        return optim_step(self, *args)

    monkeypatch.setattr(Learner, "optim_step", failing)
    outcomes = run.start_together(loaded(runs))
    assert sum(isinstance(outcome, DivergedError) for outcome in outcomes) == 1
    assert outcomes.count(Ending.FINISHED) == 3
    monkeypatch.undo()
    # Again: the failed one goes on, the finished ones stay as they are.
    assert run.start_together(loaded(runs)) == [Ending.FINISHED] * 4
    with pytest.raises(RunError, match="another configuration"):
        run.start_together(loaded([values | {"seed": 9} for values in runs]))


def test_a_file_of_runs(runs: list[dict[str, Any]], tmp_path: Path) -> None:
    file = tmp_path / "runs.yaml"
    plain = [{key: str(v) if isinstance(v, Path) else v for key, v in values.items()} for values in runs]
    model = plain[0]["model"]
    own = [{key: value for key, value in values.items() if key != "model"} for values in plain]
    file.write_text(yaml.safe_dump({"model": model, "runs": own}))
    assert config.load_together(file) == loaded(runs)

    def refused(changes: dict[str, Any], message: str) -> None:
        file.write_text(yaml.safe_dump({"model": model, "runs": [own[0], own[1] | changes]}))
        with pytest.raises(ConfigError, match=message):
            config.load_together(file)

    refused({"lora_ranc": 3}, r"runs\[1\]: unknown key `lora_ranc`, did you mean `lora_rank`")
    refused({"device": "cuda"}, r"runs\[1\]: `device` must be the same")
    refused({"oom_backoff": True}, r"runs\[1\]: `oom_backoff` does not work")
    refused({"parallel": "ddp"}, r"runs\[1\]: `parallel` does not work")
    refused({"tuning": "full"}, r"runs\[1\]: only LoRA")
    refused({"output_dir": own[0]["output_dir"]}, "that of another run")
    refused({"method": "ppo"}, "`method` must be one of")
    file.write_text("runs: 3\n")
    with pytest.raises(ConfigError, match="must hold `runs:`"):
        config.load_together(file)
