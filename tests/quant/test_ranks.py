"""Several processes on one job: shares add up to the whole, what each process solves is not solved twice."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
import warnings
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from torch.distributed import TCPStore  # noqa: E402

from quant.checkpoint import Checkpoint, take_packed  # noqa: E402
from quant.cli import quantize  # noqa: E402
from quant.config import Grid, QuantOptions  # noqa: E402
from quant.errors import BadCalibration, RankLost  # noqa: E402
from quant.ranks import ALONE, Ranks, joined  # noqa: E402
from quant.verify import round_trip  # noqa: E402
from quant.walk import Progress, quantize_checkpoint  # noqa: E402

LOST = 3  # exit status of a process that heard nothing of the other


def test_sequences_and_linears_are_dealt_once() -> None:
    team = [Ranks(rank, 3) for rank in range(3)]
    tokens_BT = torch.arange(28).view(7, 4)
    shares = [ranks.share(tokens_BT) for ranks in team]
    assert sorted(map(tuple, torch.cat(shares).tolist())) == [tuple(row) for row in tokens_BT.tolist()]
    costs = {"qkv": 4.0, "o": 3.0, "gate_up": 7.0, "down": 8.0}
    assert [sorted(ranks.dealt(costs)) for ranks in team] == [["down"], ["gate_up"], ["o", "qkv"]]
    assert ALONE.dealt(costs) == costs.keys()
    with pytest.raises(BadCalibration, match="2 calibration sequences are too few for 3 processes"):
        team[0].share(tokens_BT[:2])


@pytest.mark.parametrize(("family", "method"), [("qwen3_moe", "awq"), ("llama", "gptq")])
def test_two_processes_make_what_one_makes(
    family: str, method: Any, model_of: Callable[[str], Path], tmp_path: Path
) -> None:
    """Of a mixture of experts too: shared scales, and experts that the tokens of only one process reach."""
    options, together, alone = options_for(model_of(family), method), tmp_path / "together", tmp_path / "alone"
    report = quantize_checkpoint(options, alone, lambda step: None)  # first: what this imports is imported in the forks
    flags = ["--model", options.model, "--out", together, "--method", method, "--format", "awq", "--group-size", 32]
    flags += ["--calib-samples", options.calib_samples, "--calib-tokens", options.calib_tokens, "--device", "cpu"]
    assert in_two_processes(command, [str(flag) for flag in flags], tmp_path) == [0, 0]
    said = [(tmp_path / f"said-{rank}.txt").read_text() for rank in range(2)]
    assert "layer 2 of 2" in said[0] and f"wrote {together}\n" in said[0]
    assert said[1] == ""
    joint = json.loads((together / "quant_report.json").read_text())
    assert [named(layer) for layer in joint["layers"]] == [named(layer) for layer in report["layers"]]
    assert joint["calibration_tokens"] == report["calibration_tokens"] == 64
    assert round_trip(together) == sum(len(layer["linears"]) for layer in report["layers"])
    # The same sums in another order: float32 rounding moves a weight to the next level now and then.
    assert share_of_same_integers(alone, together) > 0.995


def test_when_one_is_killed_the_other_ends_and_one_alone_goes_on(
    model_of: Callable[[str], Path], tmp_path: Path
) -> None:
    options, out = options_for(model_of("llama"), "gptq"), tmp_path / "out"
    assert in_two_processes(victim, options, out) == [LOST, -signal.SIGKILL]
    assert not out.exists()
    steps: list[Progress] = []
    quantize_checkpoint(options, out, steps.append)
    assert [step.resumed for step in steps] == [True, False]
    assert round_trip(out) == 14


def options_for(model: Path, method: Any) -> QuantOptions:
    grid = Grid(group_size=32)
    return QuantOptions(model=model, method=method, format="awq", grid=grid, calib_samples=4, calib_tokens=16)


def in_two_processes(do: Callable[..., None], *arguments: object) -> list[int | None]:
    """Exit statuses. The processes are forks: their imports would take longer than all they do."""
    # Held here, as torchrun holds it: a port that is free now may be taken when a process would listen there.
    meeting = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_as_rank, args=(rank, meeting.port, do, *arguments)) for rank in range(2)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forks beside threads: torch has one here
        for process in processes:
            process.start()
    for process in processes:
        process.join(100)
        process.kill()
        process.join()
    return [process.exitcode for process in processes]


def _as_rank(rank: int, port: int, do: Callable[..., None], *arguments: object) -> None:
    """As torchrun would start it."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}
    do(rank, *arguments)


def command(rank: int, flags: list[str], directory: Path) -> None:
    """`gateway quantize`; what it says is kept."""
    with (directory / f"said-{rank}.txt").open("w") as said, redirect_stdout(said), redirect_stderr(said):
        quantize.main(flags, standalone_mode=False)


def victim(rank: int, options: QuantOptions, out: Path) -> None:
    """The second process is killed after the first layer."""

    def kill(step: Progress) -> None:
        if rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)

    try:
        with joined(torch.device("cpu")) as ranks:
            quantize_checkpoint(options, out, kill, ranks)
    except RankLost:
        sys.exit(LOST)


def named(layer: dict[str, list[dict[str, object]]]) -> list[tuple[object, ...]]:
    return [(linear["name"], linear["method"], linear["tokens"], linear["note"]) for linear in layer["linears"]]


def share_of_same_integers(one: Path, other: Path) -> float:
    same = count = 0
    sides = [Checkpoint(one), Checkpoint(other)]
    for module in sides[0].quantized_modules:
        q_NK, other_NK = (
            take_packed(side.tensors(side.packed_names(module)), side.scheme)[module].q_NK for side in sides
        )
        same, count = same + int((q_NK == other_NK).sum()), count + q_NK.numel()
    return same / count
