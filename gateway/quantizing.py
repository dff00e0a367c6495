"""`gateway serve --quantization awq|gptq` of a plain checkpoint: made once into the model store, then served.

The quantizer runs as a process of its own, in an environment with torch; a start that is cut off goes on where it was.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from backends import lifeline
from backends.progress import Progress
from backends.spec import Device
from gateway.config import ConfigError, ServeConfig, home
from quant.choice import planned_facts
from quant.errors import QuantError
from quant.rules import Facts

Method = Literal["awq", "gptq"]
_NEEDED = ("torch", "transformers", "quant")
_PROBE = (
    "import importlib.util as u, sys; "
    f"missing = [name for name in {_NEEDED!r} if u.find_spec(name) is None]; "
    "print(' '.join(missing)); sys.exit(bool(missing))"
)
_PROBE_S = 60
_CPU_SAMPLES = 32  # a quarter of the default: minutes instead of a quarter of an hour for a small model


@dataclass(frozen=True, slots=True)
class Recipe:
    """A quantized checkpoint that follows from a plain one. Its format is called as its method is."""

    source: Path
    method: Method
    target: Path

    @property
    def is_made(self) -> bool:
        """The directory has its name only when it is whole."""
        return self.target.is_dir()

    def facts(self) -> Facts:
        """What the checkpoint will be, to ask who loads it before it is made. Raises ConfigError."""
        try:
            return planned_facts(self.source, self.method)
        except QuantError as error:
            raise ConfigError(str(error)) from error


def recipe(config: ServeConfig, source: Path) -> Recipe | None:
    """How `source` becomes what is served; None where it is served as it is. Raises ConfigError."""
    method: Method | None = next((name for name in get_args(Method) if name == config.quantization), None)
    if method is None or not any(source.glob("*.safetensors")) or _quantization(source) is not None:
        return None
    name = config.model.rstrip("/").rsplit("/", 1)[-1].partition("@")[0]
    return Recipe(source, method, home() / "models" / f"{name}-{method}-{_fingerprint(source)}")


def make(recipe: Recipe, python: Path | None, device: Device, progress: Progress) -> None:
    """Quantize. python: with torch; None: the one that runs the gateway. Raises ConfigError.

    progress: told of the beginning and the end; between, the quantizer writes its own to stderr.
    """
    interpreter = str(python.absolute() if python else Path(sys.executable))
    _prove(interpreter, recipe)
    recipe.target.parent.mkdir(parents=True, exist_ok=True)
    argv = [interpreter, "-m", "quant", "--model", str(recipe.source), "--out", str(recipe.target)]
    argv += ["--method", recipe.method, "--format", recipe.method, "--device", device]
    argv += ["--calib-samples", str(_CPU_SAMPLES)] if device == "cpu" else []
    progress.phase(f"quantizing {recipe.source} by {recipe.method}, once; later starts find {recipe.target}")
    done = subprocess.run(
        argv,
        check=False,
        stdin=subprocess.DEVNULL,
        stdout=sys.stderr,  # stdout is for the ready line
        preexec_fn=functools.partial(lifeline.end_with_parent, signal.SIGTERM, os.getpid()),
    )
    if done.returncode or not recipe.is_made:
        raise ConfigError(
            f"{recipe.source} was not quantized (status {done.returncode}, its reason above); the same command goes "
            "on with what is finished. To serve the original, leave --quantization out"
        )
    progress.finish(f"{recipe.source} is quantized")


def _prove(interpreter: str, recipe: Recipe) -> None:
    try:
        probe = subprocess.run(
            [interpreter, "-c", _PROBE], capture_output=True, text=True, timeout=_PROBE_S, check=False
        )
        missing = probe.stdout.strip() if probe.returncode else ""
        broken = bool(probe.returncode) and not missing
    except (OSError, subprocess.TimeoutExpired):
        missing, broken = "", True
    if missing or broken:
        raise ConfigError(
            f"--quantization {recipe.method} has to quantize {recipe.source} first, and {interpreter} "
            f"{'does not run' if broken else f'lacks {missing}'}: install `tunegate[quant]` there, name another "
            "environment by --trainer-python PYTHON, or quantize elsewhere with `gateway quantize` and serve that"
        )


def _quantization(source: Path) -> object:
    try:
        return json.loads((source / "config.json").read_bytes()).get("quantization_config")
    except (OSError, ValueError, AttributeError) as error:
        raise ConfigError(f"{source / 'config.json'} cannot be read: {error}") from error


def _fingerprint(source: Path) -> str:
    """Tells checkpoints apart without reading weights: config.json, and the weight files' names, sizes and times."""
    sha = hashlib.sha256((source / "config.json").read_bytes())
    for file in sorted(source.glob("*.safetensors")):
        status = file.stat()
        sha.update(f"\0{file.name}\0{status.st_size}\0{status.st_mtime_ns}".encode())
    return sha.hexdigest()[:12]
