"""What of this machine the engines need, what is missing, and what to do about it. Looks; changes nothing."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from ctypes.util import find_library
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from uv import find_uv_bin

from backends import envs
from backends.envs import EngineEnv, State, engines_dir
from backends.install import import_failure
from backends.spec import Device

_CUDA_13_DRIVER = 580  # first NVIDIA driver branch for the CUDA 13 that the pinned builds bring
_MEMORY_WANTED_BYTES = 6_000_000_000  # a CPU engine with the demo model takes 4 GB


class Verdict(StrEnum):
    """How much a finding matters."""

    OK = "ok"
    NOTE = "note"  # works without; could be better
    PROBLEM = "problem"


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing looked at: what is there, and what to do where that is not enough."""

    subject: str
    verdict: Verdict
    found: str
    advice: str = ""


def doctor() -> list[Finding]:
    """Look at everything; some seconds for each installed engine, which is imported to see that it works."""
    device = envs.default_device()
    shown = [env for env in envs.CATALOGUE if env.device == device or env.state() is not State.ABSENT]
    return [
        _python(),
        _processor(),
        _graphics(device),
        _memory(),
        _disk(device),
        _compiler(),
        *([_allocator()] if device == "cpu" else []),
        *(_environment(env) for env in shown),
    ]


def _python() -> Finding:
    found = f"Python {platform.python_version()}, uv at {find_uv_bin()}"
    wanted = envs.CATALOGUE[0].pythons
    if f"{sys.version_info.major}.{sys.version_info.minor}" in wanted:
        return Finding("python", Verdict.OK, found)
    advice = f"the engines' wheels are for Python {' and '.join(wanted)}: uv looks for one of these, or fetches it"
    return Finding("python", Verdict.NOTE, found, advice)


def _processor() -> Finding:
    flags = next(
        (line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags")), ""
    ).split()
    known = [name for name in ("avx2", "avx512f", "avx512_bf16", "amx_tile") if name in flags]
    found = f"{os.cpu_count()} cores, {platform.machine()}, {' '.join(known) or 'no vector extensions known'}"
    if platform.system() == "Linux" and platform.machine() == "x86_64" and "avx2" in known:
        return Finding("processor", Verdict.OK, found)
    return Finding("processor", Verdict.PROBLEM, found, "the pinned wheels are for Linux on x86-64 with AVX2 or more")


def _graphics(device: Device) -> Finding:
    if device == "cpu":
        advice = "engines run on the CPU: vllm, or sglang for tests. With a GPU: install the NVIDIA driver"
        return Finding("cuda", Verdict.NOTE, "no device (nvidia-smi is missing or lists none)", advice)
    query = ["nvidia-smi", "--query-gpu=driver_version,name,memory.total", "--format=csv,noheader"]
    rows = subprocess.run(query, capture_output=True, text=True, timeout=30, check=True).stdout.strip().splitlines()
    driver = rows[0].split(",")[0]
    found = f"driver {driver}; " + "; ".join(row.split(",", 1)[1].strip() for row in rows)
    if int(driver.split(".")[0]) >= _CUDA_13_DRIVER:
        return Finding("cuda", Verdict.OK, found)
    advice = f"the pinned engines bring CUDA 13, which wants driver {_CUDA_13_DRIVER} or newer: update the driver"
    return Finding("cuda", Verdict.PROBLEM, found, advice)


def _memory() -> Finding:
    fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    available_bytes = int(fields["MemAvailable"].split()[0]) * 1024
    found = f"{available_bytes / 1e9:.1f} GB available"
    if available_bytes >= _MEMORY_WANTED_BYTES:
        return Finding("memory", Verdict.OK, found)
    return Finding("memory", Verdict.NOTE, found, "an engine with the demo model takes about 4 GB on the CPU")


def _disk(device: Device) -> Finding:
    existing = next(folder for folder in (engines_dir(), *engines_dir().parents) if folder.exists())
    free_bytes = shutil.disk_usage(existing).free
    largest = max(
        (env for env in envs.CATALOGUE if env.device == device and env.state() is not State.READY),
        key=lambda env: env.disk_bytes,
        default=None,
    )
    found = f"{free_bytes / 1e9:.0f} GB free for {engines_dir()}"
    if largest is None or free_bytes >= largest.disk_bytes:
        return Finding("disk", Verdict.OK, found)
    advice = (
        f"{largest} takes up to {largest.disk_bytes / 1e9:.0f} GB: free some, or set TUNEGATE_HOME to a larger disk"
    )
    return Finding("disk", Verdict.PROBLEM, found, advice)


def _compiler() -> Finding:
    path = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if path:
        return Finding("compiler", Verdict.OK, path)
    advice = "engines that compile kernels as they start need one (Debian: apt-get install gcc python3-dev)"
    return Finding("compiler", Verdict.NOTE, "no C compiler", advice)


def _allocator() -> Finding:
    library = find_library("tcmalloc_minimal") or find_library("tcmalloc")
    if library:
        return Finding("tcmalloc", Verdict.OK, library)
    advice = "vLLM is quicker on the CPU with it (Debian: apt-get install libtcmalloc-minimal4)"
    return Finding("tcmalloc", Verdict.NOTE, "not installed", advice)


def _environment(env: EngineEnv) -> Finding:
    state = env.state()
    if state is State.ABSENT:
        return Finding(str(env), Verdict.NOTE, state, f"to have it: {env.install_command}")
    if state is not State.READY:
        return Finding(str(env), Verdict.PROBLEM, f"{state} at {env.path}", f"run: {env.install_command}")
    failure = import_failure(env)
    if failure:
        advice = f"remove {env.path}, then run: {env.install_command}"
        return Finding(str(env), Verdict.PROBLEM, f"installed, and its import fails:\n{failure}", advice)
    return Finding(str(env), Verdict.OK, f"works, at {env.path}" + (f"; {env.note}" if env.note else ""))
