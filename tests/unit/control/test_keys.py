"""API keys: what relays are told, what is written down, and what the API shows of them."""

from __future__ import annotations

import hashlib
import logging
import re
import time
from pathlib import Path
from typing import Any

import httpx2
import pytest

from gateway.control import keys as module
from gateway.control.key_store import KeyStore
from gateway.control.keys import KeyRing, Terms, digest, period_start
from gateway.control.store import Store
from gateway.errors import Conflict, InvalidRequest, NotFound
from gateway.observe.usage import IN_FLIGHT, REQUESTS, ROW_CELLS, TOKENS, Usage
from gateway.scopes import ADMIN, SCOPES, needed
from gateway.snapshot import Key
from tests.unit.control.conftest import Start
from tests.unit.control.test_api import api, assert_error

ADMIN_TERMS = Terms(scopes=("admin",))


class Ring:
    """A key ring with its store and one relay's cells; `again` is another control process."""

    def __init__(self, folder: Path, configured: tuple[str, ...] = ()) -> None:
        self.folder = folder
        self.configured = configured
        self.store = Store(f"sqlite:///{folder / 'registry.db'}")
        self.store.migrate()
        self.changes = 0
        self.keys = KeyRing(KeyStore(self.store), folder, configured, self._changed)

    def _changed(self) -> None:
        self.changes += 1

    async def again(self) -> Ring:
        self.store.close()
        other = Ring(self.folder, self.configured)
        await other.keys.open()
        return other

    def entry(self, key: str) -> Key | None:
        return self.keys.published.get(hashlib.sha256(key.encode()).hexdigest())

    def use(self, row: int, requests: int, tokens: int, relay: int = 0) -> None:
        """As a relay would count."""
        usage = Usage(self.folder / f"relay-{relay}.usage")
        usage.cells[row * ROW_CELLS + REQUESTS] += requests
        usage.cells[row * ROW_CELLS + TOKENS] += tokens
        usage.close()


@pytest.fixture
async def ring(tmp_path: Path) -> Any:
    ring = Ring(tmp_path)
    await ring.keys.open()
    yield ring
    ring.store.close()


