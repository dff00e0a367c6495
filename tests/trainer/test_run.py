"""Whole runs on a tiny model: pause, kill, full disk and resume give the curve of a run that was left alone."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="needs torch")

from click.testing import CliRunner  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

from tests.trainer.models import chat_rows, preference_rows, write_jsonl  # noqa: E402
from tests.trainer.test_numerics import make_learner  # noqa: E402
from trainer import assemble, cli, config, run  # noqa: E402
from trainer import checkpoint as checkpoints  # noqa: E402
from trainer.errors import DataError, DivergedError, ModelError, RunError  # noqa: E402
from trainer.events import curve, read_events  # noqa: E402
from trainer.export import export  # noqa: E402
from trainer.learner import Learner  # noqa: E402
from trainer.loop import Ending  # noqa: E402

STEPS = 12


@pytest.fixture
def settings(checkpoint: Path, tmp_path: Path) -> dict[str, Any]:
    """Dropout on, so that the random-number state matters; several epochs, so that the data order does."""
    return {
        "model": str(checkpoint),
        "device": "cpu",
        "dataset": [write_jsonl(tmp_path / "train.jsonl", chat_rows(22))],
        "eval_dataset": [write_jsonl(tmp_path / "eval.jsonl", chat_rows(5))],
        "output_dir": tmp_path / "run",
        "batch_size": 8,
        "epochs": 4,
        "micro_batch_tokens": 128,
        "learning_rate": 1e-2,
        "lora_rank": 4,
        "lora_dropout": 0.1,
        "save_every": 2,
        "eval_every": 6,
    }


def start(settings: dict[str, Any], method: str = "sft", **changes: Any) -> Ending:
    return run.start(config.load(method, None, settings | changes))


def result(directory: Path) -> tuple[dict[int, float], dict[str, torch.Tensor]]:
    """The loss curve and the final adapter."""
    return curve(directory / "events.jsonl"), load_file(directory / "adapter" / "adapter_model.safetensors")


def assert_same_run(one: Path, other: Path) -> None:
    (curve_one, adapter_one), (curve_other, adapter_other) = result(one), result(other)
    assert curve_one == curve_other
    assert adapter_one.keys() == adapter_other.keys()
    assert all(torch.equal(adapter_one[name], adapter_other[name]) for name in adapter_one)


def pause_at(monkeypatch: pytest.MonkeyPatch, directory: Path, step: int) -> None:
    """The run's own optimizer step asks for the pause, as if it came from outside just then."""
    optim_step = Learner.optim_step
    count = 0

    def counted(self: Learner, *args: Any) -> Any:
        nonlocal count
        count += 1
        if count == step:
            (directory / "pause").touch()
        return optim_step(self, *args)

    monkeypatch.setattr(Learner, "optim_step", counted)


def test_a_run_learns_and_leaves_everything_needed_to_repeat_it(settings: dict[str, Any], tmp_path: Path) -> None:
    assert start(settings) is Ending.FINISHED
    losses = curve(tmp_path / "run" / "events.jsonl")
    assert list(losses) == list(range(1, STEPS + 1))
    assert losses[STEPS] < losses[1] * 0.6
    manifest = json.loads((tmp_path / "run" / "adapter" / "manifest.json").read_text())
    assert manifest["base"]["weights_sha256"] and manifest["data"]["data"]["examples"] == 22
    assert manifest["metrics"]["train_loss"] == losses[manifest["metrics"]["step"]]
    assert manifest["metrics"]["eval"]["loss"] == curve(tmp_path / "run" / "events.jsonl", "eval")[STEPS]
    assert len(manifest["golden"]) == 4 and len(manifest["golden"][0]["logprobs"]) > 0
    for answer in manifest["golden"]:
        assert len(answer["base_logprobs"]) == len(answer["token_ids"])
        assert answer["base_logprobs"] != answer["logprobs"]
    repeated = config.reload(tmp_path / "run" / "config.yaml").model_copy(update={"output_dir": tmp_path / "again"})
    run.start(repeated)
    assert_same_run(tmp_path / "run", tmp_path / "again")


