"""The registry in a database: SQLite beside the state, or PostgreSQL by URL. Blocking: call it from a thread."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import alembic.command
import alembic.config
import msgspec
from sqlalchemy import (
    JSON,
    BigInteger,
    Engine,
    ForeignKey,
    Text,
    UniqueConstraint,
    create_engine,
    delete,
    event,
    make_url,
    select,
)
from sqlalchemy.exc import ArgumentError, OperationalError
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, relationship

from gateway.config import ConfigError
from gateway.control.catalog import NO_CAUSE, Adapter, Canary, Cause, Coming, Event, Version, VersionState
from gateway.errors import Conflict, NotFound, StorageFull

_log = logging.getLogger(__name__)
_BUSY_TIMEOUT_S = 30
_SNAPSHOT = "snapshot"


class StoreUnavailable(Exception):
    """The database cannot be reached or opened now; the message says why."""


class _Base(DeclarativeBase):
    pass


class _AdapterRow(_Base):
    __tablename__ = "adapters"

    name: Mapped[str] = mapped_column(primary_key=True)
    current_version: Mapped[int | None]
    last_version: Mapped[int]  # numbers are not given twice
    created_at: Mapped[int]
    previous_version: Mapped[int | None]
    coming: Mapped[dict[str, Any] | None] = mapped_column(JSON(none_as_null=True))
    canary: Mapped[dict[str, Any] | None] = mapped_column(JSON(none_as_null=True))
    versions: Mapped[list[_VersionRow]] = relationship(
        order_by="_VersionRow.version", lazy="selectin", cascade="all, delete-orphan", passive_deletes=True
    )
    aliases: Mapped[list[_AliasRow]] = relationship(
        order_by="_AliasRow.alias", lazy="selectin", cascade="all, delete-orphan", passive_deletes=True
    )


class _VersionRow(_Base):
    __tablename__ = "adapter_versions"
    __table_args__ = (UniqueConstraint("adapter_name", "sha256"),)

    adapter_name: Mapped[str] = mapped_column(ForeignKey("adapters.name", ondelete="CASCADE"), primary_key=True)
    version: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    content_id: Mapped[str] = mapped_column(index=True)
    sha256: Mapped[str]
    base: Mapped[str] = mapped_column(Text)
    rank: Mapped[int]
    target_modules: Mapped[list[str]] = mapped_column(JSON)
    size_bytes: Mapped[int] = mapped_column(BigInteger)
    created_at: Mapped[int]
    state: Mapped[str]
    reason: Mapped[str] = mapped_column(Text)
    details: Mapped[dict[str, Any]] = mapped_column("metadata", JSON)


class _AliasRow(_Base):
    __tablename__ = "aliases"

    alias: Mapped[str] = mapped_column(primary_key=True)
    adapter_name: Mapped[str] = mapped_column(ForeignKey("adapters.name", ondelete="CASCADE"), index=True)
    version: Mapped[int | None]


class _EventRow(_Base):
    __tablename__ = "adapter_history"

    id: Mapped[int] = mapped_column(primary_key=True)
    adapter_name: Mapped[str] = mapped_column(ForeignKey("adapters.name", ondelete="CASCADE"), index=True)
    at: Mapped[int]
    kind: Mapped[str]
    from_version: Mapped[int | None]
    to_version: Mapped[int]
    who: Mapped[str] = mapped_column(Text)
    why: Mapped[str] = mapped_column(Text)
    figures: Mapped[dict[str, Any] | None] = mapped_column(JSON(none_as_null=True))


class _CounterRow(_Base):
    __tablename__ = "counters"

    name: Mapped[str] = mapped_column(primary_key=True)
    value: Mapped[int] = mapped_column(BigInteger)


@dataclass(frozen=True, slots=True)
class NewVersion:
    """A version to register; the store gives it its number."""

    content_id: str
    sha256: str
    base: str
    rank: int
    target_modules: tuple[str, ...]
    size_bytes: int
    metadata: dict[str, Any] = field(default_factory=dict)


class Store:
    """Adapters, versions and counters. Every method is one transaction, and raises StorageFull on a full disk."""

    def __init__(self, url: str) -> None:
        self._engine = _engine(url)

    def migrate(self) -> None:
        """Bring the schema up to date; nothing happens when it is. Raises StoreUnavailable, StorageFull."""
        config = alembic.config.Config()
        config.set_main_option("script_location", str(Path(__file__).with_name("migrations")))
        try:
            with _full_disk_is_an_error(), self._engine.begin() as connection:
                config.attributes["connection"] = connection
                alembic.command.upgrade(config, "head")
        except OperationalError as error:
            raise StoreUnavailable(f"the registry {self._engine.url!r} cannot be opened: {error.orig}") from error

    def close(self) -> None:
        """Give the connections back."""
        self._engine.dispose()

    def adapters(self) -> dict[str, Adapter]:
        """All adapters by name."""
        with self._session() as session:
            return {row.name: _adapter(row) for row in session.query(_AdapterRow).order_by(_AdapterRow.name)}

    def add_version(self, name: str, new: NewVersion, cause: Cause | None = None) -> Adapter:
        """Register a version, the adapter with it when the name is new.

        cause: of the pointer's move to it, once every replica has it; None leaves the pointer where it is. Raises
        Conflict where the name is an alias.
        """
        now = int(time.time())
        with self._session() as session:
            row = session.get(_AdapterRow, name)
            if row is None:
                if session.get(_AliasRow, name) is not None:
                    raise Conflict(f"{name!r} has become an alias meanwhile; delete the alias first", code="name_taken")
                row = _AdapterRow(
                    name=name, current_version=None, last_version=0, created_at=now, versions=[], aliases=[]
                )
                session.add(row)
            row.last_version += 1
            row.versions.append(
                _VersionRow(
                    version=row.last_version,
                    content_id=new.content_id,
                    sha256=new.sha256,
                    base=new.base,
                    rank=new.rank,
                    target_modules=list(new.target_modules),
                    size_bytes=new.size_bytes,
                    created_at=now,
                    state=VersionState.VALIDATED,
                    reason="",
                    details=new.metadata,
                )
            )
            if cause is not None:
                row.coming = msgspec.to_builtins(Coming(row.last_version, cause))
            session.flush()
            return _adapter(row)

    def set_state(self, version: Version, state: VersionState, reason: str = "") -> Adapter | None:
        """Record what is known of a version, if it is still there; None when the adapter is gone.

        The pointer is no longer to move to one that failed.
        """
        with self._session() as session:
            row = session.get(_VersionRow, (version.name, version.version))
            if row is not None:
                row.state, row.reason = state, reason
            adapter = session.get(_AdapterRow, version.name)
            if adapter is None:
                return None
            if state is VersionState.FAILED and adapter.coming and adapter.coming["version"] == version.version:
                adapter.coming = None
            return _adapter(adapter)

    def set_coming(self, version: Version, cause: Cause, seen: Adapter | None = None) -> Adapter | None:
        """The pointer is to move to this version when replicas have it. Returns None when the adapter is gone.

        seen: as in `set_current`.
        """
        with self._session() as session:
            row = session.get(_AdapterRow, version.name)
            if row is None or session.get(_VersionRow, (version.name, version.version)) is None:
                return None if row is None else _adapter(row)
            _check_unmoved(row, seen)
            row.coming = msgspec.to_builtins(Coming(version.version, cause))
            return _adapter(row)

    def set_current(
        self,
        version: Version,
        cause: Cause = NO_CAUSE,
        figures: Mapping[str, Any] | None = None,
        seen: Adapter | None = None,
    ) -> Adapter | None:
        """Point the name to this version and end its canary. figures: what decided. None: the adapter is gone.

        seen: what the decision rests on; raises Conflict where the name is routed otherwise by now.
        """
        with self._session() as session:
            row = session.get(_AdapterRow, version.name)
            if row is None or session.get(_VersionRow, (version.name, version.version)) is None:
                return None if row is None else _adapter(row)
            _check_unmoved(row, seen)
            if row.current_version != version.version:
                event = Event("moved", row.current_version, version.version, cause, 0, figures)
                session.add(_event(version.name, event))
                row.previous_version, row.current_version = row.current_version, version.version
            row.coming = row.canary = None
            session.flush()
            return _adapter(row)

    def set_canary(
        self, name: str, canary: Canary | None, event: Event | None = None, seen: Adapter | None = None
    ) -> Adapter | None:
        """Start, change or end a canary, and record why; None when the adapter is gone.

        seen: what the decision rests on; raises Conflict where the name is routed otherwise by now, or where the
        canary's version is gone or what the name points to.
        """
        with self._session() as session:
            row = session.get(_AdapterRow, name)
            if row is None:
                return None
            _check_unmoved(row, seen)
            if canary is not None and not _can_try(row, canary.version):
                raise Conflict(f"{name}@v{canary.version} was deleted or promoted meanwhile; look at {name!r} again")
            row.canary = None if canary is None else msgspec.to_builtins(canary)
            if event is not None:
                session.add(_event(name, event))
            session.flush()
            return _adapter(row)

    def set_alias(self, alias: str, name: str, version: int | None) -> dict[str, Adapter]:
        """Make another name for an adapter or one of its versions, taking it from the adapter that had it.

        Returns the adapters that changed, the one that has it now last. Raises NotFound where the adapter or version is
        gone, Conflict where an adapter has that name.
        """
        with self._session() as session:
            row = session.get(_AdapterRow, name)
            if row is None or not (version is None or _has(row, version)):
                gone = name if version is None else f"{name}@v{version}"
                raise NotFound(f"{gone} was deleted meanwhile; GET /v1/adapters lists what is there", param="version")
            if session.get(_AdapterRow, alias) is not None:
                raise Conflict(f"{alias!r} is an adapter; choose another name", code="name_taken")
            taken = session.get(_AliasRow, alias)
            owner = session.get(_AdapterRow, taken.adapter_name) if taken is not None else None
            if owner is not None:
                owner.aliases = [kept for kept in owner.aliases if kept.alias != alias]
                session.flush()
            row.aliases.append(_AliasRow(alias=alias, version=version))
            session.flush()
            before = {owner.name: _adapter(owner)} if owner is not None and owner is not row else {}
            return before | {name: _adapter(row)}

    def delete_alias(self, alias: str, name: str) -> Adapter | None:
        """Forget an alias of an adapter; unknown ones are fine. Returns the adapter, None when it is gone."""
        with self._session() as session:
            row = session.get(_AdapterRow, name)
            if row is None:
                return None
            row.aliases = [kept for kept in row.aliases if kept.alias != alias]
            session.flush()
            return _adapter(row)

    def history(self, name: str, limit: int) -> list[Event]:
        """What happened to a name's pointer and canaries, newest first, at most `limit` lines."""
        with self._session() as session:
            rows = session.scalars(
                select(_EventRow).where(_EventRow.adapter_name == name).order_by(_EventRow.id.desc()).limit(limit)
            )
            return [
                Event(row.kind, row.from_version, row.to_version, Cause(row.who, row.why), row.at, row.figures)
                for row in rows
            ]

    def delete(self, name: str) -> Adapter | None:
        """Forget an adapter with all its versions; unknown names are fine. Nothing is left of it: None."""
        with self._session() as session:
            session.execute(delete(_AdapterRow).where(_AdapterRow.name == name))
            return None

    def delete_version(self, version: Version) -> Adapter | None:
        """Forget one version, and the adapter with its last one. Returns what is left of the adapter."""
        with self._session() as session:
            row = session.get(_AdapterRow, version.name)
            if row is None:
                return None
            row.versions = [kept for kept in row.versions if kept.version != version.version]
            if row.current_version == version.version:
                row.current_version = None
            if row.previous_version == version.version:
                row.previous_version = None
            if row.coming is not None and row.coming["version"] == version.version:
                row.coming = None
            if row.canary is not None and row.canary["version"] == version.version:
                row.canary = None
            row.aliases = [kept for kept in row.aliases if kept.version != version.version]
            if row.versions:
                session.flush()
                return _adapter(row)
            session.delete(row)
            return None

    def reserve_snapshot_versions(self, count: int) -> int:
        """The first of `count` numbers that were never reserved before, over restarts too."""
        with self._session() as session:
            row = session.get(_CounterRow, _SNAPSHOT, with_for_update=True)
            if row is None:
                row = _CounterRow(name=_SNAPSHOT, value=1)
                session.add(row)
            first = row.value
            row.value = first + count
            return first

    def session(self) -> contextlib.AbstractContextManager[Session]:
        """One transaction, for tables that another module owns."""
        return self._session()

    @contextlib.contextmanager
    def _session(self) -> Iterator[Session]:
        with _full_disk_is_an_error(), Session(self._engine) as session, session.begin():
            yield session


