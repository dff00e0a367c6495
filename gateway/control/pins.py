"""Adapters that an operator keeps loaded, in the registry's database and in memory."""

from __future__ import annotations

import asyncio

from sqlalchemy import delete, select
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from gateway.control.store import Store


class _Base(DeclarativeBase):
    pass


class _PinRow(_Base):
    __tablename__ = "adapter_pins"

    name: Mapped[str] = mapped_column(primary_key=True)
    replicas: Mapped[int | None]


class Pins:
    """Name, alias or `name@vN` -> on how many replicas it is kept loaded; None: on all."""

    def __init__(self, store: Store) -> None:
        self.all: dict[str, int | None] = {}
        self._store = store

    async def open(self) -> None:
        """Read them."""
        self.all = await asyncio.to_thread(self._read)

    async def put(self, name: str, replicas: int | None) -> None:
        """Pin a name, for good."""
        await asyncio.to_thread(self._write, name, replicas)
        self.all[name] = replicas

    async def drop(self, name: str) -> None:
        """Unpin a name; unknown ones are fine."""
        await asyncio.to_thread(self._delete, name)
        self.all.pop(name, None)

    def _read(self) -> dict[str, int | None]:
        with self._store.session() as session:
            return {row.name: row.replicas for row in session.scalars(select(_PinRow))}

    def _write(self, name: str, replicas: int | None) -> None:
        with self._store.session() as session:
            session.merge(_PinRow(name=name, replicas=replicas))

    def _delete(self, name: str) -> None:
        with self._store.session() as session:
            session.execute(delete(_PinRow).where(_PinRow.name == name))
