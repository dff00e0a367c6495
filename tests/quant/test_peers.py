"""What `python -m tests.proofs.quant_peers` does with a tool, on ours and a model of two layers."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from safetensors.torch import load_file, save_file  # noqa: E402

from quant.checkpoint import Checkpoint  # noqa: E402
from quant.errors import BadCheckpoint  # noqa: E402
from quant.evaluate import evaluate  # noqa: E402
from tests.proofs.cost import run  # noqa: E402
from tests.proofs.quant_peers.__main__ import arguments, cut_model, table  # noqa: E402


def test_a_run_counts_what_its_children_use(tmp_path: Path) -> None:
    child = "import time; b = bytearray(60_000_000); t = time.process_time()\nwhile time.process_time() < t + 0.2: pass"
    program = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}]); print('done'); sys.exit(3)"
    cost = run([sys.executable, "-c", program], tmp_path / "log", {"PATH": os.environ["PATH"]})
    assert cost.exit_code == 3
    assert (tmp_path / "log").read_text() == "done\n"
    assert 0.2 <= cost.cpu_s <= 2 * cost.wall_s + 1
    assert 60_000_000 < cost.peak_bytes < 150_000_000  # of the child, not of this process, which holds torch
    with pytest.raises(OSError, match="cannot be started"):
        run(["/nowhere/tool"], tmp_path / "log", {})


def test_a_cut_model_keeps_its_first_layers(model_of: Callable[[str], Path], tmp_path: Path) -> None:
    whole = Checkpoint(model_of("llama"))
    cut = Checkpoint(cut_model(model_of("llama"), 1, tmp_path / "cut"))
    assert set(whole.entries) - set(cut.entries) == {name for name in whole.entries if ".layers.1." in name}
    assert set(cut.entries) < set(whole.entries)
    assert cut.config["num_hidden_layers"] == 1
    with pytest.raises(BadCheckpoint, match=r"cut \(1 layers, .* was not made from .* \(2 layers"):
        evaluate(whole.directory, cut.directory, torch.zeros(1, 4, dtype=torch.int64), torch.device("cpu"))


def test_a_checkpoint_that_computes_nan_is_named(model_of: Callable[[str], Path], tmp_path: Path) -> None:
    broken = Path(shutil.copytree(model_of("llama"), tmp_path / "broken"))
    tensors = load_file(broken / "model.safetensors")
    tensors["model.layers.0.input_layernorm.weight"][3] = float("nan")
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BadCheckpoint, match=r"what .*broken computes on this text is not finite"):
        evaluate(model_of("llama"), broken, torch.zeros(1, 4, dtype=torch.int64), torch.device("cpu"))


def test_what_failed_is_told_in_the_table() -> None:
    row = {"title": "rtn", "grid": "zero points", "wall_s": 9.0, "quantize_cpu_s": 5.0, "cpu_s": 12.0, "peak_gb": 1.25}
    judged = {"perplexity": 23.5, "kl": 0.1651, "top1": 0.785}
    on_gpu = row | {"device": "cuda", "quantize_s": 2.0, "device_gb": 3.0}
    failed = {"title": "other", "grid": "symmetric", "failed": "exit status 1: no"}
    lines = table([row | judged | {"device": "cpu"}, on_gpu, on_gpu | {"not_judged": "broken"}, failed]).splitlines()
    assert lines[2] == "| rtn | zero points | 9 | 12 | 5.0 | 1.2 | - | 23.500 | 0.1651 | 78.5% |"
    assert lines[3] == "| rtn | zero points | 9 | 12 | 2.0 | 1.2 | 3.0 | - | - | - |"
    assert lines[4] == "| rtn | zero points | 9 | 12 | 2.0 | 1.2 | 3.0 | broken | - | - |"
    assert lines[5] == "| other | symmetric | exit status 1: no ||||||||"
    assert all(line.count("|") == lines[0].count("|") for line in lines)


def test_a_tool_that_hangs_is_ended(tmp_path: Path) -> None:
    program = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(99)'])"
    with pytest.raises(TimeoutError, match="not through after 1 s"):
        run([sys.executable, "-c", program], tmp_path / "log", {}, limit_s=1)


def test_paths_that_are_wrong_are_told_before_any_work(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--out", str(tmp_path / "out"), "--model", str(tmp_path)]
    for flags, said in (
        (["--text", "/nowhere.txt"], "--text: there is no /nowhere.txt"),
        (["--peer-python", "gptqmodel=/nowhere"], "expected NAME=PATH of a peer's Python"),
        (["nothing"], "unknown: nothing"),
    ):
        with pytest.raises(SystemExit):
            arguments([*given, *flags])
        assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
