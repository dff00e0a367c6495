"""Two processes over gloo: the curve, the adapter and the files of one process; pause, death and resume."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs torch")

from hypothesis import given  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

from tests.trainer.models import chat_rows, labelled_rows, preference_rows, write_jsonl  # noqa: E402
from tests.trainer.test_numerics import CPU, gradients, make_learner, random_sequences  # noqa: E402
from tests.trainer.test_run import pause_at  # noqa: E402
from trainer import config, run  # noqa: E402
from trainer.errors import ConfigError, ModelError  # noqa: E402
from trainer.events import curve, read_events  # noqa: E402
from trainer.loop import Ending  # noqa: E402
from trainer.objectives import Dpo, Kto, Orpo, PerToken, Sft, Simpo  # noqa: E402
from trainer.pack import blank, own_rows, pack_sequences, plan, shares  # noqa: E402

pytestmark = pytest.mark.timeout(300)
LIMIT_S = 240  # for processes that import torch, on a machine with other work
REPOSITORY = Path(__file__).parents[2]
STEPS = 6
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data of which the last batch of an epoch has one example: a process without work must keep step."""
    folder = tmp_path_factory.mktemp("parallel")
    write_jsonl(folder / "chats.jsonl", chat_rows(13))
    write_jsonl(folder / "held.jsonl", chat_rows(5))
    write_jsonl(folder / "pairs.jsonl", preference_rows(13))
    write_jsonl(folder / "labels.jsonl", labelled_rows(13))
    return folder


def make(checkpoint: Path, place: Path, name: str, method: str = "sft", **changes: Any) -> config.TrainConfig:
    values = {
        "model": str(checkpoint),
        "device": "cpu",
        "dataset": [str(place / "chats.jsonl")],
        "output_dir": place / name,
        "batch_size": 6,
        "epochs": 2,
        "micro_batch_tokens": 64,
        "learning_rate": 2e-3,
        "lora_rank": 4,
        "save_every": 2,
        "golden_prompts": 1,
    }
    return config.load(method, None, values | changes)


EVALUATED = {"eval_every": 3}
FULL = {"tuning": "full", "learning_rate": 1e-3}
# Name, method, what differs from the defaults; each runs alone, by ddp, and by fsdp.
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "sft": ("sft", {}),
    "full": ("sft", FULL),
    "dpo": ("dpo", {"learning_rate": 1e-3, "gradient_checkpointing": True}),
    "kto": ("kto", {"learning_rate": 1e-3, "max_steps": 3}),
}
DATA = {"dpo": "pairs.jsonl", "kto": "labels.jsonl"}
CASES = [("sft", "ddp"), ("sft", "fsdp"), ("full", "ddp"), ("full", "fsdp"), ("dpo", "fsdp"), ("kto", "ddp")]


def of_kind(checkpoint: Path, place: Path, kind: str, parallel: str, **changes: Any) -> config.TrainConfig:
    method, settings = KINDS[kind]
    data: dict[str, Any] = {"dataset": [str(place / DATA.get(kind, "chats.jsonl"))]}
    if method == "sft":
        data |= {"eval_dataset": [str(place / "held.jsonl")]} | EVALUATED
    name = changes.pop("name", f"{kind}-{parallel}")
    return make(checkpoint, place, name, method, **data | settings | {"parallel": parallel} | changes)


def in_two_processes(jobs: list[dict[str, Any]], folder: Path) -> list[Any]:
    """Do the jobs in two processes that meet for each; how each ended."""
    lines = "".join(json.dumps(job) + "\n" for job in jobs)
    subprocess.run(
        [sys.executable, "-m", "tests.trainer.in_processes", "2", str(folder)],
        cwd=REPOSITORY,
        input=lines,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )
    said = [(folder / f"{rank}.log").read_text() for rank in range(2)]
    endings = [
        json.loads((folder / f"{rank}.json").read_text()) for rank in range(2) if (folder / f"{rank}.json").exists()
    ]
    assert len(endings) == 2, said
    assert endings[0] == endings[1]
    assert not said[1], "only the first process speaks"
    return list(endings[0])


def write_config(resolved: config.TrainConfig) -> str:
    file = resolved.output_dir.with_suffix(".yaml")
    file.write_text(config.dump(resolved))
    return str(file)


