"""An intake over a tiny base, and a look at what it left on the disk."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from gateway.adapters.intake import Accepted, Rules, take_in
from gateway.adapters.package import Limits, Part
from gateway.adapters.shapes import BaseShapes, read_base
from gateway.adapters.storage import AdapterStorage
from tests.support.checkpoints import write_checkpoint
from tests.support.peft_files import TINY


@dataclass
class Intake:
    """Take in uploads as the API does, from named bytes or files."""

    state: Path
    storage: AdapterStorage
    rules: Rules

    def __call__(self, *parts: tuple[str, bytes]) -> Accepted:
        with self.storage.staging() as work:
            written = []
            for index, (name, contents) in enumerate(parts):
                path = work / f"part-{index}"
                path.write_bytes(contents)
                written.append(Part(name, path))
            return take_in(written, work, self.rules, self.storage)

    def left(self) -> list[str]:
        """Every file below the state directory."""
        return sorted(str(path.relative_to(self.state)) for path in self.state.rglob("*") if path.is_file())


@pytest.fixture
def base(tmp_path: Path) -> BaseShapes:
    return read_base(write_checkpoint(tmp_path / "base", TINY), "tiny")


@pytest.fixture
def make_intake(tmp_path: Path, base: BaseShapes) -> Callable[..., Intake]:
    def make(total_bytes: int = 4_000_000, state: Path | None = None) -> Intake:
        state = state or tmp_path / "state"
        return Intake(state, AdapterStorage(state), Rules(Limits(total_bytes, members=50), 16, base))

    return make


@pytest.fixture
def intake(make_intake: Callable[..., Intake]) -> Intake:
    return make_intake()
