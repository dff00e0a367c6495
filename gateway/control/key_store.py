"""API keys in the registry's database, by their digests alone. Blocking: call it from a thread."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass

from sqlalchemy import JSON, BigInteger
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from gateway.control.store import Store
from gateway.scopes import Period


@dataclass(frozen=True, slots=True)
class ApiKey:
    """All that is known of one key. Times are seconds since the epoch; a limit of None is none."""

    id: str
    name: str
    digest: str  # SHA-256 hex
    scopes: tuple[str, ...]
    row: int  # of the relays' usage files
    created_at: int
    previous_digest: str | None = None  # of before the last rotation
    previous_until: int | None = None
    expires_at: int | None = None
    revoked_at: int | None = None
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    token_budget: int | None = None
    budget_period: Period = "total"
    max_in_flight: int | None = None
    priority: int = 0
    requests: int = 0  # ever
    tokens: int = 0  # ever, prompt and answer together
    spent_tokens: int = 0  # of the budget
    period_start: int = 0  # of the budget; 0 for `total`
    last_used_at: int | None = None
    counted_requests: int = 0  # what the relays' cells said when the above was brought up to date
    counted_tokens: int = 0


class _Base(DeclarativeBase):
    pass


class _KeyRow(_Base):
    __tablename__ = "api_keys"

    id: Mapped[str] = mapped_column(primary_key=True)
    name: Mapped[str]
    digest: Mapped[str]
    scopes: Mapped[list[str]] = mapped_column(JSON)
    row: Mapped[int] = mapped_column("usage_row")
    created_at: Mapped[int] = mapped_column(BigInteger)
    previous_digest: Mapped[str | None]
    previous_until: Mapped[int | None] = mapped_column(BigInteger)
    expires_at: Mapped[int | None] = mapped_column(BigInteger)
    revoked_at: Mapped[int | None] = mapped_column(BigInteger)
    requests_per_minute: Mapped[int | None] = mapped_column(BigInteger)
    tokens_per_minute: Mapped[int | None] = mapped_column(BigInteger)
    token_budget: Mapped[int | None] = mapped_column(BigInteger)
    budget_period: Mapped[str]
    max_in_flight: Mapped[int | None]
    priority: Mapped[int]
    requests: Mapped[int] = mapped_column(BigInteger)
    tokens: Mapped[int] = mapped_column(BigInteger)
    spent_tokens: Mapped[int] = mapped_column(BigInteger)
    period_start: Mapped[int] = mapped_column(BigInteger)
    last_used_at: Mapped[int | None] = mapped_column(BigInteger)
    counted_requests: Mapped[int] = mapped_column(BigInteger)
    counted_tokens: Mapped[int] = mapped_column(BigInteger)


_FIELDS = [field.name for field in dataclasses.fields(ApiKey)]


class KeyStore:
    """Reads and writes whole records."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def load(self) -> list[ApiKey]:
        """Every key ever made, oldest first."""
        with self._store.session() as session:
            rows = session.query(_KeyRow).order_by(_KeyRow.created_at, _KeyRow.id)
            return [_key(row) for row in rows]

    def put(self, keys: Iterable[ApiKey]) -> None:
        """Write these records, in one transaction. Raises StorageFull."""
        with self._store.session() as session:
            for key in keys:
                session.merge(_KeyRow(**(_values(key) | {"scopes": list(key.scopes)})))


def _values(record: ApiKey | _KeyRow) -> dict[str, object]:
    return {name: getattr(record, name) for name in _FIELDS}


def _key(row: _KeyRow) -> ApiKey:
    return ApiKey(**(_values(row) | {"scopes": tuple(row.scopes)}))  # type: ignore[arg-type]  # columns mirror fields
