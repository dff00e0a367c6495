"""Turns on a shared GPU: what measures is alone, what is busy is not beside it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from scripts.gpu_suite.quiet import busy, mark, quiet
from tests.support.wait import eventually


@pytest.mark.parametrize("other", [busy, quiet])
def test_nothing_begins_beside_a_measurement(
    tmp_path: Path, other: Callable[[Path, str], AbstractContextManager[None]]
) -> None:
    begun = threading.Event()

    def neighbour() -> None:
        with other(tmp_path, "neighbour"):
            begun.set()

    thread = threading.Thread(target=neighbour)
    with quiet(tmp_path, "bench"):
        assert not mark(tmp_path, "bench").exists()
        thread.start()
        eventually(mark(tmp_path, "neighbour").exists, 5)
        assert not begun.is_set()
    thread.join(5)
    assert begun.is_set()
    assert not mark(tmp_path, "neighbour").exists()


def test_what_is_busy_is_so_side_by_side(tmp_path: Path) -> None:
    with busy(tmp_path, "one"), busy(tmp_path, "other"):
        assert [file.suffix for file in tmp_path.iterdir()] == [".lock"]


def test_every_gpu_has_turns_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    with quiet(tmp_path, "one"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,1")
        with quiet(tmp_path, "other"):
            pass
    assert sorted(file.name for file in tmp_path.iterdir()) == ["gpu-0.lock", "gpu-1.lock", "gpu-2.lock"]