def _engine(url: str) -> Engine:
    try:
        parsed = make_url(url)
        if parsed.drivername in ("postgresql", "postgres"):
            parsed = parsed.set(drivername="postgresql+psycopg")
        engine = create_engine(parsed, connect_args={"timeout": _BUSY_TIMEOUT_S} if _is_sqlite(parsed) else {})
    except ModuleNotFoundError as error:
        raise ConfigError(f"--database-url: {error}; for PostgreSQL install `tunegate[postgres]`") from error
    except ArgumentError as error:  # not with the URL: it may hold a password
        raise ConfigError(f"--database-url is no SQLAlchemy URL of SQLite or PostgreSQL: {error}") from error
    if _is_sqlite(parsed):
        event.listen(engine, "connect", _configure_sqlite)
    return engine


def _is_sqlite(url: Any) -> bool:
    return str(url.get_backend_name()) == "sqlite"


def _configure_sqlite(connection: Any, _: Any) -> None:
    for pragma in ("journal_mode=WAL", "foreign_keys=ON", "synchronous=FULL"):
        connection.execute(f"PRAGMA {pragma}")


@contextlib.contextmanager
def _full_disk_is_an_error() -> Iterator[None]:
    try:
        yield
    except OperationalError as error:
        if "disk is full" not in str(error.orig) and "No space left" not in str(error.orig):
            raise
        raise StorageFull("the registry's disk is full; nothing was kept. Free space and try again") from error


