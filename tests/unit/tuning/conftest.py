"""A store of jobs, batches and files in a database of its own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from gateway.control.store import Store
from gateway.tuning.store import Objects


@pytest.fixture
def objects(tmp_path: Path) -> Iterator[Objects]:
    store = Store(f"sqlite:///{tmp_path / 'registry.db'}")
    store.migrate()
    yield Objects(store)
    store.close()
