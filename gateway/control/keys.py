"""API keys: made, shown once, rotated and revoked; what relays are told of them; and what they have used.

A key is 256 random bits, and kept as its SHA-256. Slow salted hashes are for what people choose: nobody can try 2^256
keys, however fast the hash is, and it is worked out for every request.

What a key used is counted by the relays in their cells. `fold` writes the difference to the store every few seconds;
after a crash the cells are still there, and the next fold catches up.
"""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import logging
import secrets
import time
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
from sqlalchemy.exc import SQLAlchemyError

from gateway.control.key_store import ApiKey, KeyStore
from gateway.errors import Conflict, InvalidRequest, NotFound, StorageFull
from gateway.observe import usage
from gateway.scopes import ADMIN, SCOPES, Period
from gateway.snapshot import Key

_log = logging.getLogger(__name__)
_FOLD_EVERY_S = 5.0
_PREFIX = "tg-"
_RECOVERY = "or restart with --api-key, which opens everything"


@dataclass(frozen=True, slots=True)
class Terms:
    """What a key may do. A limit of None is none."""

    scopes: tuple[str, ...]
    expires_at: int | None = None
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    token_budget: int | None = None
    budget_period: Period = "total"
    max_in_flight: int | None = None
    priority: int = 0


@dataclass(frozen=True, slots=True)
class Loan:
    """What a lent secret stands for."""

    key_id: str
    scopes: frozenset[str] | None  # that it opens; None: those of the key