@pytest.mark.parametrize("method", ["sft", "dpo"])
def test_a_paused_run_goes_on_exactly(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    if method == "dpo":
        settings |= {"dataset": [write_jsonl(tmp_path / "pairs.jsonl", preference_rows(22))], "eval_dataset": []}
        del settings["eval_every"]
    start(settings, method)
    pause_at(monkeypatch, tmp_path / "paused", 5)
    assert start(settings, method, output_dir=tmp_path / "paused") is Ending.PAUSED
    monkeypatch.undo()
    assert not (tmp_path / "paused" / "adapter").exists()
    assert run.resume(tmp_path / "paused") is Ending.FINISHED
    assert_same_run(tmp_path / "run", tmp_path / "paused")


def test_packing_does_not_change_the_curve(settings: dict[str, Any], tmp_path: Path) -> None:
    start(settings, lora_dropout=0)
    start(settings, lora_dropout=0, packing=False, output_dir=tmp_path / "unpacked")
    packed, unpacked = (curve(tmp_path / name / "events.jsonl") for name in ("run", "unpacked"))
    assert packed == pytest.approx(unpacked, rel=1e-4)


def test_a_full_disk_at_a_checkpoint_loses_nothing(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start(settings)
    save_tensors = checkpoints.save_tensors
    calls = 0

    def full_twice(*args: Any) -> None:
        nonlocal calls
        calls += 1
        if calls in (2, 3):
            raise OSError(28, "No space left on device")
        save_tensors(*args)

    monkeypatch.setattr(checkpoints, "save_tensors", full_twice)
    assert start(settings, output_dir=tmp_path / "full") is Ending.FINISHED
    warnings = [event for event in read_events(tmp_path / "full" / "events.jsonl") if event["type"] == "warning"]
    assert [event["step"] for event in warnings] == [4, 6]
    assert not list((tmp_path / "full" / "checkpoints").glob("*.partial"))
    assert_same_run(tmp_path / "run", tmp_path / "full")


def test_a_full_disk_at_the_end_is_resumed_after_making_room(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start(settings)
    with monkeypatch.context() as patch:
        patch.setattr(assemble, "export", lambda *args: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        with pytest.raises(RunError, match=r"No space left on device\. Nothing is lost"):
            start(settings, output_dir=tmp_path / "full")
    assert run.resume(tmp_path / "full") is Ending.FINISHED
    assert_same_run(tmp_path / "run", tmp_path / "full")


def run_apart(settings: dict[str, Any], directory: Path, prelude: str) -> subprocess.CompletedProcess[bytes]:
    """A run by the command line in a process of its own, which first runs `prelude`."""
    file = directory.with_suffix(".yaml")
    file.write_text(config.dump(config.load("sft", None, settings | {"output_dir": directory})))
    code = f"{prelude}\nfrom trainer.cli import train; train()"
    return subprocess.run(
        [sys.executable, "-c", code, "sft", "--config", str(file)], capture_output=True, timeout=110, check=False
    )


def signal_itself(number: signal.Signals, step: int) -> str:
    """Code that makes the process signal itself in the middle of a step."""
    return f"""
import os
from trainer.learner import Learner
original, steps = Learner.optim_step, 0
def optim_step(self, *args):
    global steps
    steps += 1
    if steps == {step}:
        os.kill(os.getpid(), {int(number)})
    return original(self, *args)
Learner.optim_step = optim_step
"""


def test_kill_9_in_mid_step_loses_nothing(settings: dict[str, Any], tmp_path: Path) -> None:
    start(settings)
    killed = run_apart(settings, tmp_path / "killed", signal_itself(signal.SIGKILL, 8))
    assert killed.returncode == -signal.SIGKILL
    assert max(curve(tmp_path / "killed" / "events.jsonl")) == 7
    assert run.resume(tmp_path / "killed") is Ending.FINISHED
    assert_same_run(tmp_path / "run", tmp_path / "killed")


def test_sigusr1_pauses_with_status_75(settings: dict[str, Any], tmp_path: Path) -> None:
    paused = run_apart(settings, tmp_path / "signalled", signal_itself(signal.SIGUSR1, 3))
    assert paused.returncode == cli.EXIT_PAUSED, paused.stderr
    last = read_events(tmp_path / "signalled" / "events.jsonl")[-1]
    assert (last["type"], last["step"], last["reason"]) == ("paused", 3, "SIGUSR1")


def test_files_that_really_break_off_leave_no_checkpoint_behind(settings: dict[str, Any], tmp_path: Path) -> None:
    start(settings)
    # Every file over 50 kB breaks off, as on a full disk: no checkpoint fits, not even the one of the pause.
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))"
    limited = run_apart(settings, tmp_path / "limited", limit + signal_itself(signal.SIGTERM, 5))
    assert limited.returncode == 1
    assert b"earlier ones are whole" in limited.stderr
    assert checkpoints.CheckpointStore(tmp_path / "limited" / "checkpoints", 1).steps() == []
    assert run.resume(tmp_path / "limited") is Ending.FINISHED
    assert_same_run(tmp_path / "run", tmp_path / "limited")


def test_the_best_evaluated_step_is_exported_and_early_stopping_stops(settings: dict[str, Any], tmp_path: Path) -> None:
    # Steps this large throw the model about: it soon stops improving.
    ending = start(settings, epochs=20, eval_every=1, early_stopping=3, learning_rate=0.3, schedule="constant")
    events = tmp_path / "run" / "events.jsonl"
    evaluations = curve(events, "eval")
    best = min(evaluations, key=lambda step: evaluations[step])
    assert ending is Ending.STOPPED_EARLY and max(evaluations) == best + 3
    manifest = json.loads((tmp_path / "run" / "adapter" / "manifest.json").read_text())
    assert manifest["metrics"]["step"] == best
    saved = load_file(tmp_path / "run" / "checkpoints" / f"step-{best:08d}" / "adapter_model.safetensors")
    assert all(torch.equal(saved[name], value) for name, value in result(tmp_path / "run")[1].items())


def test_only_the_newest_checkpoints_and_the_best_are_kept(settings: dict[str, Any], tmp_path: Path) -> None:
    start(settings, keep_checkpoints=1)
    store = checkpoints.CheckpointStore(tmp_path / "run" / "checkpoints", 1)
    assert repr(store) == "<CheckpointStore 12>"


def test_a_half_written_checkpoint_is_not_taken_for_one(settings: dict[str, Any], tmp_path: Path) -> None:
    partial = tmp_path / "c" / "step-00000004.partial"
    partial.mkdir(parents=True)
    store = checkpoints.CheckpointStore(tmp_path / "c", 2)
    assert store.steps() == [] and not partial.exists()


def test_steps_that_stay_non_finite_end_the_run(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward_backward = Learner.forward_backward

    def poisoned(self: Learner, *args: Any) -> Any:
        metrics = forward_backward(self, *args)
        next(iter(self.parameters.values())).grad.fill_(float("nan"))
        return metrics

    monkeypatch.setattr(Learner, "forward_backward", poisoned)
    with pytest.raises(DivergedError, match="10 steps in a row up to 10 had non-finite gradients"):
        start(settings, eval_dataset=[], eval_every=None)
    last = read_events(tmp_path / "run" / "events.jsonl")[-1]
    assert last["type"] == "failed"


@pytest.mark.parametrize("method", ["dpo", "orpo", "simpo"])
def test_preferences_are_learnt(settings: dict[str, Any], tmp_path: Path, method: str) -> None:
    pairs = {"dataset": [write_jsonl(tmp_path / "pairs.jsonl", preference_rows(22))]}
    evaluated = {"eval_dataset": [write_jsonl(tmp_path / "held.jsonl", preference_rows(8))]}
    start(settings | pairs | evaluated, method)
    events = tmp_path / "run" / "events.jsonl"
    losses = curve(events)
    assert losses[STEPS] < losses[1]
    assert curve(events, field="reward_accuracy")[STEPS] > 0.9
    assert curve(events, "eval", "reward_accuracy")[STEPS] > 0.9


def test_every_parameter_can_be_trained(settings: dict[str, Any], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    start(settings, tuning="full", learning_rate=1e-3)
    losses = curve(tmp_path / "run" / "events.jsonl")
    assert losses[STEPS] < losses[1] * 0.6
    AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    assert json.loads((tmp_path / "run" / "model" / "manifest.json").read_text())["kind"] == "checkpoint"


def test_gradient_checkpointing_changes_nothing(settings: dict[str, Any], tmp_path: Path) -> None:
    start(settings, lora_dropout=0)
    start(settings, lora_dropout=0, gradient_checkpointing=True, output_dir=tmp_path / "checkpointed")
    assert curve(tmp_path / "checkpointed" / "events.jsonl") == pytest.approx(curve(tmp_path / "run" / "events.jsonl"))


def test_a_directory_with_a_run_is_not_overwritten(settings: dict[str, Any], tmp_path: Path) -> None:
    start(settings)
    with pytest.raises(RunError, match="gateway train resume"):
        start(settings)
    with pytest.raises(RunError, match="is finished"):
        run.resume(tmp_path / "run")
    with pytest.raises(RunError, match="holds no run"):
        run.resume(tmp_path)


def test_one_process_a_run(settings: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    with run._lock(tmp_path / "run"), pytest.raises(RunError, match="another process"):
        start(settings)


def test_changed_data_is_noticed_when_it_must_be_read_again(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pause_at(monkeypatch, tmp_path / "run", 3)
    start(settings)
    (tmp_path / "run" / "data" / "meta.json").unlink()
    write_jsonl(tmp_path / "train.jsonl", chat_rows(23))
    with pytest.raises(DataError, match="changed since the run began"):
        run.resume(tmp_path / "run")


def test_bad_data_names_its_lines_before_any_step(settings: dict[str, Any], tmp_path: Path) -> None:
    write_jsonl(tmp_path / "train.jsonl", [*chat_rows(2), {"messages": []}])
    outcome = CliRunner().invoke(cli.train, ["sft", *_flags(settings)])
    assert outcome.exit_code == 1
    assert "train.jsonl line 3: `messages` must be a list" in outcome.output


def test_a_run_that_never_began_is_started_anew_with_other_settings(settings: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ModelError):
        start(settings, lora_target=("nothing",))
    start(settings, max_length=40, max_steps=1)
    assert json.loads((tmp_path / "run" / "data" / "meta.json").read_text())["longest_tokens"] <= 40


def test_overlong_examples_are_dropped_with_notice_cut_or_refused(settings: dict[str, Any], tmp_path: Path) -> None:
    rows = chat_rows(22)
    rows[4]["messages"][1]["content"] = "yes " * 300
    write_jsonl(tmp_path / "train.jsonl", rows)
    changes = {"max_length": 128, "max_steps": 1, "eval_dataset": [], "eval_every": None}
    start(settings, **changes)
    assert any("1 examples dropped" in e.get("message", "") for e in read_events(tmp_path / "run" / "events.jsonl"))
    start(settings, **changes, overlong="truncate", output_dir=tmp_path / "cut")
    assert json.loads((tmp_path / "cut" / "run.json").read_text())["data"]["data"]["longest_tokens"] == 128
    with pytest.raises(DataError, match=r"train\.jsonl line 5: \d+ tokens, more than max_length 128"):
        start(settings, **changes, overlong="error", output_dir=tmp_path / "refused")


def test_a_torn_log_line_is_cut_on_resume(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pause_at(monkeypatch, tmp_path / "run", 3)
    start(settings)
    monkeypatch.undo()
    with (tmp_path / "run" / "events.jsonl").open("a") as log:
        log.write('{"type": "step", "st')
    run.resume(tmp_path / "run")
    assert all(json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines())


def test_out_of_memory_says_what_to_turn(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def exhausted(*args: Any) -> Any:
        raise torch.OutOfMemoryError("no")

    monkeypatch.setattr(Learner, "forward_backward", exhausted)
    with pytest.raises(ModelError, match=r"--micro-batch-tokens .*--gradient-checkpointing"):
        start(settings)


def _flags(settings: dict[str, Any]) -> list[str]:
    flags = []
    for name, value in settings.items():
        for item in value if isinstance(value, list) else [value]:
            flags += ["--" + name.replace("_", "-"), os.fspath(item) if isinstance(item, Path) else str(item)]
    return flags


def test_a_result_is_on_the_disk_before_it_has_its_name(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory, written = tmp_path / "adapter", set()

    def fsync(descriptor: int) -> None:
        if not directory.exists():
            written.add(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)

    monkeypatch.setattr(os, "fsync", fsync)
    export(make_learner(checkpoint), directory, {})
    assert {file.name for file in directory.iterdir()} < written


def test_a_directory_that_cannot_be_made_is_said_in_a_message(settings: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    given = ["--model", settings["model"], "--dataset", str(settings["dataset"][0]), "--device", "cpu"]
    done = CliRunner().invoke(cli.train, ["sft", *given, "--output-dir", str(tmp_path / "file" / "run")])
    assert done.exit_code == 1 and "Not a directory" in done.output