async def test_a_key_is_random_shown_once_and_kept_as_its_digest(ring: Ring, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    shown, key = await ring.keys.create("ops", ADMIN_TERMS)
    assert re.fullmatch(r"tg-[A-Za-z0-9_-]{43}", key)
    entry = ring.entry(key)
    assert entry is not None
    assert (entry.id, entry.scopes, entry.row) == (shown["id"], {"admin"}, 0)
    digest = hashlib.sha256(key.encode()).hexdigest()
    assert digest not in str(ring.keys.all()), "digests are nobody's business"
    assert key not in str(ring.keys.all()) + caplog.text + repr(ring.keys)
    for file in ring.folder.iterdir():
        assert key.encode() not in file.read_bytes(), file
    assert (await ring.again()).entry(key) == entry


async def test_access_is_open_until_there_is_a_key_and_the_first_one_can_make_others(ring: Ring) -> None:
    assert ring.keys.published == {}
    with pytest.raises(InvalidRequest, match="scope 'admin'"):
        await ring.keys.create("app", Terms(scopes=("infer",)))
    await ring.keys.create("ops", ADMIN_TERMS)
    await ring.keys.create("app", Terms(scopes=("infer",)))
    assert len(ring.keys.published) == 2


async def test_the_last_admin_stays(ring: Ring) -> None:
    shown, _ = await ring.keys.create("ops", ADMIN_TERMS)
    with pytest.raises(Conflict, match="last key"):
        await ring.keys.revoke("ops")
    with pytest.raises(Conflict, match="last key"):
        await ring.keys.change("ops", {"scopes": ("infer",)})
    await ring.keys.create("other", ADMIN_TERMS)
    assert (await ring.keys.revoke(shown["id"]))["state"] == "revoked"


async def test_a_revoked_key_is_refused_for_good_and_closes_access_still(tmp_path: Path) -> None:
    ring = Ring(tmp_path, ("configured",))
    await ring.keys.open()
    _, key = await ring.keys.create("app", Terms(scopes=("infer",)))
    await ring.keys.revoke("app")
    ring.keys.configure(())
    entry = ring.entry(key)
    assert entry is not None and entry.expires_at is not None and entry.expires_at <= time.time()
    assert ring.keys.published, "an empty table would open access to everyone"
    with pytest.raises(NotFound):
        ring.keys.show("app")
    shown, again = await ring.keys.create("app", ADMIN_TERMS)
    assert again != key
    assert ring.keys.show("app")["id"] == shown["id"]
    with pytest.raises(Conflict, match="revoked for good"):
        await ring.keys.rotate(entry.id, 0)
    ring.store.close()


async def test_names_of_living_keys_are_unique(ring: Ring) -> None:
    await ring.keys.create("ops", ADMIN_TERMS)
    with pytest.raises(Conflict, match="'ops' exists"):
        await ring.keys.create("ops", ADMIN_TERMS)


async def test_rotation_keeps_id_limits_and_use_and_lets_the_old_one_go_on_for_a_while(ring: Ring) -> None:
    shown, old = await ring.keys.create("ops", Terms(scopes=("admin",), requests_per_minute=5))
    ring.use(0, 3, 30)
    rotated, new = await ring.keys.rotate("ops", grace_s=60)
    assert (rotated["id"], rotated["requests_per_minute"]) == (shown["id"], 5)
    before, after = ring.entry(old), ring.entry(new)
    assert before is not None and after is not None
    assert (before.id, before.row) == (after.id, after.row)
    assert after.expires_at is None
    assert before.expires_at == pytest.approx(time.time() + 60, abs=5)
    _, newest = await ring.keys.rotate("ops", grace_s=0)
    assert ring.entry(old) is None
    ended = ring.entry(new)
    assert ended is not None and ended.expires_at is not None and ended.expires_at <= time.time()
    await ring.keys.fold()
    assert ring.keys.show("ops")["used"]["tokens"] == 30
    assert (await ring.again()).entry(newest) is not None


async def test_use_is_folded_into_the_store_once(ring: Ring) -> None:
    await ring.keys.create("ops", ADMIN_TERMS)
    ring.use(0, 2, 20)
    ring.use(0, 1, 5, relay=1)
    await ring.keys.fold()
    await ring.keys.fold()
    ring.use(0, 1, 1)
    again = await ring.again()  # a crash: nothing was folded at the end
    assert again.keys.show("ops")["used"] | {"last_at": 0} == {
        "requests": 4, "tokens": 26, "budget_tokens": 26, "last_at": 0,
    }  # fmt: skip


async def test_cells_that_were_begun_anew_lose_no_more_than_what_was_not_folded(ring: Ring) -> None:
    await ring.keys.create("ops", ADMIN_TERMS)
    ring.use(0, 5, 50)
    await ring.keys.fold()
    (ring.folder / "relay-0.usage").unlink()
    ring.use(0, 1, 10)
    await ring.keys.fold()
    assert ring.keys.show("ops")["used"]["tokens"] == 60


async def test_a_budget_is_where_the_relays_count_must_end(ring: Ring) -> None:
    ring.use(0, 9, 1000)  # of an earlier key of this row
    _, key = await ring.keys.create("ops", Terms(scopes=("admin",), token_budget=100))
    assert ring.entry(key).tokens_until == 1100  # type: ignore[union-attr]
    ring.use(0, 1, 60)
    changes = ring.changes
    await ring.keys.fold()
    assert ring.entry(key).tokens_until == 1100  # type: ignore[union-attr]
    ring.use(0, 1, 70)
    await ring.keys.fold()
    assert ring.changes == changes, "relays need not be told of what they count themselves"
    assert ring.keys.show("ops")["used"]["budget_tokens"] == 130


async def test_a_daily_budget_begins_anew(ring: Ring, monkeypatch: pytest.MonkeyPatch) -> None:
    terms = Terms(scopes=("admin",), token_budget=100, budget_period="day")
    _, key = await ring.keys.create("ops", terms)
    ring.use(0, 1, 130)
    await ring.keys.fold()
    assert ring.entry(key).tokens_until == 100  # type: ignore[union-attr]
    tomorrow = time.time() + 86_400
    monkeypatch.setattr(module.time, "time", lambda: tomorrow)
    await ring.keys.fold()
    assert ring.entry(key).tokens_until == 230  # type: ignore[union-attr]
    used = ring.keys.show("ops")["used"]
    assert (used["tokens"], used["budget_tokens"]) == (130, 0)


def test_periods_begin_at_midnight_utc() -> None:
    now = 1_795_330_000  # 2026-11-22 06:46:40 UTC
    assert [period_start(now, period) for period in ("total", "day", "month")] == [0, 1_795_305_600, 1_793_491_200]


async def test_rows_are_given_anew_the_oldest_first(ring: Ring, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.usage, "MAX_KEYS", 3)
    await ring.keys.create("ops", ADMIN_TERMS)
    await ring.keys.create("a", ADMIN_TERMS)
    await ring.keys.revoke("a")
    rows = [ring.entry((await ring.keys.create(name, ADMIN_TERMS))[1]).row for name in "bc"]  # type: ignore[union-attr]
    assert rows == [2, 1], "row 1 last: late answers may still be counted there"
    with pytest.raises(Conflict, match="3 keys"):
        await ring.keys.create("d", ADMIN_TERMS)


async def test_keys_of_the_configuration_open_everything_and_can_be_replaced(tmp_path: Path) -> None:
    ring = Ring(tmp_path, ("one",))
    await ring.keys.open()
    entry = ring.entry("one")
    assert entry is not None and entry.scopes == set(SCOPES) and entry.row is None
    ring.keys.configure(("two",))
    assert ring.entry("one") is None
    assert ring.entry("two") is not None
    ring.store.close()


async def test_a_relays_dead_requests_do_not_reach_control(ring: Ring) -> None:
    usage = Usage(ring.folder / "relay-0.usage")
    usage.cells[IN_FLIGHT] = 5
    usage.close()
    await ring.keys.create("ops", ADMIN_TERMS)
    assert ring.keys.show("ops")["used"]["requests"] == 0


class TestApi:
    async def test_a_keys_life(self, start: Start) -> None:
        async with api(start) as (world, client):
            answer = await client.post("/admin/keys", json={"name": "ops", "scopes": ["admin", "admin"]})
            assert answer.status_code == 201, answer.text
            made = answer.json()
            key = made.pop("key")
            shown = (await client.get("/admin/keys/ops")).json()
            assert shown == made
            assert shown["scopes"] == ["admin"]
            assert world.core.publisher.current is not None
            assert hashlib.sha256(key.encode()).hexdigest() in world.core.publisher.current.keys
            limits = {"requests_per_minute": 5, "tokens_per_minute": 6, "token_budget": 7, "budget_period": "day"}
            limits |= {"max_in_flight": 8, "priority": 9, "expires_in_s": 60}
            app = (await client.post("/admin/keys", json={"name": "app", **limits})).json()
            assert app["scopes"] == ["infer"]
            assert app["expires_at"] == pytest.approx(time.time() + 60, abs=5)
            changed = await client.patch(f"/admin/keys/{app['id']}", json={"requests_per_minute": None})
            assert (changed.json()["requests_per_minute"], changed.json()["tokens_per_minute"]) == (None, 6)
            rotated = (await client.post("/admin/keys/app/rotate", json={"grace_s": 10})).json()
            assert rotated["id"] == app["id"]
            assert rotated["key"] != app["key"]
            assert (await client.delete("/admin/keys/app")).json()["state"] == "revoked"
            listed = (await client.get("/admin/keys")).json()["data"]
            assert [(item["name"], item["state"]) for item in listed] == [("ops", "active"), ("app", "revoked")]
            assert not any("key" in item for item in listed)

    @pytest.mark.parametrize(
        "body, words",
        [
            ({}, "name"),
            ({"name": "x", "scopes": ["root"]}, "scopes are root; give one or more of infer"),
            ({"name": "x", "scopes": []}, "scopes are none"),
            ({"name": "x", "requests_per_minute": 0}, "requests_per_minute"),
            ({"name": "x", "rpm": 5}, "rpm"),
            ({"name": "x", "budget_period": "year"}, "budget_period"),
        ],
    )
    async def test_what_is_refused(self, start: Start, body: dict[str, Any], words: str) -> None:
        async with api(start) as (_, client):
            assert_error(await client.post("/admin/keys", json=body), 400, words)
            assert_error(await client.get("/admin/keys/none"), 404, "no key 'none'")


def test_every_route_needs_the_scope_that_is_written_here() -> None:
    """Add a new route here, with the scope that it is to need."""
    expected = {
        "infer": ["GET /v1/models", "GET /v1/models/x", "POST /v1/unheard/of", "GET /openapi.json"],
        "adapters": [
            "GET /v1/adapters", "POST /v1/adapters", "DELETE /v1/adapters/x", "DELETE /v1/models/x",
            "POST /v1/load_lora_adapter", "POST /v1/unload_lora_adapter", "DELETE /%761/models/x",
            "GET /v1/%61dapters",
        ],
        "train": ["POST /v1/fine_tuning/jobs", "GET /v1/files", "POST /v1/batches"],
        "metrics": ["GET /metrics"],
        "admin": [
            "GET /admin/keys", "POST /admin/reload", "GET /%61dmin/keys", "GET //v1/models", "GET /", "GET /docs",
            "GET http://x/v1/models",
        ],
    }  # fmt: skip
    for scope, requests in expected.items():
        for request in requests:
            method, path = request.encode().split()
            assert needed(method, path) == scope, request


async def test_no_route_of_control_is_reached_with_a_lesser_scope(start: Start) -> None:
    """By the path's first words, as people read them."""
    words = {"admin": "admin", "metrics": "metrics", "v1/adapters": "adapters", "v1/models": "infer"}
    words |= {"v1/load_lora_adapter": "adapters", "v1/unload_lora_adapter": "adapters"}
    words |= dict.fromkeys(
        ("v1/chat", "v1/completions", "v1/embeddings", "v1/responses", "tokenize", "detokenize"), "infer"
    )
    words |= {"v1/fine_tuning": "train", "v1/files": "train", "v1/batches": "train", "v1/uploads": "train"}
    async with api(start) as (_, client):
        transport: Any = client._transport
        assert isinstance(transport, httpx2.ASGITransport)
        paths = transport.app.openapi()["paths"]  # type: ignore[attr-defined]
        assert len(paths) > 10
        for path, methods in paths.items():
            if path in ("/health", "/ready"):
                continue  # the relay answers them before it asks for a key
            prefix = max((word for word in words if path.startswith(f"/{word}")), key=len, default="")
            for method in map(str.upper, methods):
                want = "adapters" if prefix == "v1/models" and method == "DELETE" else words.get(prefix)
                assert needed(method.encode(), path.encode()) == want, f"{method} {path}"
    assert ADMIN in SCOPES


async def test_what_is_lent_outlives_a_rotation(ring: Ring) -> None:
    shown, _ = await ring.keys.create("ops", ADMIN_TERMS)
    secret = ring.keys.lend(shown["id"])
    await ring.keys.rotate("ops", grace_s=0)
    entry = ring.entry(secret)
    assert entry is not None and entry.expires_at is None


async def test_what_is_lent_for_less_opens_less(ring: Ring) -> None:
    shown, _ = await ring.keys.create("ops", ADMIN_TERMS)
    whole = ring.keys.lend(shown["id"])
    part = ring.keys.lend(shown["id"], frozenset({"infer"}))
    narrow, wide = ring.entry(part), ring.entry(whole)
    assert narrow is not None and wide is not None
    assert narrow.scopes == {"infer"} and "admin" in wide.scopes and narrow.row == wide.row
    ring.keys.take_back(digest(part))
    assert ring.entry(part) is None and ring.entry(whole) is not None
    ring.keys.lend_again(digest(part), shown["id"], frozenset({"infer"}))
    assert ring.entry(part) is not None
    assert ring.keys.opens(shown["id"], "admin") and ring.keys.opens("", "admin")
    assert not ring.keys.opens("key-gone", "infer")


async def test_what_is_lent_gives_the_key_itself_no_more(ring: Ring) -> None:
    """A job's trainer may use adapters; the key that ordered the job may not, while it runs either."""
    await ring.keys.create("ops", ADMIN_TERMS)
    shown, _ = await ring.keys.create("trains", Terms(("train",)))
    ring.keys.lend(shown["id"], frozenset({"infer", "adapters"}))
    assert ring.keys.opens(shown["id"], "train") and not ring.keys.opens(shown["id"], "adapters")
