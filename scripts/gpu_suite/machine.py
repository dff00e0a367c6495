"""The machine that the suite runs on: its GPUs, and what results are worth nothing without."""

from __future__ import annotations

import os
import platform
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_ASK_S = 60


@dataclass(frozen=True)
class Gpu:
    """One GPU as the NVIDIA driver describes it."""

    index: str  # what CUDA_VISIBLE_DEVICES calls it
    uuid: str
    name: str
    memory_bytes: int
    free_bytes: int
    driver: str


def gpus() -> list[Gpu]:
    """The GPUs that this process may use, in the order of CUDA_VISIBLE_DEVICES; none without a driver."""
    said = _said("nvidia-smi", "--query-gpu=index,uuid,name,memory.total,memory.free,driver_version",
                 "--format=csv,noheader,nounits")  # fmt: skip
    return visible(parse(said), os.environ.get("CUDA_VISIBLE_DEVICES"))


def parse(listing: str) -> list[Gpu]:
    """Read nvidia-smi's lines: index, uuid, name, MiB in all, MiB free, driver."""
    rows = [[cell.strip() for cell in line.split(",")] for line in listing.splitlines() if line.count(",") == 5]
    return [Gpu(index, uuid, name, int(mib) << 20, int(free) << 20, driver)
            for index, uuid, name, mib, free, driver in rows]  # fmt: skip


def visible(found: list[Gpu], named: str | None) -> list[Gpu]:
    """Those that CUDA_VISIBLE_DEVICES names, by number or UUID; all when it is not set."""
    if named is None:
        return found
    by_name = {gpu.index: gpu for gpu in found} | {gpu.uuid: gpu for gpu in found}
    return [by_name[name.strip()] for name in named.split(",") if name.strip() in by_name]


def first_visible() -> str:
    """What CUDA_VISIBLE_DEVICES calls the first GPU of this process."""
    return os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]


def facts(torch_python: str, found: list[Gpu]) -> dict[str, Any]:
    """What stands beside the figures."""
    torch = "import importlib.metadata as m; print(m.version('torch'), m.version('transformers'))"
    return {
        "gpus": [f"{gpu.name}, {gpu.memory_bytes >> 20} MiB" for gpu in found],
        "driver": found[0].driver if found else "",
        "cores": os.cpu_count(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9),
        "python": platform.python_version(),
        "torch, transformers": _said(torch_python, "-c", torch).strip(),
        "commit": _said("git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD").strip(),
    }


def _said(*command: str) -> str:
    """A command's output; "" where there is no such command or it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_ASK_S, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return "" if done.returncode else done.stdout
