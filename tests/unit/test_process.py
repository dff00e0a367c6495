"""The guard and its handle, with small scripts as engines: nothing of a tree may outlive its gateway."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from backends import process, proctree
from backends.base import Endpoint, Launch
from tests.support.wait import eventually

ENDPOINT = Endpoint("127.0.0.1", 12345, "secret-of-the-engine")

# An engine as awkward as they come: a child without an environment (as vLLM's, which overwrite theirs); a worker in a
# session of its own that ignores SIGTERM and writes elsewhere; and an orphan. Each writes its pid to a file.
STUBBORN = """
import os, pathlib, signal, sys, time
here = pathlib.Path(sys.argv[1])
def sleeper(name):
    (here / name).write_text(str(os.getpid()))
    time.sleep(600)
if os.fork() == 0:
    source = f"import os, pathlib, time; pathlib.Path({str(here)!r}, 'bare').write_text(str(os.getpid()))"
    os.execve(sys.executable, [sys.executable, "-c", source + "; time.sleep(600)"], {})
if os.fork() == 0:
    os.setsid()
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if os.fork() == 0:
        if os.fork() == 0:
            sleeper("orphan")
        os._exit(0)
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 1)
    os.dup2(null, 2)
    sleeper("worker")
print("engine up", flush=True)
sleeper("engine")
"""
TREE = ("engine", "worker", "bare", "orphan")


@pytest.fixture
def run_dir(tmp_path: Path) -> Iterator[Path]:
    """A run directory; whatever a failed test left under it is ended."""
    directory = tmp_path / "run"
    directory.mkdir()
    yield directory
    for path in directory.glob("replica-*.json"):
        state = json.loads(path.read_text())
        if proctree.start_ticks(state["guard_pid"]) == state["guard_start_ticks"]:
            os.kill(state["guard_pid"], signal.SIGKILL)
        proctree.end_leftovers(path)


def script(source: str, *arguments: str) -> Launch:
    return Launch((sys.executable, "-c", source, *arguments))


def start(run_dir: Path, launch: Launch, main_pid: int | None = None, **options: Any) -> process.EngineProcess:
    return process.start(
        "r0", run_dir, run_dir / "logs" / "r0.log", launch, ENDPOINT, main_pid or os.getpid(), **options
    )


def tree(directory: Path) -> list[int]:
    """The pids of STUBBORN, once all are there."""
    eventually(lambda: all((directory / name).exists() and (directory / name).read_text() for name in TREE))
    return [int((directory / name).read_text()) for name in TREE]


def living(pids: list[int]) -> list[int]:
    return [pid for pid in pids if proctree.start_ticks(pid) is not None]


def sleeping_process() -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])


def test_killing_the_main_process_ends_the_whole_tree(run_dir: Path, tmp_path: Path) -> None:
    main = sleeping_process()
    engine = start(run_dir, script(STUBBORN, str(tmp_path)), main.pid, grace_s=0.3)
    pids = tree(tmp_path)
    assert living(pids) == pids

    main.kill()
    main.wait()

    eventually(lambda: not living(pids))
    eventually(lambda: not engine.alive())
    assert engine.exit_status() == -signal.SIGTERM
    assert "the gateway" in engine.log_tail()


def test_the_end_of_an_engine_is_known_before_its_workers_have_ended(run_dir: Path, tmp_path: Path) -> None:
    engine = start(run_dir, script(STUBBORN, str(tmp_path)))
    pids = tree(tmp_path)
    assert engine.exit_status() is None

    os.kill(engine.engine_pid, signal.SIGKILL)

    eventually(lambda: engine.exit_status() == -signal.SIGKILL)
    assert engine.alive()
    assert living(pids)
    engine.stop(0)
    assert not living(pids)


def test_stop_ends_the_whole_tree(run_dir: Path, tmp_path: Path) -> None:
    engine = start(run_dir, script(STUBBORN, str(tmp_path)))
    pids = tree(tmp_path)

    engine.stop(0.3)

    assert living(pids) == []
    assert not engine.alive()


def test_an_engine_gets_its_grace(run_dir: Path, tmp_path: Path) -> None:
    source = """
import pathlib, signal, sys, time
def leave(*_):
    time.sleep(0.3)
    print("saved everything", flush=True)
    sys.exit(7)
