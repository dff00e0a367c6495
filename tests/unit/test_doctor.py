"""The doctor's findings say what is there, and what to do where that is not enough."""

from __future__ import annotations

from pathlib import Path

import pytest

from backends import doctor, envs
from backends.doctor import Finding, Verdict
from backends.envs import EngineEnv


@pytest.fixture
def engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> EngineEnv:
    """One engine on offer, for the CPU, not installed."""
    monkeypatch.setenv("TUNEGATE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(envs, "LOCKS", tmp_path)
    env = EngineEnv("vllm", "9.9", "cpu", disk_bytes=10**18, check="import sys", note="a note")
    env.lock.write_text("vllm==9.9\n")
    monkeypatch.setattr(envs, "CATALOGUE", (env,))
    monkeypatch.setattr(envs, "default_device", lambda: "cpu")
    return env


def graphics_card(folder: Path, driver: str, monkeypatch: pytest.MonkeyPatch) -> None:
    script = folder / "nvidia-smi"
    script.write_text(f"#!/bin/sh\necho '{driver}, NVIDIA H100, 81559 MiB'\n")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=":")


def made(env: EngineEnv, python: str) -> None:
    """An environment whose Python is a script that ends as it is told."""
    env.python.parent.mkdir(parents=True)
    env.python.write_text(f"#!/bin/sh\n{python}\n")
    env.python.chmod(0o755)
    (env.path / envs.MARKER).write_text(f'{{"digest": "{env.digest()}"}}')


def of(subject: str) -> Finding:
    return {finding.subject: finding for finding in doctor.doctor()}[subject]


def test_every_problem_and_note_comes_with_advice(engine: EngineEnv) -> None:
    findings = doctor.doctor()
    assert [finding.subject for finding in findings] == [
        *("python", "processor", "cuda", "memory", "disk", "compiler", "tcmalloc"),
        "vllm 9.9 (cpu)",
    ]
    assert all(finding.advice for finding in findings if finding.verdict is not Verdict.OK)


def test_disk_too_small_for_what_is_not_installed_yet(engine: EngineEnv) -> None:
    assert of("disk").verdict is Verdict.PROBLEM
    assert "set TUNEGATE_HOME" in of("disk").advice
    made(engine, "exit 0")
    assert of("disk").verdict is Verdict.OK


def test_environment_absent_half_made_and_working(engine: EngineEnv) -> None:
    assert of(str(engine)).advice == "to have it: gateway engines install vllm==9.9 --device cpu"
    engine.path.mkdir(parents=True)
    assert (of(str(engine)).verdict, of(str(engine)).found) == (Verdict.PROBLEM, f"half installed at {engine.path}")
    engine.path.rmdir()
    made(engine, "exit 0")
    assert of(str(engine)) == Finding(str(engine), Verdict.OK, f"works, at {engine.path}; a note")


def test_environment_whose_import_fails(engine: EngineEnv) -> None:
    made(engine, "echo 'libGL.so.1: cannot open' >&2; exit 1")
    finding = of(str(engine))
    assert finding.verdict is Verdict.PROBLEM
    assert "libGL.so.1: cannot open" in finding.found
    assert f"remove {engine.path}" in finding.advice


@pytest.mark.parametrize(("driver", "verdict"), [("580.82.07", Verdict.OK), ("550.54", Verdict.PROBLEM)])
def test_driver_must_be_new_enough(
    engine: EngineEnv, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, driver: str, verdict: Verdict
) -> None:
    monkeypatch.setattr(envs, "default_device", lambda: "cuda")
    graphics_card(tmp_path, driver, monkeypatch)
    assert of("cuda").verdict is verdict
    assert of("cuda").found == f"driver {driver}; NVIDIA H100, 81559 MiB"


def test_compiler_and_allocator_are_only_notes(
    engine: EngineEnv, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(doctor, "find_library", lambda name: None)
    assert of("compiler").verdict is of("tcmalloc").verdict is Verdict.NOTE
