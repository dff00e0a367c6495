"""The command line: defaults, refusals in one line, exit statuses, and a real process killed in the middle."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from quant.cli import quantize


def call(*args: object) -> Result:
    return CliRunner().invoke(quantize, [str(arg) for arg in args], catch_exceptions=False)


def test_usage_errors_need_no_torch(tmp_path: Path) -> None:
    assert "--model and --out are required" in call("--method", "rtn").output
    assert "'--tokens': 1 is not in the range x>=2" in call("verify", tmp_path, "--tokens", "1").output
    assert call("verify", tmp_path).exit_code == 1


def test_options_that_no_format_holds(model_of: Callable[[str], Path], tmp_path: Path) -> None:
    model = model_of("llama")
    eight = call("--model", model, "--out", tmp_path / "o", "--bits", "8")
    assert "the awq format holds 4 bits, not 8" in eight.output
    asymmetric = call("--model", model, "--out", tmp_path / "o", "--method", "gptq", "--asymmetric")
    assert "written symmetric" in asymmetric.output
    uncalibrated = call("--model", model, "--out", tmp_path / "o", "--method", "awq", "--calib-samples", "0")
    assert "awq needs calibration" in uncalibrated.output
    assert {eight.exit_code, asymmetric.exit_code, uncalibrated.exit_code} == {2}


def test_quantize_verify_convert(model_of: Callable[[str], Path], tmp_path: Path) -> None:
    model, out, text = model_of("llama"), tmp_path / "out", tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 20)
    few = ("--calib-samples", 4, "--calib-tokens", 32, "--group-size", 64, "--device", "cpu")
    made = call("--model", model, "--out", out, "--method", "gptq", *few)
    assert made.exit_code == 0, made.output
    assert f"wrote {out}" in made.output
    assert json.loads((out / "quant_report.json").read_text())["options"]["method"] == "gptq"
    assert "layer 1, self_attn.q_proj" in (out / "quant_report.html").read_text()
    manifest = json.loads((out / "manifest.json").read_text())
    assert {"config.json", "quant_report.html", "model-00001.safetensors", "tokenizer.json"} <= manifest["files"].keys()

    verified = call("verify", out, "--json", "--original", model, "--text", text, "--samples", 4, "--tokens", 64)
    assert verified.exit_code == 0
    found = json.loads(verified.output)
    assert found["format"] == "gptq"
    assert found["round_trip_linears"] == 14
    assert found["quality"]["kl_nats"] < 0.3

    refused = call("verify", out, "--engine", "lmdeploy", "--static", "--json")
    assert refused.exit_code == 1
    assert "groups of 128 only" in refused.output
    assert call("verify", out, "--engine", "vllm", "--device", "cpu", "--static").exit_code == 0

    converted = call("convert", out, "--format", "compressed-tensors", "--out", tmp_path / "ct")
    assert converted.exit_code == 0, converted.output
    assert call("verify", tmp_path / "ct").exit_code == 0


def test_failures_are_one_line(model_of: Callable[[str], Path], tmp_path: Path) -> None:
    plain = call("verify", model_of("llama"))
    assert plain.exit_code == 1
    assert plain.output.startswith("Error: ")
    assert "is not quantized" in plain.output
    existing = call("--model", model_of("llama"), "--out", tmp_path)
    assert "exists already" in existing.output


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--device", "gpu"), "'gpu' is no device"),
        (("--device", "cuda:99"), "there is no cuda:99"),
        (("--skip", "["), "'[' is no regular expression"),
        (("--model", "/no/where"), "/no/where is no directory"),
        (("--model", "/nowhere"), "/nowhere is no directory"),
    ],
)
def test_flags_that_cannot_be_meant(
    flags: tuple[str, str], said: str, model_of: Callable[[str], Path], tmp_path: Path
) -> None:
    refused = call("--model", model_of("llama"), "--out", tmp_path / "out", *flags)
    assert refused.exit_code in (1, 2)
    assert f"Error: {said}" in refused.output or f"Error: skip: {said}" in refused.output


def test_processes_that_were_not_started_together(
    model_of: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    refused = call("--model", model_of("llama"), "--out", tmp_path / "out", "--device", "cpu")
    assert refused.exit_code == 1
    assert "WORLD_SIZE says 2 processes, but RANK, MASTER_ADDR, MASTER_PORT is not set" in refused.output


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"WORLD_SIZE": "x"}, "WORLD_SIZE is 'x', expected a number"),
        ({"WORLD_SIZE": ""}, "WORLD_SIZE is '', expected a number"),
        ({"WORLD_SIZE": "2", "RANK": "-1"}, "RANK is '-1', expected a number"),
        ({"WORLD_SIZE": "2", "RANK": "2"}, "RANK is 2, but WORLD_SIZE says 2 processes"),
        ({"WORLD_SIZE": "2", "RANK": "0", "MASTER_PORT": "any"}, "MASTER_PORT is 'any', expected a number"),
    ],
)
def test_an_environment_that_torchrun_would_not_make(
    variables: dict[str, str],
    said: str,
    model_of: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in ({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"} | variables).items():
        monkeypatch.setenv(name, value)
    refused = call("--model", model_of("llama"), "--out", tmp_path / "out", "--device", "cpu")
    assert refused.exit_code == 1
    assert refused.output.startswith(f"Error: {said}")


def test_kill_9_in_the_middle_then_the_same_command_again(model_of: Callable[[str], Path], tmp_path: Path) -> None:
    out, partial = tmp_path / "out", tmp_path / "out.partial"
    argv = [sys.executable, "-m", "quant", "--model", str(model_of("llama")), "--out", str(out), "--method", "awq"]
    argv += ["--group-size", "64", "--calib-samples", "8", "--calib-tokens", "64", "--device", "cpu"]
    environment = dict(os.environ, OMP_NUM_THREADS="1")
    with subprocess.Popen(argv, stderr=subprocess.DEVNULL, env=environment) as process:
        deadline = time.monotonic() + 90
        while not (partial / "model-00001.safetensors").exists():
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
    assert not out.exists()
    again = subprocess.run(argv, capture_output=True, text=True, env=environment, timeout=90, check=True)
    assert again.stdout == f"wrote {out}\n"
    assert call("verify", out, "--static").exit_code == 0