def _has(row: _AdapterRow, number: int) -> bool:
    return any(version.version == number for version in row.versions)


def _can_try(row: _AdapterRow, number: int) -> bool:
    return _has(row, number) and number != row.current_version


def _check_unmoved(row: _AdapterRow, seen: Adapter | None) -> None:
    if seen is not None and _adapter(row).routing != seen.routing:
        raise Conflict(
            f"{row.name!r} was promoted, rolled back or given another canary meanwhile; look at it again",
            code="version_moved",
        )


def _adapter(row: _AdapterRow) -> Adapter:
    # What names no version is left out: every reader goes by these, and a row must not be able to stop control.
    canary = msgspec.convert(row.canary, Canary) if row.canary is not None else None
    if canary is not None and not _can_try(row, canary.version):
        _log.error("the canary of %s is ignored: v%d is gone, or what the name points to", row.name, canary.version)
        canary = None
    aliases = {alias.alias: alias.version for alias in row.aliases if alias.version is None or _has(row, alias.version)}
    if len(aliases) < len(row.aliases):
        lost = ", ".join(alias.alias for alias in row.aliases if alias.alias not in aliases)
        _log.error("aliases of %s are ignored, their versions are gone: %s", row.name, lost)
    return Adapter(
        name=row.name,
        current=row.current_version,
        versions={version.version: _version(version) for version in row.versions},
        previous=row.previous_version,
        coming=msgspec.convert(row.coming, Coming) if row.coming is not None else None,
        canary=canary,
        aliases=aliases,
    )


def _event(name: str, event: Event) -> _EventRow:
    return _EventRow(
        adapter_name=name,
        at=int(time.time()),
        kind=event.kind,
        from_version=event.from_version,
        to_version=event.to_version,
        who=event.cause.who,
        why=event.cause.why,
        figures=dict(event.figures) if event.figures is not None else None,
    )


def _version(row: _VersionRow) -> Version:
    return Version(
        name=row.adapter_name,
        version=row.version,
        content_id=row.content_id,
        sha256=row.sha256,
        base=row.base,
        rank=row.rank,
        target_modules=tuple(row.target_modules),
        size_bytes=row.size_bytes,
        created_at=row.created_at,
        state=VersionState(row.state),
        reason=row.reason,
        metadata=row.details,
    )