@pytest.fixture(scope="module")
def done(checkpoint: Path, place: Path) -> list[Any]:
    """All runs of two processes in one start of them: importing torch takes longer than any."""
    jobs: list[dict[str, Any]] = [
        {"config": write_config(of_kind(checkpoint, place, kind, parallel))} for kind, parallel in CASES
    ]
    for parallel in ("ddp", "fsdp"):
        paused = of_kind(checkpoint, place, "full", parallel, name=f"paused-{parallel}")
        jobs.append({"config": write_config(paused), "signal_at": 3})
        jobs.append({"resume": str(paused.output_dir)})
    noisy = of_kind(checkpoint, place, "sft", "ddp", name="noisy", lora_dropout=0.2)
    jobs += [{"config": write_config(noisy)}]
    noisy = noisy.model_copy(update={"output_dir": place / "noisy-paused"})
    jobs += [{"config": write_config(noisy), "signal_at": 4}, {"resume": str(noisy.output_dir)}]
    sharded = of_kind(checkpoint, place, "sft", "fsdp", name="weighed")
    jobs.append({"config": write_config(sharded), "weigh": True})
    full = of_kind(checkpoint, place, "full", "fsdp", name="full-disk")
    jobs.append({"config": write_config(full), "full_disk": True, "stray": True})
    poisoned = of_kind(checkpoint, place, "full", "fsdp", name="poisoned", epochs=20)
    jobs.append({"config": write_config(poisoned), "poison": True})
    begun_alone = of_kind(checkpoint, place, "full", "fsdp", name="begun-alone")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WORLD_SIZE", "1")  # as torchrun says to a single process
        pause_at(patch, begun_alone.output_dir, 3)
        assert run.start(begun_alone) is Ending.PAUSED
    jobs.insert(0, {"resume": str(begun_alone.output_dir)})
    return in_two_processes(jobs, place)


def weights_of(directory: Path) -> dict[str, torch.Tensor]:
    file = directory / "adapter" / "adapter_model.safetensors"
    return load_file(file if file.exists() else directory / "model" / "model.safetensors")


def assert_close(one: Path, other: Path, tolerance: float = TOLERANCE) -> None:
    """Curves, evaluations and weights of two runs."""
    for kind in ("step", "eval"):
        curves = [curve(directory / "events.jsonl", kind) for directory in (one, other)]
        assert curves[0] == pytest.approx(curves[1], rel=tolerance, abs=tolerance)
    saved = [weights_of(directory) for directory in (one, other)]
    assert saved[0].keys() == saved[1].keys()
    for name, tensor in saved[0].items():
        torch.testing.assert_close(tensor, saved[1][name], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("kind", "parallel"), CASES)
def test_two_processes_give_what_one_gives(
    done: list[Any], checkpoint: Path, place: Path, kind: str, parallel: str
) -> None:
    alone = place / f"{kind}-none"
    if not alone.exists():
        run.start(of_kind(checkpoint, place, kind, "none"))
    both = place / f"{kind}-{parallel}"
    assert_close(alone, both)
    one, two = (
        [event for event in read_events(directory / "events.jsonl") if event["type"] == "step"]
        for directory in (alone, both)
    )
    for key in ("tokens", "trained_tokens", "learning_rate"):
        assert [event[key] for event in one] == [event[key] for event in two]
    assert json.loads((both / "run.json").read_text())["processes"] == 2
    manifests = [json.loads(next(directory.glob("*/manifest.json")).read_text()) for directory in (alone, both)]
    assert manifests[0]["golden"][0]["token_ids"] == manifests[1]["golden"][0]["token_ids"]
    assert manifests[0]["base"] == manifests[1]["base"]


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_a_pause_that_one_process_is_asked_for_pauses_all_and_resumes_exactly(
    done: list[Any], place: Path, parallel: str
) -> None:
    events = read_events(place / f"paused-{parallel}" / "events.jsonl")
    assert [(event["step"], event["reason"]) for event in events if event["type"] == "paused"] == [(3, "SIGUSR1")]
    assert_close(place / f"full-{parallel}", place / f"paused-{parallel}", tolerance=0)


def test_a_run_that_one_process_began_is_finished_by_two(done: list[Any], place: Path) -> None:
    assert done[0] == "finished"
    assert_close(place / "full-fsdp", place / "begun-alone")


def test_with_dropout_each_process_has_its_own_random_numbers_and_a_resumed_run_the_same(
    done: list[Any], place: Path
) -> None:
    assert done[-6:-3] == ["finished", "paused", "finished"]
    assert_close(place / "noisy", place / "noisy-paused", tolerance=0)
    assert curve(place / "noisy" / "events.jsonl") != curve(place / "sft-ddp" / "events.jsonl")


def test_a_process_holds_its_part_of_the_layers(done: list[Any], checkpoint: Path) -> None:
    weights = load_file(checkpoint / "model.safetensors")
    layers = sum(tensor.numel() for name, tensor in weights.items() if ".layers." in name)
    assert done[-3] == sum(tensor.numel() for tensor in weights.values()) - layers // 2


