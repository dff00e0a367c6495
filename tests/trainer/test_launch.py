"""The launcher of several processes, with stand-ins for them that train nothing."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

from trainer import launch

STAND_IN = """#!{python} -IS
import os, signal, sys, time
rank, folder = int(os.environ["RANK"]), {folder!r}
signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
said = " ".join([*sys.argv[1:], os.environ["WORLD_SIZE"], str(os.getpid())])
open(os.path.join(folder, str(rank) + ".partial"), "w").write(said)
os.rename(os.path.join(folder, str(rank) + ".partial"), os.path.join(folder, str(rank)))
{code}
"""
WAIT = "while True: time.sleep(0.05)"


@pytest.fixture
def started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where stand-ins leave a file each; `stand_in` says what they do."""
    monkeypatch.setattr(launch, "_GRACE_S", 0.3)
    (tmp_path / "started").mkdir()
    return tmp_path / "started"


def stand_in(started: Path, monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    file = started.parent / "stand-in"
    file.write_text(STAND_IN.format(python=sys.executable, folder=str(started), code=code))
    file.chmod(0o700)
    monkeypatch.setattr(launch.sys, "executable", str(file))


def test_each_gets_the_command_and_its_number_and_the_run_ends_well(
    started: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in(started, monkeypatch, "")
    assert launch.launch(3, ["sft", "--config", "a b"]) == 0
    said = [(started / str(rank)).read_text() for rank in range(3)]
    assert all(line.startswith("-m trainer sft --config a b 3 ") for line in said)


def test_a_signal_pauses_all(started: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(started, monkeypatch, WAIT)
    before = signal.getsignal(signal.SIGTERM)

    def ask() -> None:
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline and not all((started / rank).exists() for rank in "01"):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    asking = threading.Thread(target=ask)
    asking.start()
    assert launch.launch(2, ["sft"]) == launch.EXIT_PAUSED
    asking.join()
    assert signal.getsignal(signal.SIGTERM) == before


def test_one_that_dies_ends_the_others(started: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Only once the other runs: it gets no more than the time of grace.
    waiting = "while rank and not os.path.exists(os.path.join(folder, '0')): time.sleep(0.01)"
    stand_in(started, monkeypatch, f"{waiting}\nif rank: os.kill(os.getpid(), signal.SIGKILL)\n{WAIT}")
    assert launch.launch(2, ["sft"]) == 1
    with pytest.raises(ProcessLookupError):
        os.kill(int((started / "0").read_text().split()[-1]), 0)
