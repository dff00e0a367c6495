"""The quantizer's stages, with a program in place of those that need torch."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from scripts.gpu_suite import quant_job
from scripts.gpu_suite.report import Report
from scripts.gpu_suite.stages import Options

PROGRAM = """#!{python}
import json, sys
from pathlib import Path
module, flags = sys.argv[2], sys.argv[3:]
if module == "scripts.gpu_suite.torch_side":
    sys.exit(0)
out = Path(flags[flags.index("--out") + 1])
out.mkdir(parents=True)
rows = json.loads({rows!r})
if module == "quant":
    (out / "quant_report.json").write_text(json.dumps(rows))
else:
    tools = [flag for flag in flags if flag in rows]
    (out / "new").write_text(json.dumps({{"rows": [{{"tool": tool}} | rows[tool] for tool in tools]}}))
    (out / "new").replace(out / "figures.json")
print("last words", file=sys.stderr)
sys.exit({exit_code})
"""
COSTS = {"quantize_s": 2.0, "wall_s": 20.0}


@pytest.fixture
def options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Options:
    monkeypatch.setattr(quant_job, "_LOOK_S", 0.01)
    monkeypatch.setattr("gateway.models.resolve", Path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return Options(tmp_path, model=str(tmp_path), torch_python=str(tmp_path / "python"), device="cpu",
                   peer_pythons={"gptqmodel": Path("/p"), "llmcompressor": Path("/p")})  # fmt: skip


def program(options: Options, rows: dict[str, Any], exit_code: int = 0) -> None:
    path = Path(options.torch_python)
    path.write_text(PROGRAM.format(python=sys.executable, rows=json.dumps(rows), exit_code=exit_code))
    path.chmod(0o755)


def test_a_whole_model_is_held_against_its_goal(options: Options, tmp_path: Path) -> None:
    linear = {"error": 0.01, "method": "rtn"}
    layers = [{"seconds": 1.5, "linears": [linear, linear | {"error": 0.02}]}]
    program(options, {"layers": layers, "elapsed_s": 2.0, "calibration_tokens": 128, "peak_device_bytes": 3e9,
                      "peak_host_bytes": 4e9, "versions": {}, "phases_s": {"load": 0.5}})  # fmt: skip
    report = Report("quant-8b-gptq")
    quant_job.whole("gptq", report, options, tmp_path)
    assert report.failures == []
    assert report.figures["device_gb"] == 3 and report.figures["host_gb"] == 4 and report.figures["layers"] == 1
    assert report.figures["worst_error"] == 0.02 and report.figures["fallbacks"] == 2
    assert not (tmp_path / "made").exists()
    program(options, {}, exit_code=3)
    report = Report("quant-8b-rtn")
    quant_job.whole("rtn", report, options, tmp_path)
    assert len(report.failures) == 2
    assert "exit status 3: last words" in report.failures[0]


def test_a_tool_that_failed_does_not_hide_the_others(options: Options, tmp_path: Path) -> None:
    rows: dict[str, Any] = dict.fromkeys(quant_job._SPEED, COSTS)
    rows |= {"ours-gptq": COSTS | {"quantize_s": 0.5}, "gptqmodel": {"failed": "it broke"}}
    program(options, rows)
    report = Report("quant-8b-peers")
    quant_job.peers(report, options, tmp_path)
    assert [failure.partition(":")[0] for failure in report.failures] == [
        "all tools ran", "ours-awq 3 times as fast as llmc-awq", "ours-awq 3 times as fast as gptqmodel-awq",
    ]  # fmt: skip
    assert "it broke" in report.failures[0]
    assert report.figures["ours-gptq times as fast as llmc-gptq"] == {"quantizing": 4.0, "the whole process": 1.0}


def test_perplexity_is_held_against_the_best_peer(options: Options, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    with pytest.raises(LookupError, match="--text names no file"):
        quant_job.quality(Report("quant-quality"), options, tmp_path)
    text.write_text("words")
    judged = {tool: COSTS | {"perplexity": 20.0} for tools in quant_job._QUALITY.values() for tool in tools}
    program(options, judged | {"gptqmodel-awq": COSTS | {"perplexity": 19.8}})
    report = Report("quant-quality")
    quant_job.quality(report, replace(options, text=text), tmp_path)
    assert [failure.partition(":")[0] for failure in report.failures] == ["ours-awq"]
    assert report.figures["ours-gptq beside its best peer"] == 1.0
    assert report.figures["ours-awq beside its best peer"] == 1.0101


def test_without_peers_ours_still_runs(options: Options, tmp_path: Path) -> None:
    program(options, dict.fromkeys(quant_job._SPEED, COSTS))
    report = Report("quant-8b-peers")
    quant_job.peers(report, replace(options, peer_pythons={}), tmp_path)
    assert [failure.partition(":")[0] for failure in report.failures] == ["gptqmodel is here", "llmcompressor is here"]
    assert [row["tool"] for row in report.figures["run"]["rows"]] == ["ours-rtn", "ours-awq", "ours-gptq"]


def test_peers_that_are_here_are_taken_as_they_are(options: Options, tmp_path: Path) -> None:
    assert quant_job._pythons(replace(options, peer_pythons={})) == {}
    home = tmp_path / "cache" / "tunegate-quant-peers"
    for name in ("gptqmodel", "llmcompressor"):
        (home / name).mkdir(parents=True)
        (home / name / "installed").touch()
    given = replace(options, peer_pythons={"gptqmodel": Path("/p"), "trl": Path("/t")})
    assert quant_job._pythons(given) == {"gptqmodel": Path("/p"), "llmcompressor": home / "llmcompressor/bin/python"}


def test_two_processes_are_held_against_one(options: Options, tmp_path: Path) -> None:
    program(options, {"gptq": {"same": True}, "awq": {"same": False}}, exit_code=1)
    report = Report("quant-nccl")
    quant_job.nccl(report, options, tmp_path)
    assert "exit status 1: last words" in report.failures[0]
    assert [row["same"] for row in report.figures["run"]["rows"]] == [True, False]
