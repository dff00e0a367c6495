"""Environments of other projects that a proof compares us with, made where there is none.

They are kept in a cache folder of the user's, never in the project's own. Installing goes through pip, so that its
configuration (mirrors, folders of wheels such as torch's for CPUs) counts.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

_CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))


class NotHere(Exception):
    """A peer cannot be installed on this machine; the text says why."""


def environment(home: str, requirements: Sequence[str]) -> Path:
    """The folder of an environment with these pinned packages. home: below the cache folder. Raises NotHere."""
    folder = _CACHE / home
    wanted = "\n".join(requirements)
    mark = folder / "installed"
    if mark.is_file() and mark.read_text() == wanted:
        return folder
    steps = (
        [sys.executable, "-m", "venv", "--clear", str(folder)],
        [str(folder / "bin/python"), "-m", "pip", "install", "--quiet", *requirements],
    )
    if any(subprocess.run(step).returncode for step in steps):
        raise NotHere(f"{requirements[0]} could not be installed in {folder}")
    mark.write_text(wanted)
    return folder


def peer_python(text: str) -> tuple[str, Path]:
    """NAME=PATH on a command line: the Python of an environment that is here already. Raises ArgumentTypeError."""
    name, _, path = text.partition("=")
    if not Path(path).is_file():
        raise argparse.ArgumentTypeError(f"{text!r}: expected NAME=PATH of a peer's Python, and there is no {path!r}")
    return name, Path(path)


def versions(python: Path | str, packages: Sequence[str]) -> dict[str, str]:
    """Versions of installed distributions, as an environment's own Python sees them."""
    code = f"import importlib.metadata as m, json; print(json.dumps({{p: m.version(p) for p in {list(packages)!r}}}))"
    answer = subprocess.run([str(python), "-c", code], capture_output=True, text=True, check=True)
    found: dict[str, str] = json.loads(answer.stdout)
    return found