def test_what_one_process_meets_is_decided_alike_in_all(done: list[Any], place: Path) -> None:
    assert done[-2] == "finished" and "10 steps in a row up to 10 had non-finite gradients" in done[-1]
    warnings = [event for event in read_events(place / "full-disk" / "events.jsonl") if event["type"] == "warning"]
    assert [event["step"] for event in warnings] == [2] and "No space left on device" in warnings[0]["message"]
    assert_close(place / "full-fsdp", place / "full-disk", tolerance=0)


def test_a_process_that_is_killed_ends_the_run_which_one_process_takes_up(
    checkpoint: Path, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed = of_kind(checkpoint, place, "full", "fsdp", name="killed")
    script = tmp_path / "victim.py"
    script.write_text(
        "import os\n"
        "from trainer import cli\n"
        "from trainer.learner import Learner\n"
        "original, steps = Learner.optim_step, 0\n"
        "def optim_step(self, *args):\n"
        "    global steps\n"
        "    steps += 1\n"
        f"    if steps == 4 and os.environ['RANK'] == '1':\n        os.kill(os.getpid(), {int(signal.SIGKILL)})\n"
        "    return original(self, *args)\n"
        "Learner.optim_step = optim_step\n"
        "cli.train()\n"
    )
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    ended = subprocess.run(
        [*torchrun, str(script), "sft", "--config", write_config(killed)],
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )
    events = killed.output_dir / "events.jsonl"
    assert ended.returncode == 1 and events.exists(), ended.stderr
    assert max(curve(events)) == 3 and not (killed.output_dir / "model").exists()
    assert read_events(events)[-1]["type"] == "failed", ended.stderr
    monkeypatch.setenv("WORLD_SIZE", "1")  # as torchrun says to a single process
    assert run.resume(killed.output_dir) is Ending.FINISHED
    alone = place / "full-none"
    if not alone.exists():
        run.start(of_kind(checkpoint, place, "full", "none"))
    assert_close(alone, killed.output_dir)


def test_what_does_not_fit_is_refused_by_name(
    checkpoint: Path, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(
        ConfigError, match="add --processes N, or start them by `torchrun --nproc-per-node N -m trainer"
    ):
        run.start(make(checkpoint, place, "refused", parallel="ddp"))
    monkeypatch.setenv("WORLD_SIZE", "8")
    with pytest.raises(ConfigError, match=r"8 processes were started .* give --parallel ddp or fsdp"):
        run.start(make(checkpoint, place, "refused"))
    with pytest.raises(ConfigError, match=r"`batch_size` \(6\) must be at least the number of processes, 8"):
        run.start(make(checkpoint, place, "refused", parallel="ddp"))
    with pytest.raises(ConfigError, match="RANK expected, but not set; add --processes N"):
        run.start(make(checkpoint, place, "refused", parallel="ddp", batch_size=8))
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ModelError, match="process 3 of this machine has no device: torch sees 2"):
        run.start(make(checkpoint, place, "refused", parallel="ddp", batch_size=8, device="cuda"))
    assert not (place / "refused").exists()
    for key in ("compile", "oom_backoff"):
        with pytest.raises(ConfigError, match="`parallel: fsdp` works without"):
            make(checkpoint, place, "refused", parallel="fsdp", **{key: True})
    with pytest.raises(ConfigError, match="`parallel`: Input should be 'none'"):
        make(checkpoint, place, "refused", "grpo", reward=["format"], parallel="ddp")


@given(st.lists(st.integers(1, 60), min_size=1, max_size=40), st.integers(10, 60), st.integers(1, 5))
def test_processes_share_out_every_example_once_in_as_many_rows_each(
    lengths: list[int], budget: int, count: int
) -> None:
    rows = [own_rows(lengths, budget, rank=rank, count=count) for rank in range(count)]
    assert len({len(own) for own in rows}) == 1
    assert sorted(item for own in rows for items in own for item in items) == list(range(len(lengths)))
    loads = [sum(lengths[i] for i in share) for share in shares(lengths, count)]
    assert max(loads) - min(loads) <= max(lengths)
    assert own_rows(lengths, budget) == plan(lengths, budget)


@pytest.mark.parametrize("objective", [Sft(), Dpo(0.1, 0.1), Orpo(0.1), Simpo(2.0, 0.5), Kto(0.1, 1, 1)])
def test_a_blank_row_teaches_nothing(checkpoint: Path, objective: Sft | PerToken) -> None:
    learner = make_learner(checkpoint)
    if isinstance(objective, Kto):
        objective.kl = torch.zeros(())
    row = pack_sequences(random_sequences((9, 7)), CPU)
    row.columns["desirable_S"] = torch.tensor([True, False])
    metrics = learner.forward_backward(blank(row), objective, 3.0)
    assert all(float(value) == 0 for value in metrics.values())
    assert all(not gradient.any() for gradient in gradients(learner).values())
    assert all(float(value) == 0 for value in learner.evaluate(blank(row), objective).values())
    assert np.prod(row.token_ids_1T.shape) == 14