class KeyRing:
    """The keys of one gateway: those of its configuration, and those of its store."""

    def __init__(
        self, store: KeyStore, run_dir: Path, configured: Iterable[str], on_change: Callable[[], None]
    ) -> None:
        """configured: keys that open everything, without limits. on_change: called when relays must be told."""
        self._store = store
        self._run_dir = run_dir
        self._on_change = on_change
        self._keys: dict[str, ApiKey] = {}
        self._lock = asyncio.Lock()
        self._lent: dict[str, Loan] = {}  # by their digests
        self._configured = configured_keys(configured)
        self.published: dict[str, Key] = dict(self._configured)  # digest -> what it opens; empty: open access

    def __repr__(self) -> str:
        return f"<KeyRing {len(self._configured)} configured, {len(self._keys)} stored>"

    async def open(self) -> None:
        """Load the keys. Call it after the store's migration."""
        self._keys = {key.id: key for key in await asyncio.to_thread(self._store.load)}
        await self.fold()

    async def run(self) -> None:
        """Keep the records up to date until cancelled."""
        while True:
            await asyncio.sleep(_FOLD_EVERY_S)
            try:
                await self.fold()
            except (StorageFull, SQLAlchemyError) as error:
                _log.error("what keys used cannot be written, trying again in %g s: %s", _FOLD_EVERY_S, error)

    def would_open(self, configured: Collection[str]) -> bool:
        """Whether these keys of the configuration would open access that is closed now, to everybody."""
        return bool(self.published) and not configured and not self._keys

    def configure(self, configured: Iterable[str]) -> None:
        """Replace the keys of the configuration."""
        self._configured = configured_keys(configured)
        self._publish()

    def lend(self, key_id: str, scopes: frozenset[str] | None = None) -> str:
        """A secret that stands for this key and counts as its use, for work that it ordered.

        scopes: what it opens, instead of what the key does.
        Good as long as this process lives, the key is good, and no other is lent for the same; relays know it at the
        next publication.
        """
        secret = _PREFIX + secrets.token_urlsafe(32)
        self.lend_again(digest(secret), key_id, scopes)
        return secret

    def lend_again(self, own: str, key_id: str, scopes: frozenset[str] | None = None) -> None:
        """As `lend`, for a secret that an earlier process lent. own: its digest."""
        loan = Loan(key_id, scopes)
        self._lent = {other: lent for other, lent in self._lent.items() if lent != loan} | {own: loan}
        self._publish()

    def take_back(self, own: str) -> None:
        """Let a lent secret open nothing any more. own: its digest."""
        if self._lent.pop(own, None) is not None:
            self._publish()

    def opens(self, key_id: str, scope: str) -> bool:
        """Whether a key itself has a scope, whatever was lent for it. key_id: "" where access is open."""
        own = [entry for secret, entry in self.published.items() if secret not in self._lent]
        return not key_id or any(entry.id == key_id and scope in entry.scopes for entry in own)

    def all(self) -> list[dict[str, Any]]:
        """Every stored key as the API shows it, oldest first."""
        return [show(key) for key in self._keys.values()]

    def show(self, reference: str) -> dict[str, Any]:
        """One key, by its id or the name of a living one. Raises NotFound."""
        return show(self._find(reference))

    async def create(self, name: str, terms: Terms) -> tuple[dict[str, Any], str]:
        """A new key as the API shows it, and the key itself, which is shown this once.

        Raises InvalidRequest, Conflict, StorageFull.
        """
        _check_scopes(terms.scopes)
        async with self._lock:
            if not self.published and ADMIN not in terms.scopes:
                raise InvalidRequest(
                    f"access is open until the first key is made, and closed from then on: give this one the scope "
                    f"{ADMIN!r}, so that there is one to make others with",
                    param="scopes",
                )
            if any(key.name == name for key in self._keys.values() if _alive(key)):
                raise Conflict(f"a key named {name!r} exists; revoke it first, rotate it, or choose another name")
            secret, row = _PREFIX + secrets.token_urlsafe(32), self._free_row()
            requests, tokens = (await asyncio.to_thread(usage.totals, self._run_dir, [row]))[row]
            now = int(time.time())
            key = ApiKey(
                id=f"key-{secrets.token_hex(4)}",
                name=name,
                digest=digest(secret),
                row=row,
                created_at=now,
                period_start=period_start(now, terms.budget_period),
                counted_requests=requests,
                counted_tokens=tokens,
                **dataclasses.asdict(terms),
            )
            await self._write([key])
            return show(key), secret

    async def change(self, reference: str, changes: dict[str, Any]) -> dict[str, Any]:
        """Give a key other terms. changes: fields of Terms. Raises NotFound, InvalidRequest, StorageFull."""
        _check_scopes(changes.get("scopes", (ADMIN,)))
        async with self._lock:
            key = self._living(reference)
            changed = dataclasses.replace(key, **changes)
            if changed.budget_period != key.budget_period:
                start = period_start(int(time.time()), changed.budget_period)
                changed = dataclasses.replace(changed, period_start=start)
            if ADMIN in key.scopes and ADMIN not in changed.scopes:
                self._refuse_last_admin(key)
            await self._write([changed])
            return show(changed)

    async def rotate(self, reference: str, grace_s: int) -> tuple[dict[str, Any], str]:
        """Another secret for the same key; the one before stays good for `grace_s`. Raises NotFound, StorageFull."""
        async with self._lock:
            key, secret = self._living(reference), _PREFIX + secrets.token_urlsafe(32)
            until = int(time.time()) + grace_s
            key = dataclasses.replace(key, digest=digest(secret), previous_digest=key.digest, previous_until=until)
            await self._write([key])
            return show(key), secret

    async def revoke(self, reference: str) -> dict[str, Any]:
        """Refuse a key from now on; its record stays. Raises NotFound, Conflict, StorageFull."""
        async with self._lock:
            key = self._living(reference)
            self._refuse_last_admin(key)
            revoked = dataclasses.replace(key, revoked_at=int(time.time()))
            await self._write([revoked])
            return show(revoked)

    async def fold(self) -> None:
        """Write down what was used since the last time, and begin new budget periods."""
        async with self._lock:
            rows = {key.row for key in self._keys.values() if key.revoked_at is None}
            counted = await asyncio.to_thread(usage.totals, self._run_dir, rows)
            now = int(time.time())
            folded = [_folded(key, *counted[key.row], now) for key in self._keys.values() if key.revoked_at is None]
            changed = [key for key in folded if key != self._keys[key.id]]
            await self._write(changed)

    async def _write(self, keys: list[ApiKey]) -> None:
        if keys:
            await asyncio.to_thread(self._store.put, keys)
            self._keys |= {key.id: key for key in keys}
        self._publish()

    def _publish(self) -> None:
        entries = dict(self._configured)
        for key in self._keys.values():
            entries |= _entries(key)
        by_id = {entry.id: entry for entry in self._configured.values()}
        by_id |= {key.id: entries[key.digest] for key in self._keys.values()}  # not the one before, which ends
        entries |= {own: _lent(by_id[loan.key_id], loan) for own, loan in self._lent.items() if loan.key_id in by_id}
        if entries != self.published:
            self.published = entries
            self._on_change()

    def _free_row(self) -> int:
        """One that no living key has, the longest after the last given: late answers still count on the old ones."""
        taken = {key.row for key in self._keys.values() if _alive(key)}
        last = next(reversed(self._keys.values())).row if self._keys else -1
        for step in range(1, usage.MAX_KEYS + 1):
            row = (last + step) % usage.MAX_KEYS
            if row not in taken:
                return row
        raise Conflict(f"there are {usage.MAX_KEYS} keys, the most that can be; revoke some")

    def _find(self, reference: str) -> ApiKey:
        key = self._keys.get(reference)
        for other in self._keys.values():
            if key is None and other.name == reference and _alive(other):
                key = other
        if key is None:
            raise NotFound(f"no key {reference[:100]!r}; GET /admin/keys (`gateway keys list`) shows them", param="id")
        return key

    def _living(self, reference: str) -> ApiKey:
        key = self._find(reference)
        if key.revoked_at is not None:
            raise Conflict(f"the key {key.id} ({key.name}) is revoked for good; make another one")
        return key

    def _refuse_last_admin(self, key: ApiKey) -> None:
        others = (other for other in self._keys.values() if other.id != key.id and _alive(other))
        if ADMIN in key.scopes and not self._configured and not any(ADMIN in other.scopes for other in others):
            raise Conflict(
                f"{key.id} ({key.name}) is the last key with the scope {ADMIN!r}: make another one first, {_RECOVERY}"
            )


