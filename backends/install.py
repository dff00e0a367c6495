"""Makes an engine environment: in place, from its lock, the marker last.

A virtual environment cannot be moved, so a half-made one lies where the finished one will. What tells them apart is the
marker, written after everything else is on disk. Without it, or with that of another lock, all is wiped and made anew;
uv's cache makes that quick.
"""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from backends import uv
from backends.base import BackendError
from backends.envs import EMULATOR, MARKER, EngineEnv, State, engines_dir, lookup, shim_files
from backends.progress import Progress, Silent
from backends.spec import Device


class InstallFailed(BackendError):
    """The environment could not be made; says why and what to do."""


def install(
    name: str,
    version: str | None = None,
    device: Device | None = None,
    find_links: Sequence[Path] = (),
    progress: Progress | None = None,
) -> EngineEnv:
    """Make the environment unless it is there already; returns it ready for use.

    find_links: folders of wheels. With one, packages come from these folders alone and no index is asked.
    Raises UnknownEngine, InstallFailed.
    """
    env = lookup(name, version, device)
    progress = progress or Silent()
    if env.version == EMULATOR or env.state() is State.READY:
        progress.finish(f"{env} is ready")
        return env
    folders = [_wheel_folder(folder) for folder in find_links]
    try:
        engines_dir().mkdir(parents=True, exist_ok=True)
        with exclusive(engines_dir() / f".{env.slug}.lock", progress) as lock_fd:
            if env.state() is not State.READY:  # another install may have made it while this one waited
                _make(env, folders, progress, lock_fd)
    except OSError as error:
        raise InstallFailed(f"{env} could not be installed: {error}\n{_advice(str(error), folders)}") from error
    progress.finish(f"{env} is ready at {env.path}")
    return env


@contextlib.contextmanager
def exclusive(lock: Path, progress: Progress) -> Iterator[int]:
    """Hold `lock` against other processes, waiting for them; yields its descriptor.

    A child that inherits the descriptor holds the lock too, so one that outlives a killed parent is waited for.
    """
    with lock.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            progress.phase(f"waiting for another process that works on {lock.name.strip('.').removesuffix('.lock')}")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield file.fileno()


def _make(env: EngineEnv, folders: Sequence[Path], progress: Progress, lock_fd: int) -> None:
    if env.path.exists():
        progress.phase(f"removing what is {env.state()} at {env.path}")
        (env.path / MARKER).unlink(missing_ok=True)  # first, lest a killed removal leave a marker on half a tree
        shutil.rmtree(env.path)
    _require_space(env)
    environ = uv.environment(os.environ)
    flags = [f"--find-links={folder}" for folder in folders] + (["--no-index"] if folders else uv.index_flags(environ))
    try:
        progress.phase(f"making the environment of {env}")
        uv.run(["venv", "--python", _python_for(env), str(env.path)], progress, environ=environ, pass_fds=[lock_fd])
        progress.phase(f"installing {_count(env)} packages pinned in {env.lock.name}")
        into = ["pip", "install", "--python", str(env.python), "--no-deps", *flags]
        backend = _torch_backend(env, into, environ) if "--no-index" not in flags else []
        packages = [*into, *backend, "--compile-bytecode", "--requirements", str(env.lock)]
        uv.run(packages, progress, environ=environ, pass_fds=[lock_fd])
    except uv.UvFailed as error:
        raise InstallFailed(f"{env} could not be installed:\n{error}\n{_advice(str(error), folders)}") from error
    _lay_shims(env)
    progress.phase("checking that it can be imported")
    failure = import_failure(env)
    if failure:
        raise InstallFailed(f"{env} was installed and does not work:\n{failure}")
    _write_marker(env)


def _require_space(env: EngineEnv) -> None:
    free_bytes = shutil.disk_usage(engines_dir()).free
    if free_bytes < env.disk_bytes:
        raise InstallFailed(
            f"{env} takes up to {env.disk_bytes / 1e9:.0f} GB under {engines_dir()}, {free_bytes / 1e9:.1f} GB are "
            "free: free some, or set TUNEGATE_HOME to a folder on a larger disk"
        )


def _python_for(env: EngineEnv) -> str:
    """This Python where the pinned wheels fit it; else a version that uv finds or fetches."""
    current = f"{sys.version_info.major}.{sys.version_info.minor}"
    return sys.executable if current in env.pythons else env.pythons[-1]


def _count(env: EngineEnv) -> int:
    return sum(bool(line.strip()) and not line.startswith("#") for line in env.lock.read_text().splitlines())


def _torch_backend(env: EngineEnv, into: Sequence[str], environ: Mapping[str, str]) -> list[str]:
    """What makes uv find the pinned CPU build of torch: nothing where a configured source has it, else torch's index.

    The default index holds CUDA builds only; `+cpu` in the pin keeps them out.
    """
    pins = [line for line in env.lock.read_text().splitlines() if line.startswith("torch==")]
    if env.device == "cuda" or not pins:
        return []
    try:
        uv.run([*into, "--dry-run", *pins], Silent(), environ=environ)
    except uv.UvFailed:
        return ["--torch-backend", "cpu"]
    return []


def _advice(output: str, folders: Sequence[Path]) -> str:
    if "No space left" in output:
        return (
            "The disk is full: free some space, or set TUNEGATE_HOME (and UV_CACHE_DIR) to a folder on a larger disk."
        )
    if folders:
        return "Packages were taken from the --find-links folders alone: put the missing wheels there."
    return (
        "Without a way to the package index: collect the wheels elsewhere and name their folder with --find-links, or "
        "configure pip with a mirror (index-url, extra-index-url, find-links); pip's settings hold here too."
    )


def _lay_shims(env: EngineEnv) -> None:
    files = shim_files(env)
    if not files:
        return
    assert env.shims is not None
    (site_packages,) = (env.path / "lib").glob("python3.*/site-packages")
    for file in files:
        target = site_packages / file.relative_to(env.shims)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, target)


def import_failure(env: EngineEnv) -> str:
    """The end of what the environment's own import check says; "" when it passes. Takes seconds."""
    done = subprocess.run(
        [str(env.python), "-P", "-c", env.check], capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False
    )
    if done.returncode == 0:
        return ""
    return "\n".join(done.stderr.splitlines()[-5:]) or f"status {done.returncode}"


def _write_marker(env: EngineEnv) -> None:
    """Everything to disk first: a marker that outlives a power failure must not vouch for files that do not."""
    os.sync()
    made_at = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    marker = {"engine": env.name, "version": env.version, "device": env.device, "digest": env.digest()}
    aside = env.path / (MARKER + ".new")
    with aside.open("w") as file:
        json.dump(marker | {"made_at": made_at}, file, indent=2)
        file.flush()
        os.fsync(file.fileno())
    aside.rename(env.path / MARKER)


def _wheel_folder(folder: Path) -> Path:
    if not folder.is_dir():
        raise InstallFailed(f"--find-links {folder} is not a folder of wheels")
    return folder.resolve()
