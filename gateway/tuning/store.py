"""Files, jobs, events and batches in the registry's database. Blocking: call it from a thread."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any, Protocol, TypeVar

import msgspec
from sqlalchemy import JSON, delete, select
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from gateway.control.store import Store
from gateway.errors import InvalidRequest
from gateway.tuning.records import Event


class Record(Protocol):
    """What is kept whole: a msgspec struct with these fields."""

    @property
    def id(self) -> str: ...

    @property
    def status(self) -> str: ...


Kept = TypeVar("Kept", bound=Record)


class _Base(DeclarativeBase):
    pass


class _ObjectRow(_Base):
    __tablename__ = "api_objects"

    number: Mapped[int] = mapped_column(primary_key=True)
    id: Mapped[str] = mapped_column(unique=True)
    kind: Mapped[str] = mapped_column(index=True)
    status: Mapped[str]
    record: Mapped[dict[str, Any]] = mapped_column(JSON)


class _EventRow(_Base):
    __tablename__ = "fine_tuning_events"

    number: Mapped[int] = mapped_column(primary_key=True)
    job_id: Mapped[str] = mapped_column(index=True)
    record: Mapped[dict[str, Any]] = mapped_column(JSON)


class Objects:
    """Records by id. Every method is one transaction; writes raise StorageFull on a full disk."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def put(self, record: Record, events: Sequence[Event] = ()) -> None:
        """Add a record or replace it; add lines to its story."""
        with self._store.session() as session:
            row = _row(session, record.id)
            if row is None:
                row = _ObjectRow(id=record.id, kind=type(record).__name__)
                session.add(row)
            row.status = str(record.status)
            row.record = msgspec.to_builtins(record)
            session.add_all(_EventRow(job_id=record.id, record=msgspec.to_builtins(event)) for event in events)

    def get(self, id: str, kind: type[Kept]) -> Kept | None:
        """The record with this id, if it is of that kind."""
        with self._store.session() as session:
            row = _row(session, id)
            return None if row is None or row.kind != kind.__name__ else msgspec.convert(row.record, kind)

    def delete(self, id: str) -> None:
        """Forget a record; unknown ids are fine."""
        with self._store.session() as session:
            session.execute(delete(_ObjectRow).where(_ObjectRow.id == id))

    def all(self, kind: type[Kept], statuses: Collection[str] | None = None) -> list[Kept]:
        """Every record of a kind, oldest first; only those with one of these statuses."""
        query = select(_ObjectRow).where(_ObjectRow.kind == kind.__name__).order_by(_ObjectRow.number)
        if statuses is not None:
            query = query.where(_ObjectRow.status.in_(statuses))
        with self._store.session() as session:
            return [msgspec.convert(row.record, kind) for row in session.scalars(query)]

    def page(
        self,
        kind: type[Kept],
        after: str | None,
        limit: int,
        keep: Callable[[Kept], bool] = lambda _: True,
        oldest_first: bool = False,
    ) -> tuple[list[Kept], bool]:
        """At most `limit` records behind the one with the id `after`, and whether there are more. Newest first.

        Raises InvalidRequest for an unknown `after`.
        """
        order = _ObjectRow.number.asc() if oldest_first else _ObjectRow.number.desc()
        query = select(_ObjectRow).where(_ObjectRow.kind == kind.__name__).order_by(order)
        found: list[Kept] = []
        with self._store.session() as session:
            if after is not None:
                last = _row(session, after)
                if last is None:
                    raise InvalidRequest(f"after is {after[:50]!r}, which is not there (any more)", param="after")
                beyond = _ObjectRow.number > last.number if oldest_first else _ObjectRow.number < last.number
                query = query.where(beyond)
            for row in session.scalars(query.execution_options(yield_per=200)):
                record = msgspec.convert(row.record, kind)
                if keep(record):
                    found.append(record)
                if len(found) > limit:
                    break
        return found[:limit], len(found) > limit

    def events(self, job_id: str, before: int | None, limit: int) -> tuple[list[Event], bool]:
        """At most `limit` lines of a job's story, newest first, older than number `before`; whether there are more."""
        query = select(_EventRow).where(_EventRow.job_id == job_id).order_by(_EventRow.number.desc()).limit(limit + 1)
        if before is not None:
            query = query.where(_EventRow.number < before)
        with self._store.session() as session:
            found = [msgspec.convert(row.record | {"number": row.number}, Event) for row in session.scalars(query)]
        return found[:limit], len(found) > limit


def _row(session: Session, id: str) -> _ObjectRow | None:
    return session.scalars(select(_ObjectRow).where(_ObjectRow.id == id)).one_or_none()