def digest(key: str) -> str:
    """The only form in which a key is kept."""
    return hashlib.sha256(key.encode()).hexdigest()


def configured_keys(keys: Iterable[str]) -> dict[str, Key]:
    """Digest -> entry of keys that the configuration gives: all scopes, no limits."""
    digests = [digest(key) for key in keys]
    return {own: Key(f"key-{own[:8]}", frozenset(SCOPES)) for own in digests}


def period_start(now: int, period: Period) -> int:
    """When the present budget period began: midnight UTC, of the first of the month; 0 for `total`."""
    if period == "total":
        return 0
    midnight = datetime.fromtimestamp(now, UTC).replace(hour=0, minute=0, second=0, microsecond=0)
    return int((midnight.replace(day=1) if period == "month" else midnight).timestamp())


def show(key: ApiKey) -> dict[str, Any]:
    """A key as the API shows it, without its digests."""
    shown = {
        name: getattr(key, name)
        for name in (
            "id", "name", "created_at", "expires_at", "revoked_at", "requests_per_minute", "tokens_per_minute",
            "token_budget", "budget_period", "max_in_flight", "priority",
        )
    }  # fmt: skip
    state = "revoked" if key.revoked_at is not None else "active" if _alive(key) else "expired"
    used = {"requests": key.requests, "tokens": key.tokens, "budget_tokens": key.spent_tokens}
    return {
        "object": "api_key",
        **shown,
        "scopes": list(key.scopes),
        "state": state,
        "previous_until": key.previous_until,
        "used": used | {"last_at": key.last_used_at},
    }


def _entries(key: ApiKey) -> dict[str, Key]:
    """What relays are told of a key. A revoked one stays, as expired: it must not open access again by being gone."""
    ends = [time_s for time_s in (key.expires_at, key.revoked_at) if time_s is not None]
    until = None
    if key.token_budget is not None:
        until = key.counted_tokens + key.token_budget - key.spent_tokens  # the same after every fold
    entry = Key(
        id=key.id,
        scopes=frozenset(key.scopes),
        row=key.row if key.revoked_at is None else None,
        expires_at=min(ends, default=None),
        requests_per_minute=key.requests_per_minute,
        tokens_per_minute=key.tokens_per_minute,
        tokens_until=until,
        max_in_flight=key.max_in_flight,
        priority=key.priority,
    )
    entries = {key.digest: entry}
    if key.previous_digest is not None and key.previous_until is not None:
        ends.append(key.previous_until)
        entries[key.previous_digest] = msgspec.structs.replace(entry, expires_at=min(ends))
    return entries


def _lent(key: Key, loan: Loan) -> Key:
    return key if loan.scopes is None else msgspec.structs.replace(key, scopes=loan.scopes)


def _folded(key: ApiKey, requests: int, tokens: int, now: int) -> ApiKey:
    """The record after the relays' cells were read. Cells below what was counted were begun anew."""
    more_requests = requests - (key.counted_requests if requests >= key.counted_requests else 0)
    more_tokens = tokens - (key.counted_tokens if tokens >= key.counted_tokens else 0)
    start = period_start(now, key.budget_period)
    spent = key.spent_tokens if start == key.period_start else 0
    return dataclasses.replace(
        key,
        requests=key.requests + more_requests,
        tokens=key.tokens + more_tokens,
        spent_tokens=spent + more_tokens,
        period_start=start,
        last_used_at=now if more_requests or more_tokens else key.last_used_at,
        counted_requests=requests,
        counted_tokens=tokens,
    )


def _alive(key: ApiKey) -> bool:
    return key.revoked_at is None and (key.expires_at is None or key.expires_at > time.time())


def _check_scopes(scopes: Iterable[str]) -> None:
    given = list(scopes)
    unknown = [scope for scope in given if scope not in SCOPES]
    if unknown or not given:
        known = "; ".join(f"{scope}: {what}" for scope, what in SCOPES.items())
        raise InvalidRequest(f"scopes are {', '.join(given) or 'none'}; give one or more of {known}", param="scopes")