signal.signal(signal.SIGTERM, leave)
pathlib.Path(sys.argv[1]).touch()
time.sleep(600)
"""
    engine = start(run_dir, script(source, str(tmp_path / "up")))
    eventually((tmp_path / "up").exists)

    engine.stop(10)

    assert engine.exit_status() == 7
    assert "saved everything" in engine.log_tail()


def test_an_engine_that_ignores_sigterm_is_killed_after_the_grace(run_dir: Path, tmp_path: Path) -> None:
    source = """
import pathlib, signal, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
pathlib.Path(sys.argv[1]).touch()
time.sleep(600)
"""
    engine = start(run_dir, script(source, str(tmp_path / "up")))
    eventually((tmp_path / "up").exists)

    engine.stop(0.2)

    assert engine.exit_status() == -signal.SIGKILL


def test_threads_that_outlive_the_first_one_are_still_the_engine(run_dir: Path, tmp_path: Path) -> None:
    source = """
import ctypes, pathlib, platform, signal, sys, threading, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
threading.Thread(target=time.sleep, args=(600,)).start()
pathlib.Path(sys.argv[1]).touch()
ctypes.CDLL(None).syscall({"x86_64": 60, "aarch64": 93}[platform.machine()], 0)  # exit, of this thread alone
"""
    engine = start(run_dir, script(source, str(tmp_path / "up")))
    eventually((tmp_path / "up").exists)
    eventually(lambda: proctree.start_ticks(engine.engine_pid) is None)  # a zombie, by its first thread
    assert engine.alive()

    engine.stop(0.2)

    assert not Path(f"/proc/{engine.engine_pid}").exists()
    assert engine.exit_status() == -signal.SIGKILL


def test_workers_that_outlive_a_crashed_engine_are_ended(run_dir: Path, tmp_path: Path) -> None:
    engine = start(run_dir, script(STUBBORN, str(tmp_path)))
    pids = tree(tmp_path)

    os.kill(engine.engine_pid, signal.SIGSEGV)

    eventually(lambda: not engine.alive())
    assert living(pids) == []
    assert engine.exit_status() == -signal.SIGSEGV
    assert "engine ended by signal 11" in engine.log_tail()


def test_the_exit_status_of_an_engine_that_ends_by_itself(run_dir: Path) -> None:
    engine = start(run_dir, script("import sys; print('no model here'); sys.exit(3)"))
    eventually(lambda: not engine.alive())
    assert engine.exit_status() == 3
    assert "no model here" in engine.log_tail()


def test_a_kill_from_outside_is_told_in_the_log(run_dir: Path) -> None:
    engine = start(run_dir, script("import time; time.sleep(600)"))
    os.kill(engine.engine_pid, signal.SIGKILL)
    eventually(lambda: not engine.alive())
    assert "engine ended by SIGKILL, not sent by the gateway" in engine.log_tail()


def test_an_engine_dies_with_its_guard_and_the_next_start_ends_what_is_left(run_dir: Path, tmp_path: Path) -> None:
    engine = start(run_dir, script(STUBBORN, str(tmp_path)))
    pids = tree(tmp_path)

    os.kill(engine.guard_pid, signal.SIGKILL)
    eventually(lambda: not living(pids[:1]))  # the engine itself, by the kernel
    assert not engine.alive()
    assert engine.exit_status() == -signal.SIGKILL

    again = start(run_dir, script("import time; time.sleep(600)"))
    assert living(pids) == []
    again.stop(0)


def test_strays_of_a_replica_that_is_not_started_again(run_dir: Path, tmp_path: Path) -> None:
    engine = start(run_dir, script(STUBBORN, str(tmp_path)))
    pids = tree(tmp_path)
    assert process.end_strays(run_dir) == 0  # a living guard's tree is no stray

    os.kill(engine.guard_pid, signal.SIGKILL)
    eventually(lambda: not engine.alive())

    assert process.end_strays(run_dir) >= 3
    assert living(pids) == []


def test_only_the_replicas_own_processes_are_leftovers(run_dir: Path, tmp_path: Path) -> None:
    state_path = run_dir.resolve() / "replica-r0.json"
    assert proctree.leftovers(state_path) == []  # no state file
    engine = start(run_dir, script(STUBBORN, str(tmp_path)))
    pids = tree(tmp_path)
    assert living(proctree.leftovers(state_path)) == sorted(pids)
    assert proctree.leftovers(state_path.with_name("replica-r1.json")) == []
    engine.stop(0)


def test_a_pipe_of_before_a_restart_of_the_machine_is_no_sign(tmp_path: Path) -> None:
    innocent = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    with innocent:
        assert innocent.stdin is not None and innocent.stdout is not None
        state = {"output": os.readlink(f"/proc/self/fd/{innocent.stdout.fileno()}"), "boot": proctree.boot_id()}
        state_path = tmp_path / "replica-r0.json"
        state_path.write_text(json.dumps(state))
        assert proctree.leftovers(state_path) == [innocent.pid]
        state_path.write_text(json.dumps(state | {"boot": "an earlier one"}))  # pipes are numbered anew
        assert proctree.leftovers(state_path) == []
        state_path.write_text("{}")
        assert proctree.leftovers(state_path) == []
        innocent.stdin.write(b"\n")


def test_adoption_after_the_starter_died(run_dir: Path) -> None:
    launch = script("import time; print('up', flush=True); time.sleep(600)")
    starter = f"""
