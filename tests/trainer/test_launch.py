"""The launcher of several processes, with stand-ins for them that train nothing."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from pathlib import Path

import click
import pytest

from trainer import cli, launch
from trainer.errors import TOLD, ConfigError, DataError, ModelError

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


def test_the_first_is_handed_the_socket_where_they_meet(started: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It listens, so the port cannot be anybody else's; the others know only where it is."""
    code = f"""
handed = os.environ[{launch.MEETING!r}]
if rank == 0:
    import socket
    listening = socket.socket(fileno=int(handed))
    assert listening.getsockname() == (os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
    assert listening.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
else:
    assert handed == ""
"""
    stand_in(started, monkeypatch, code)
    assert launch.launch(2, ["sft"]) == 0


@pytest.mark.parametrize(
    ("rank", "error", "told"),
    [
        ("0", ConfigError("bad key"), "bad key"),
        ("1", ConfigError("bad key"), None),
        ("1", ModelError("no device"), "process 1: no device"),
        ("1", DataError("bad row"), None),
    ],
)
def test_what_all_processes_meet_the_first_alone_tells(
    rank: str, error: Exception, told: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", rank)
    if isinstance(error, DataError):
        error.add_note(TOLD)
    with pytest.raises((click.ClickException, SystemExit)) as raised, cli._shown_as_click_error():
        raise error
    assert (raised.value.message if isinstance(raised.value, click.ClickException) else None) == told


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
