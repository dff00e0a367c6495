"""The engine environments that exist: engine x version x device, each pinned by a lock file, and where they lie.

An environment is a virtual environment under `$TUNEGATE_HOME/engines/`. It counts as installed only when its marker
file, written last, carries the digest of today's lock and shims; `backends.install` makes it so.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from backends.base import BackendError
from backends.spec import BACKEND_NAMES, BackendName, Device

EMULATOR = "emulator"  # a version that every engine has: nothing is installed, the engine is played
MARKER = "tunegate-env.json"
LOCKS = Path(__file__).with_name("locks")
_SHIMS = Path(__file__).with_name("shims")


class UnknownEngine(BackendError):
    """No environment of that engine, version and device is on offer; the message lists those that are."""


class EngineNotInstalled(BackendError):
    """The environment is on offer and not (rightly) installed; the message says what to run."""


class State(StrEnum):
    """What lies where an environment should be."""

    READY = "ready"
    ABSENT = "not installed"
    UNFINISHED = "half installed"
    OUTDATED = "installed from other pins"
    BROKEN = "its Python is gone"


@dataclass(frozen=True, slots=True)
class EngineEnv:
    """One environment on offer."""

    name: BackendName
    version: str
    device: Device
    disk_bytes: int = 0  # unpacked, with what the download takes meanwhile
    check: str = ""  # Python code that runs in the finished environment and fails if it cannot work
    pythons: tuple[str, ...] = ("3.11", "3.12")  # those all pinned wheels exist for
    shims: Path | None = None  # laid over site-packages as it is
    note: str = ""

    def __str__(self) -> str:
        return f"{self.name} {self.version} ({self.device})"

    @property
    def slug(self) -> str:
        return f"{self.name}-{self.version}-{self.device}"

    @property
    def path(self) -> Path:
        return engines_dir() / self.slug

    @property
    def python(self) -> Path:
        return self.path / "bin" / "python"

    @property
    def lock(self) -> Path:
        """The requirements file with every package pinned."""
        return LOCKS / f"{self.slug}.txt"

    @property
    def install_command(self) -> str:
        return f"gateway engines install {self.name}=={self.version} --device {self.device}"

    def digest(self) -> str:
        """SHA-256 of what decides the environment's contents: the lock and the shims."""
        sha = hashlib.sha256(self.lock.read_bytes())
        for file in shim_files(self):
            assert self.shims is not None
            sha.update(b"\0" + str(file.relative_to(self.shims)).encode() + b"\0" + file.read_bytes())
        return sha.hexdigest()

    def state(self) -> State:
        """What lies at `path` now."""
        if not self.path.exists():
            return State.ABSENT
        try:
            marker = json.loads((self.path / MARKER).read_bytes())
        except (OSError, ValueError):
            return State.UNFINISHED
        if not isinstance(marker, dict) or marker.get("digest") != self.digest():
            return State.OUTDATED
        return State.READY if self.python.exists() else State.BROKEN


_GB = 1_000_000_000
_CPU_TORCH = "import torch; assert torch.version.cuda is None, 'a CUDA build of torch was installed'; "

# The first of an engine and device is its default.
CATALOGUE: tuple[EngineEnv, ...] = (
    EngineEnv("vllm", "0.33.0", "cuda", 24 * _GB, "import torch, vllm"),
    EngineEnv("sglang", "0.5.23", "cuda", 28 * _GB, "import torch, sglang"),
    EngineEnv("lmdeploy", "0.18.0", "cuda", 22 * _GB, "import torch, lmdeploy"),
    EngineEnv(
        "vllm",
        "0.32.0",
        "cpu",
        5 * _GB,
        _CPU_TORCH + "import vllm, vllm.platforms; assert vllm.platforms.current_platform.is_cpu()",
        shims=_SHIMS / "vllm-0.32.0-cpu",
    ),
    EngineEnv(
        "sglang",
        "0.5.23",
        "cpu",
        7 * _GB,
        _CPU_TORCH + "import sglang, sgl_kernel, torchvision",
        shims=_SHIMS / "sglang-0.5.23-cpu",
        note="for development and tests only: stand-ins replace SGLang's CUDA kernels",
    ),
)


def engines_dir() -> Path:
    """Where the environments lie: `engines` in $TUNEGATE_HOME, else in ~/.tunegate."""
    return Path(os.environ.get("TUNEGATE_HOME") or Path.home() / ".tunegate") / "engines"


def shim_files(env: EngineEnv) -> list[Path]:
    """The files laid over an environment's site-packages, sorted."""
    if env.shims is None:
        return []
    return sorted(path for path in env.shims.rglob("*") if path.is_file() and "__pycache__" not in path.parts)


@functools.cache
def gpu_count() -> int:
    """How many devices the NVIDIA driver lists; 0 where there is no driver."""
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return 0
    return 0 if listed.returncode else sum(line.startswith("GPU ") for line in listed.stdout.splitlines())


@functools.cache
def default_device() -> Device:
    """`cuda` where the NVIDIA driver lists a device, else `cpu`."""
    return "cuda" if gpu_count() else "cpu"


def lookup(name: str, version: str | None = None, device: Device | None = None) -> EngineEnv:
    """The environment on offer, installed or not. None takes the default. Raises UnknownEngine."""
    device = device or default_device()
    if name not in BACKEND_NAMES:
        raise UnknownEngine(f"no engine is called {name!r}; there are {', '.join(BACKEND_NAMES)}")
    if version == EMULATOR:
        return EngineEnv(name, EMULATOR, device)
    of_device = [env for env in CATALOGUE if env.name == name and env.device == device]
    if not of_device:
        others = sorted({env.name for env in CATALOGUE if env.device == device})
        raise UnknownEngine(
            f"{name} does not run on the device `{device}`; {' and '.join(others)} do. "
            f"Use one of these, a CUDA device, or the engine version `{EMULATOR}` for a fake {name}"
        )
    for env in of_device:
        if version in (None, env.version):
            return env
    raise UnknownEngine(
        f"{name} {version} is not on offer for the device `{device}`; pinned and tested: "
        f"{', '.join(env.version for env in of_device)}"
    )


def find(name: str, version: str | None = None, device: Device | None = None) -> EngineEnv:
    """The environment, ready for use. Raises UnknownEngine, EngineNotInstalled."""
    env = lookup(name, version, device)
    if env.version == EMULATOR:
        return env
    state = env.state()
    if state is not State.READY:
        raise EngineNotInstalled(f"{env}: {state} at {env.path}. Run: {env.install_command}")
    return env


def installed() -> list[EngineEnv]:
    """The environments on offer that are ready for use."""
    return [env for env in CATALOGUE if env.state() is State.READY]


def executable(env: EngineEnv) -> tuple[str, ...]:
    """The start of the engine's command line; `Backend.launch` puts subcommand and flags after it.

    Python gets -P: what lies in the working directory must not pass for a module of the engine's.
    """
    if env.version == EMULATOR:
        return (sys.executable, "-m", "backends.emulator", "--as", env.name)
    if env.name == "sglang":
        return (str(env.python), "-P", "-m", "sglang.launch_server")
    return (str(env.path / "bin" / env.name),)
