"""A disk that is soon full: a small file system of its own, for what happens when nothing more can be written."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest


@contextlib.contextmanager
def small_disk(mount_at: Path, size: str) -> Iterator[Path]:
    """A file system in memory (`size` as mount takes it: 64k, 48m); skips the test where mounting is not allowed."""
    mount_at.mkdir()
    argv = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(mount_at)]
    mounted = subprocess.run(argv, capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"cannot mount a small file system: {mounted.stderr.strip()}")
    try:
        yield mount_at
    finally:
        # Lazily: what a failed test left open must not hide why it failed.
        subprocess.run(["umount", "--lazy", str(mount_at)], check=True)
