"""The operator's score command: what it may print, and what becomes of one that misbehaves."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from gateway.control.score import ScoreCommand, ScoreFailed
from tests.unit.control.conftest import until


def command(code: str, limit_s: float = 10.0) -> ScoreCommand:
    return ScoreCommand((sys.executable, "-c", code), "http://gateway", limit_s)


@pytest.mark.parametrize(
    ("code", "score"),
    [
        ("print(0.25)", 0.25),
        ("print(-3)", -3.0),
        ('print(\'{"score": 1, "wins": [4, 2]}\')', 1.0),
        ("import sys; print(len(sys.argv[1]))", 5.0),
    ],
)
async def test_scores(code: str, score: float) -> None:
    assert (await command(code).run("a@v1x", "a@v2"))[0] == score


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("", "must print a number"),
        ("print('good')", "'good'"),
        ("print('{}')", "must print a number"),
        ("print('null')", "must print a number"),
        ("print('NaN')", "the score is nan"),
        ("raise SystemExit('no data')", "ended with status 1: 'no data'"),
    ],
)
async def test_no_scores(code: str, words: str) -> None:
    with pytest.raises(ScoreFailed, match=words):
        await command(code).run("a@v1", "a@v2")


async def test_a_command_that_is_not_there() -> None:
    with pytest.raises(ScoreFailed, match="cannot be started: No such file"):
        await ScoreCommand(("/nowhere/score",), "http://gateway", 1.0).run("a@v1", "a@v2")


async def test_a_command_that_hangs_is_ended_with_all_it_started(tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    code = f"""
import os, subprocess, time
child = subprocess.Popen(["sleep", "600"])
with open({str(pids)!r}, "w") as file:
    file.write(f"{{os.getpid()}} {{child.pid}}")
time.sleep(600)
"""
    with pytest.raises(ScoreFailed, match="did not answer within 3 s"):
        await command(code, limit_s=3.0).run("a@v1", "a@v2")
    parent, child = map(int, pids.read_text().split())
    await until(lambda: not alive(parent) and not alive(child))


async def test_a_command_ends_with_control(tmp_path: Path) -> None:
    """However that ends."""
    mark = tmp_path / "pid"
    score = f"import os, time; open({str(mark)!r}, 'w').write(str(os.getpid())); time.sleep(600)"
    code = (
        "import asyncio, sys; from gateway.control.score import ScoreCommand; "
        f"asyncio.run(ScoreCommand((sys.executable, '-c', {score!r}), 'http://gateway', 600.0).run('a', 'b'))"
    )
    control = subprocess.Popen([sys.executable, "-c", code])
    try:
        pid = int(await until(lambda: mark.exists() and mark.read_text()))
    finally:
        control.kill()
        control.wait()
    try:
        await until(lambda: not alive(pid))
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def alive(pid: int) -> bool:
    """Whether the process runs; one that only waits to be reaped does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
