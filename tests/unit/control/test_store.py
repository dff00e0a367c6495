"""The registry's database: schema, transactions, what survives a restart."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import create_engine

from gateway.config import ConfigError
from gateway.control import key_store, pins
from gateway.control import store as module
from gateway.control.canary import Policy
from gateway.control.catalog import Canary, Cause, Event, Version, VersionState
from gateway.control.store import NewVersion, Store, StoreUnavailable
from gateway.errors import Conflict, NotFound, StorageFull
from gateway.tuning import store as tuning
from tests.support import disks


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    opened = open_store(tmp_path)
    yield opened
    opened.close()


def open_store(tmp_path: Path) -> Store:
    opened = Store(f"sqlite:///{tmp_path / 'registry.db'}")
    opened.migrate()
    return opened


def new(digit: str = "1") -> NewVersion:
    return NewVersion(
        content_id=f"a-{digit * 12}",
        sha256=digit * 64,
        base="base",
        rank=8,
        target_modules=("q_proj", "v_proj"),
        size_bytes=5_000_000_000,
        metadata={"trained_on": "somewhere"},
    )


def test_migrations_from_empty_and_again(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    store.add_version("one", new())
    store.migrate()
    store.close()
    again = open_store(tmp_path)
    assert list(again.adapters()) == ["one"]
    again.close()


def test_migrations_make_what_the_models_say(tmp_path: Path) -> None:
    open_store(tmp_path).close()
    engine = create_engine(f"sqlite:///{tmp_path / 'registry.db'}")
    with engine.connect() as connection:
        models: Any = [owner._Base.metadata for owner in (module, key_store, pins, tuning)]
        differences = compare_metadata(MigrationContext.configure(connection), models)
    engine.dispose()
    assert differences == []


def test_sqlite_is_durable_and_checks_keys(tmp_path: Path, store: Store) -> None:
    with store._session() as session:
        connection = session.connection().connection.driver_connection
        assert isinstance(connection, sqlite3.Connection)
        pragmas = [
            connection.execute(f"PRAGMA {name}").fetchone()[0]
            for name in ("journal_mode", "synchronous", "foreign_keys")
        ]
    assert pragmas == ["wal", 2, 1]


def test_versions_are_numbered_and_numbers_not_given_twice(store: Store) -> None:
    assert list(store.add_version("one", new("1")).versions) == [1]
    adapter = store.add_version("one", new("2"))
    assert list(adapter.versions) == [1, 2]
    left = store.delete_version(adapter.newest)
    assert left is not None and list(left.versions) == [1]
    assert list(store.add_version("one", new("3")).versions) == [1, 3]


def test_everything_comes_back(tmp_path: Path, store: Store) -> None:
    version = store.add_version("one", new()).newest
    store.set_state(version, VersionState.READY)
    store.set_current(version)
    other = open_store(tmp_path)
    adapter = other.adapters()["one"]
    other.close()
    assert (adapter.name, adapter.current) == ("one", 1)
    assert adapter.newest == Version(
        name="one",
        version=1,
        content_id="a-111111111111",
        sha256="1" * 64,
        base="base",
        rank=8,
        target_modules=("q_proj", "v_proj"),
        size_bytes=5_000_000_000,
        created_at=version.created_at,
        state=VersionState.READY,
        reason="",
        metadata={"trained_on": "somewhere"},
    )


def test_delete_takes_the_versions_along(store: Store) -> None:
    store.add_version("one", new("1"))
    version = store.add_version("one", new("2")).newest
    store.delete("one")
    store.delete("one")
    assert store.adapters() == {}
    assert store.set_state(version, VersionState.READY) is None
    assert store.set_current(version) is None
    assert store.delete_version(version) is None


def test_the_last_version_takes_the_adapter_along(store: Store) -> None:
    version = store.add_version("one", new()).newest
    assert store.delete_version(version) is None
    assert store.adapters() == {}


def test_deleting_the_current_version_leaves_no_dangling_pointer(store: Store) -> None:
    store.add_version("one", new("1"))
    newest = store.add_version("one", new("2")).newest
    store.set_current(newest)
    left = store.delete_version(newest)
    assert left is not None and left.current is None


def test_snapshot_versions_grow_over_restarts(tmp_path: Path, store: Store) -> None:
    assert store.reserve_snapshot_versions(10) == 1
    assert store.reserve_snapshot_versions(10) == 11
    other = open_store(tmp_path)
    assert other.reserve_snapshot_versions(1) == 21
    other.close()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    with disks.small_disk(tmp_path / "disk", "256k") as disk:
        yield disk


def test_full_disk(small_disk: Path) -> None:
    store = open_store(small_disk)
    store.add_version("one", new())
    (small_disk / "filler").write_bytes(b"x" * 8192)
    with pytest.raises(StorageFull), (small_disk / "filler").open("ab", buffering=0) as filler:
        for _ in range(200):
            try:
                filler.write(b"x" * 4096)
            except OSError:
                break
        for number in range(200):
            store.add_version(f"adapter-{number}", new())
    (small_disk / "filler").unlink()
    assert "one" in store.adapters()
    store.add_version("after", new())
    store.close()


def test_postgresql_without_its_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "psycopg", None)
    with pytest.raises(ConfigError, match=r"tunegate\[postgres\]"):
        Store("postgresql://localhost/tunegate")


def test_database_that_cannot_be_opened(tmp_path: Path) -> None:
    with pytest.raises(StoreUnavailable, match="unable to open database file"):
        Store(f"sqlite:///{tmp_path / 'nowhere' / 'registry.db'}").migrate()


@pytest.mark.parametrize("url", ["nonsense", "oracle9://x/y"])
def test_urls_that_are_none(url: str) -> None:
    with pytest.raises(ConfigError, match="--database-url"):
        Store(url)


def test_a_pointers_moves_are_kept_in_order(store: Store) -> None:
    for digit in "123":
        last = store.add_version("one", new(digit), Cause("key-1", "uploaded"))
    assert last.coming is not None and (last.coming.version, last.coming.cause.who) == (3, "key-1")
    for number in (1, 2, 3, 3, 1):
        moved = store.set_current(last.versions[number], Cause("key-1", f"to {number}"), {"p": number / 4})
    assert moved is not None and (moved.current, moved.previous, moved.coming) == (1, 3, None)
    lines = store.history("one", 10)
    assert [(line.from_version, line.to_version) for line in lines] == [(3, 1), (2, 3), (1, 2), (None, 1)]
    assert (lines[0].cause, lines[0].figures) == (Cause("key-1", "to 1"), {"p": 0.25})
    assert lines[0].at > 1_700_000_000
    assert store.history("one", 1) == lines[:1]
    assert store.history("two", 10) == []


def test_a_name_is_not_on_its_way_to_what_failed(store: Store) -> None:
    first = store.add_version("one", new("1"), Cause("", "uploaded")).newest
    second = store.add_version("one", new("2"), Cause("", "uploaded")).newest
    failed = store.set_state(second, VersionState.FAILED, "refused")
    assert failed is not None and failed.coming is None
    assert failed.target is not None and failed.target[0] == first, "the only one that works"
    serves = store.set_current(first)
    again = store.set_state(second, VersionState.VALIDATED, "")  # sent again, without promotion
    assert serves is not None and again is not None and serves.target is None and again.target is None
    store.set_coming(second, Cause("", ""))
    other = store.set_state(first, VersionState.FAILED, "refused")
    assert other is not None and other.coming is not None


def test_canaries_and_aliases_come_back(tmp_path: Path, store: Store) -> None:
    store.add_version("one", new("1"))
    store.add_version("one", new("2"))
    canary = Canary(
        2, 5.0, Policy(min_requests=50), "key-1", 1_800_000_000, 2, {"one@v1": {"requests": 3}}, {"look": 2}
    )
    store.set_canary("one", canary, Event("canary started", 1, 2, Cause("key-1", "")))
    store.set_alias("prod", "one", None)
    store.set_alias("prod", "one", 2)
    store.set_alias("old", "one", 1)
    other = open_store(tmp_path)
    adapter = other.adapters()["one"]
    other.close()
    assert adapter.canary == canary
    assert adapter.aliases == {"old": 1, "prod": 2}
    left = store.delete_alias("old", "one")
    assert left is not None and left.aliases == {"prod": 2}


def test_nothing_points_to_a_version_that_is_gone(store: Store) -> None:
    store.add_version("one", new("1"))
    second = store.add_version("one", new("2"), Cause("", "")).newest
    store.set_canary("one", Canary(2, 5.0, Policy(), "", 0))
    store.set_alias("two", "one", 2)
    left = store.delete_version(second)
    assert left is not None and (left.coming, left.canary, left.aliases) == (None, None, {})
    for change in (store.set_current(second, Cause("", "")), store.set_coming(second, Cause("", ""))):
        assert change == left
    assert store.set_state(second, VersionState.FAILED, "late") == left


def test_an_adapter_takes_its_aliases_and_history_along(store: Store) -> None:
    version = store.add_version("one", new()).newest
    store.set_current(version, Cause("", ""))
    store.set_alias("two", "one", None)
    store.delete("one")
    store.add_version("one", new())
    assert store.history("one", 10) == []
    assert store.adapters()["one"].aliases == {}


def test_a_decision_on_what_has_changed_is_refused(store: Store) -> None:
    store.add_version("one", new("1"))
    second = store.add_version("one", new("2")).newest
    store.set_current(replace(second, version=1))
    seen = store.set_canary("one", Canary(2, 5.0, Policy(), "", 0))
    assert seen is not None and seen.canary is not None
    looked = store.set_canary("one", replace(seen.canary, looks=1), seen=seen)
    assert store.set_canary("one", seen.canary, seen=looked) is not None, "looks do not make it another trial"
    ended = store.set_canary("one", None)
    with pytest.raises(Conflict, match="meanwhile"):
        store.set_canary("one", seen.canary, seen=seen)
    with pytest.raises(Conflict, match="meanwhile"):
        store.set_current(second, seen=seen)
    assert store.adapters()["one"] == ended
    store.set_current(second)
    with pytest.raises(Conflict, match="meanwhile"):
        store.set_canary("one", Canary(2, 5.0, Policy(), "", 0))
    with pytest.raises(Conflict, match="meanwhile"):
        store.set_canary("one", Canary(9, 5.0, Policy(), "", 0))


def test_of_two_who_would_move_a_name_from_where_it_points_the_second_is_refused(store: Store) -> None:
    """Both versions have yet to be loaded."""
    store.add_version("one", new("1"))
    second = store.add_version("one", new("2")).newest
    seen = store.add_version("one", new("3"))
    coming = store.set_coming(second, Cause("key-1", "promoted"), seen)
    assert coming is not None and coming.coming is not None
    with pytest.raises(Conflict, match="meanwhile"):
        store.set_coming(seen.newest, Cause("key-2", "promoted"), seen)
    assert store.adapters()["one"] == coming


def test_an_alias_moves_in_one_step_and_names_what_is_there(store: Store) -> None:
    for name in ("one", "two"):
        store.add_version(name, new())
    store.set_alias("prod", "one", 1)
    moved = store.set_alias("prod", "two", None)
    assert [(name, adapter.aliases) for name, adapter in moved.items()] == [("one", {}), ("two", {"prod": None})]
    with pytest.raises(NotFound, match="one@v7"):
        store.set_alias("seventh", "one", 7)
    with pytest.raises(Conflict, match="is an adapter"):
        store.set_alias("two", "one", None)
    with pytest.raises(Conflict, match="an alias"):
        store.add_version("prod", new("3"))


def test_rows_that_name_nothing_are_left_out(tmp_path: Path, store: Store, caplog: pytest.LogCaptureFixture) -> None:
    store.add_version("one", new("1"))
    store.add_version("one", new("2"))
    store.set_canary("one", Canary(2, 5.0, Policy(), "", 0))
    store.set_alias("prod", "one", 2)
    with sqlite3.connect(tmp_path / "registry.db") as database:
        database.execute("DELETE FROM adapter_versions WHERE version = 2")
    adapter = store.adapters()["one"]
    assert (adapter.canary, adapter.aliases) == (None, {})
    assert "v2 is gone" in caplog.text and "prod" in caplog.text
