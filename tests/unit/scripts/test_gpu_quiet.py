"""Turns on a shared GPU: what measures is alone, what is busy is not beside it."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from scripts.gpu_suite.quiet import busy, quiet
from tests.support.wait import eventually


@pytest.mark.parametrize("other", [busy, quiet])
def test_nothing_begins_beside_a_measurement(tmp_path: Path, other: type) -> None:
    seen: list[str] = []

    def neighbour() -> None:
        seen.append("asks")
        with other(tmp_path):
            seen.append("begins")

    with quiet(tmp_path):
        thread = threading.Thread(target=neighbour)
        thread.start()
        eventually(lambda: seen == ["asks"], 5)
        thread.join(0.1)
        assert seen == ["asks"]
    thread.join(5)
    assert seen == ["asks", "begins"]


def test_what_is_busy_is_so_side_by_side(tmp_path: Path) -> None:
    with busy(tmp_path), busy(tmp_path):
        assert [file.suffix for file in tmp_path.iterdir()] == [".lock"]


def test_every_gpu_has_turns_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    with quiet(tmp_path):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,1")
        with quiet(tmp_path):
            pass
    assert sorted(file.name for file in tmp_path.iterdir()) == ["gpu-0.lock", "gpu-1.lock", "gpu-2.lock"]
