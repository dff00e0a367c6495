"""Adapters that already lie on this machine, in directories that the operator has opened to the API."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from gateway.adapters.package import KEPT, Part
from gateway.errors import InvalidRequest, NotFound


def parts_of(path: str, roots: Sequence[Path]) -> list[Part]:
    """The adapter's files in a directory below one of `roots`, links followed as long as they stay below.

    Nothing is copied yet. Raises InvalidRequest, NotFound, OSError.
    """
    if "\0" in path:
        raise InvalidRequest("lora_path holds a NUL character", param="lora_path")
    directory = (roots[0] / path).resolve()  # an absolute path stays as it is
    _check_inside(directory, roots, path)
    if not directory.is_dir():
        raise NotFound(f"lora_path {path!r} is not a directory of the gateway's machine", param="lora_path")
    parts = []
    for entry in sorted(directory.iterdir()):
        if entry.name in KEPT or entry.name.startswith("adapter_model."):
            target = entry.resolve()
            _check_inside(target, roots, f"{path}/{entry.name}")
            if target.is_file():
                parts.append(Part(entry.name, target))
    return parts


def _check_inside(path: Path, roots: Sequence[Path], given: str) -> None:
    if not any(path.is_relative_to(root.resolve()) for root in roots):
        opened = ", ".join(str(root) for root in roots)
        raise InvalidRequest(
            f"{given!r} is outside of the directories opened to this route: {opened} (--adapter-root)",
            param="lora_path",
            code="path_not_allowed",
        )