import os, sys
from pathlib import Path
from backends import process
from backends.base import Endpoint, Launch
process.start("r0", Path({str(run_dir)!r}), Path({str(run_dir / "r0.log")!r}), Launch({launch.argv!r}),
              Endpoint("127.0.0.1", 12345, "secret-of-the-engine"), {os.getpid()})
os._exit(0)
"""
    subprocess.run([sys.executable, "-c", starter], check=True)

    engine = process.adopt(run_dir, "r0")
    assert engine is not None
    assert engine.alive()
    assert engine.endpoint == ENDPOINT
    assert engine.runs(launch)
    assert not engine.runs(Launch(launch.argv, {"MORE": "1"}))
    eventually(lambda: "up" in engine.log_tail())
    engine.stop(0)
    assert process.adopt(run_dir, "r0") is None


def test_nothing_to_adopt(run_dir: Path) -> None:
    assert process.adopt(run_dir, "r0") is None


def test_an_engine_whose_gateway_has_ended_is_not_adopted(run_dir: Path, tmp_path: Path) -> None:
    source = """
import pathlib, signal, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
pathlib.Path(sys.argv[1]).touch()
time.sleep(600)
"""
    main = sleeping_process()
    engine = start(run_dir, script(source, str(tmp_path / "up")), main.pid, grace_s=60)
    eventually((tmp_path / "up").exists)
    main.kill()
    main.wait()
    assert engine.alive()  # in its grace
    assert process.adopt(run_dir, "r0") is None
    engine.stop(0)


def test_a_start_replaces_the_living_engine_of_the_same_id(run_dir: Path) -> None:
    first = start(run_dir, script("import time; time.sleep(600)"))
    second = start(run_dir, script("import time; time.sleep(600)"))
    assert not first.alive()
    assert second.alive()
    second.stop(0)


def test_the_log_is_bounded(run_dir: Path) -> None:
    limit_bytes = 200_000
    source = "import sys\nfor i in range(20_000): print(f'line {i:07d} ' + 'x' * 40)\nprint('the end')"
    engine = start(run_dir, script(source), log_limit_bytes=limit_bytes)
    eventually(lambda: not engine.alive())
    older = engine.log_path.with_name("r0.log.1")
    assert engine.log_path.stat().st_size <= limit_bytes
    assert 0 < older.stat().st_size <= limit_bytes
    assert "the end" in engine.log_tail()
    written, _, _ = (older.read_bytes() + engine.log_path.read_bytes()).partition(b"[guard]")
    assert written in b"".join(b"line %07d " % i + b"x" * 40 + b"\n" for i in range(20_000)) + b"the end\n"


def test_each_run_has_its_own_log_and_the_one_before_is_kept(run_dir: Path) -> None:
    for word in ("first", "second"):
        engine = start(run_dir, script(f"print('{word} run')"))
        eventually(lambda engine=engine: not engine.alive())
    assert "second run" in engine.log_tail()
    assert "first run" not in engine.log_tail()
    assert "first run" in engine.log_path.with_name("r0.log.1").read_text()
    assert len(engine.log_tail(limit_bytes=10)) == 10


def test_state_and_log_are_private(run_dir: Path) -> None:
    engine = start(run_dir, script("import time; time.sleep(600)"))
    for path in (run_dir / "replica-r0.json", engine.log_path):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    arguments = Path(f"/proc/{engine.guard_pid}/cmdline").read_bytes()
    assert ENDPOINT.api_key.encode() not in arguments
    engine.stop(0)


@pytest.mark.parametrize(
    ("executable", "reason"), [("/nonexistent/bin/vllm", "No such file"), ("/etc/passwd", "Permission denied")]
)
def test_a_command_that_cannot_be_started(run_dir: Path, executable: str, reason: str) -> None:
    with pytest.raises(process.EngineStartError, match=f"cannot start r0: {reason}.*{executable}"):
        start(run_dir, Launch((executable, "serve")))
    assert process.adopt(run_dir, "r0") is None


def test_no_engine_is_started_for_a_gateway_that_is_gone(run_dir: Path) -> None:
    main = sleeping_process()
    main.kill()
    main.wait()
    with pytest.raises(process.EngineStartError, match="cannot start r0"):
        start(run_dir, script("import time; time.sleep(600)"), main.pid)


def test_an_engine_dies_of_memory_before_the_gateway(run_dir: Path) -> None:
    engine = start(run_dir, script("import time; time.sleep(600)"))
    assert Path(f"/proc/{engine.engine_pid}/oom_score_adj").read_text().strip() == "500"
    engine.stop(0)


def test_the_environment_of_an_engine() -> None:
    inherited = {
        "PATH": "/usr/bin",
        "HOME": "/home/me",
        "CUDA_VISIBLE_DEVICES": "1",
        "HF_HUB_OFFLINE": "0",
        "PYTHONPATH": "/elsewhere",
        "VIRTUAL_ENV": "/the/gateways",
        "VLLM_SERVER_DEV_MODE": "1",
        "TUNEGATE_HOME": "/data",
        "OPENAI_API_KEY": "sk-1",
        "HF_TOKEN": "hf_1",
        "AWS_SECRET_ACCESS_KEY": "x",
    }
    assert process.engine_environment(Launch(("/env/bin/vllm",), {"VLLM_API_KEY": "own"}), inherited) == {
        "PATH": "/env/bin:/usr/bin",
        "HOME": "/home/me",
        "CUDA_VISIBLE_DEVICES": "1",
        "HF_HUB_OFFLINE": "0",  # what the person set wins over our default
        "DO_NOT_TRACK": "1",
        "NO_COLOR": "1",
        "PYTHONUNBUFFERED": "1",
        "VLLM_API_KEY": "own",
    }


def test_an_emulated_engine_finds_what_the_gateway_found(run_dir: Path) -> None:
    """The project may be on the path by PYTHONPATH alone, or by the directory that the gateway was started in."""
    assert "PYTHONPATH" not in process.engine_environment(Launch(("/env/bin/vllm",)), {"PYTHONPATH": "/elsewhere"})
    environment = process.engine_environment(Launch((sys.executable,)), {})
    imports = "import backends.emulator.__main__ as found; print(found.__file__)"
    found = subprocess.run([sys.executable, "-S", "-c", imports], cwd=run_dir, env=environment, capture_output=True,
                           text=True, check=True).stdout  # fmt: skip
    assert Path(found.strip()).parents[2] == Path(process.__file__).parents[1]


def test_free_ports_are_outside_the_kernels_range() -> None:
    first_given = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    ports = {process.free_port() for _ in range(20)}
    assert len(ports) > 10
    assert all(process._FIRST_PORT <= port < first_given for port in ports)


def test_a_guard_is_small(run_dir: Path) -> None:
    engine = start(run_dir, script("import time; time.sleep(600)"))
    fields = Path(f"/proc/{engine.guard_pid}/status").read_text()
    rss_kb = next(int(line.split()[1]) for line in fields.splitlines() if line.startswith("VmRSS"))
    assert rss_kb < 24_000
    assert repr(engine).endswith("port=12345 alive>")
    engine.stop(0)


def test_a_log_that_cannot_be_made_is_an_error_at_the_start(run_dir: Path) -> None:
    (run_dir / "logs" / "r0.log").mkdir(parents=True)
    (run_dir / "logs" / "r0.log.1").mkdir()
    (run_dir / "logs" / "r0.log.1" / "kept").touch()
    with pytest.raises(process.EngineStartError, match=r"cannot start r0: .*r0\.log"):
        start(run_dir, script("import time; time.sleep(600)"))


def test_a_guard_that_crashes_says_where_it_tells_why(run_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(process.EngineStartError, match=r"the guard process crashed \(log: .*r0\.log\)"):
        start(run_dir, Launch((sys.executable,), {"NUL": "a\0b"}))
    assert "embedded null byte" in (run_dir / "logs" / "r0.log").read_text()
