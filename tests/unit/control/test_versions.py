"""Pointers, aliases and canaries over a core with scripted engines, by raw HTTP to control's application."""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

from gateway.control import app
from gateway.control.catalog import Cause
from gateway.errors import Conflict, StorageFull
from gateway.observe import series
from gateway.observe.cells import Cells
from tests.unit.control.conftest import Start, World, until

KEY = {"x-tunegate-key-id": "key-7"}


@contextlib.asynccontextmanager
async def api(start: Start, **kwargs: Any) -> AsyncIterator[tuple[World, httpx2.AsyncClient]]:
    async with start(**kwargs) as world:
        transport = httpx2.ASGITransport(app.create(world.service, [], world.estate), raise_app_exceptions=False)
        async with httpx2.AsyncClient(transport=transport, base_url="http://control", timeout=20) as client:
            yield world, client


async def post(client: httpx2.AsyncClient, path: str, **body: Any) -> dict[str, Any]:
    answer = await client.post(f"/v1/adapters/{path}", json=body, headers=KEY)
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


async def refused(client: httpx2.AsyncClient, status: int, words: str, path: str, **body: Any) -> dict[str, Any]:
    answer = await client.post(f"/v1/adapters/{path}", json=body)
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert words in error["message"], error
    return dict(error)


async def upload(world: World, client: httpx2.AsyncClient, name: str, seed: int, **fields: str) -> dict[str, Any]:
    files = [("file", file) for file in world.files(seed)]
    answer = await client.post("/v1/adapters", data={"name": name, **fields}, files=files, headers=KEY)
    assert answer.status_code in (200, 201), answer.text
    return dict(answer.json())


async def history(client: httpx2.AsyncClient, name: str) -> list[tuple[Any, ...]]:
    lines = (await client.get(f"/v1/adapters/{name}")).json()["history"]
    return [(line["event"], line["from"], line["to"], line["who"], line["why"]) for line in lines]


async def test_pointer_moves_and_is_written_down(start: Start) -> None:
    async with api(start) as (world, client):
        await upload(world, client, "tuned", 1)
        await upload(world, client, "tuned", 2)
        first, second = (world.core.registry.adapters["tuned"].versions[n].content_id for n in (1, 2))
        assert world.model("tuned").adapter == second
        back = await post(client, "tuned/rollback")
        assert (back["id"], back["current_version"], back["previous"]) == ("tuned@v1", 1, 2)
        assert world.model("tuned").adapter == first  # relays were told before the answer
        again = await post(client, "tuned/promote", version=2)
        assert (again["current_version"], again["coming"]) == (2, None)
        assert await history(client, "tuned") == [
            ("moved", 1, 2, "key-7", "promoted"),
            ("moved", 2, 1, "key-7", "rolled back"),
            ("moved", 1, 2, "key-7", "uploaded"),
            ("moved", None, 1, "key-7", "uploaded"),
        ]
    async with start() as world:
        assert world.core.registry.adapters["tuned"].current == 2
        assert world.core.registry.adapters["tuned"].previous == 1


async def test_rollback_stays_rolled_back(start: Start) -> None:
    """The newer version is ready everywhere, and must not be taken for one on its way up."""
    async with api(start) as (world, client):
        await upload(world, client, "tuned", 1)
        await upload(world, client, "tuned", 2)
        await post(client, "tuned/rollback")
        for _ in range(3):
            await world.core.published()
        assert world.core.registry.adapters["tuned"].current == 1


async def test_two_operators_cannot_undo_each_others_moves_unseen(start: Start) -> None:
    async with api(start) as (world, client):
        for seed in (1, 2, 3):
            await upload(world, client, "tuned", seed)
        assert (await post(client, "tuned/rollback", expected_version=3))["current_version"] == 2
        for action in ("tuned/rollback", "tuned/promote"):  # the other one saw v3 failing, too
            error = await refused(client, 409, "'tuned' points to tuned@v2", action, expected_version=3)
            assert (error["code"], error["param"]) == ("version_moved", "expected_version")
        await refused(client, 409, "points to tuned@v2", "tuned/canary", version=1, weight=5, expected_version=3)
        await post(client, "tuned/canary", version=1, weight=5, expected_version=2)
        await refused(client, 409, "tuned@v1 is tried", "tuned/canary", version=3, weight=5, expected_version=2)
        await refused(client, 409, "tuned@v1 is tried", "tuned/promote", version=3, expected_version=2)
        await post(client, "tuned/canary", version=1, weight=9, expected_version=2)
        assert (await post(client, "tuned/promote", expected_version=2))["current_version"] == 1
        await refused(client, 400, "expected_version", "tuned/promote", expected_version=0)
        assert len(await history(client, "tuned")) == 7  # what was refused changed nothing


async def test_of_two_rollbacks_at_the_same_time_one_is_refused(start: Start) -> None:
    """Done one after the other they would end where they began."""
    async with api(start) as (world, client):
        for seed in (1, 2):
            await upload(world, client, "tuned", seed)
        both = (world.service.versions.roll_back("tuned", who, 20.0) for who in ("key-1", "key-2"))
        done, refusal = await asyncio.gather(*both, return_exceptions=True)
        assert done is None
        assert isinstance(refusal, Conflict)
        assert refusal.code == "version_moved"
        assert world.core.registry.adapters["tuned"].current == 1


async def test_upload_without_promotion(start: Start) -> None:
    async with api(start) as (world, client):
        assert (await upload(world, client, "tuned", 1, promote="false"))["current_version"] == 1  # nothing else serves
        shown = await upload(world, client, "tuned", 2, promote="false")
        assert (shown["id"], shown["state"], shown["current_version"]) == ("tuned@v2", "ready", 1)
        again = await upload(world, client, "tuned", 2, promote="false")
        assert (again["id"], again["current_version"]) == ("tuned@v2", 1)
        assert world.model("tuned").adapter != world.model("tuned@v2").adapter
        assert (await post(client, "tuned/promote"))["current_version"] == 2
        files = [("file", file) for file in world.files(3)]
        answer = await client.post("/v1/adapters", data={"name": "x", "promote": "maybe"}, files=files)
        assert "true or false" in answer.json()["error"]["message"]


async def test_the_same_bytes_again_are_the_same_version_and_move_the_pointer_to_it(start: Start) -> None:
    async with api(start) as (world, client):
        for seed in (1, 2):
            await upload(world, client, "tuned", seed)
        again = await upload(world, client, "tuned", 1)
        assert (again["id"], again["current_version"], again["versions"]) == ("tuned@v1", 1, [1, 2])


async def test_promotion_waits_for_replicas(start: Start) -> None:
    async with api(start, replicas=2, capacity=2) as (world, client):
        for seed in (1, 2, 3):
            await upload(world, client, "tuned", seed)
        await until(lambda: world.service.adapter("tuned@v1")["state"] == "unloaded")
        shown = await post(client, "tuned/promote", version=1)
        assert (shown["state"], shown["current_version"]) == ("ready", 1)
        loading = world.core.registry.adapters["tuned"].versions[1].content_id
        assert all(replica.adapter_ready(loading) for replica in world.replicas)


async def test_a_version_that_is_ready_late_does_not_undo_a_promotion(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with api(start) as (world, client):
        for seed in (1, 2):
            await upload(world, client, "tuned", seed)
        seen = world.core.registry.adapters["tuned"]
        assert (await post(client, "tuned/promote", version=1))["current_version"] == 1
        monkeypatch.setattr(world.core, "_risen", lambda: [(seen, (seen.versions[2], Cause("", "uploaded")))])
        for _ in range(2):  # the second round begins when the first has moved what it moves
            await world.core.published()
        assert world.core.registry.adapters["tuned"].current == 1


async def test_deleting_one_version(start: Start) -> None:
    async with api(start) as (world, client):
        await upload(world, client, "tuned", 1)
        only = await client.delete("/v1/adapters/tuned@v1")
        assert (only.status_code, only.json()["error"]["type"]) == (409, "invalid_request_error")
        await upload(world, client, "tuned", 2)
        await upload(world, client, "tuned", 3)
        assert (await client.delete("/v1/adapters/tuned@v3")).status_code == 409
        assert (await client.delete("/v1/adapters/tuned@v9")).status_code == 404
        content_id = world.core.registry.adapters["tuned"].versions[2].content_id
        deleted = await client.delete("/v1/adapters/tuned@v2")
        assert deleted.json() == {"id": "tuned@v2", "object": "adapter", "deleted": True}
        await until(lambda: not (world.state / "adapters" / content_id).exists())
        assert (await client.get("/v1/adapters/tuned")).json()["versions"] == [1, 3]
        error = await refused(client, 409, "promote one of v1, v3", "tuned/rollback")
        assert error["code"] == "nothing_to_roll_back"
        assert (await upload(world, client, "tuned", 4))["version"] == 4  # numbers are not given twice


async def test_alias(start: Start) -> None:
    async with api(start) as (world, client):
        for seed in (1, 2):
            await upload(world, client, "tuned", seed)
        await upload(world, client, "other", 3)
        await post(client, "tuned/aliases", alias="prod")
        await post(client, "tuned/aliases", alias="old", version=1)
        shown = (await client.get("/v1/adapters/prod")).json()
        assert (shown["id"], shown["aliases"]) == ("tuned@v2", {"old": 1, "prod": None})
        assert world.model("prod").adapter == world.model("tuned@v2").adapter
        assert world.model("old").adapter == world.model("tuned@v1").adapter
        listed = {model["id"]: model["root"] for model in (await client.get("/v1/models")).json()["data"]}
        assert (listed["prod"], listed["old"]) == ("tuned@v2", "tuned@v1")

        await post(client, "tuned/rollback")
        assert world.model("prod").adapter == world.model("tuned@v1").adapter

        await post(client, "other/aliases", alias="prod")
        assert world.model("prod").adapter == world.model("other").adapter
        assert (await client.get("/v1/adapters/tuned")).json()["aliases"] == {"old": 1}

        await post(client, "tuned/promote", version=2)
        pinned = await client.delete("/v1/adapters/tuned@v1")
        assert (pinned.status_code, "old" in pinned.json()["error"]["message"]) == (409, True)
        assert (await client.delete("/v1/adapters/tuned/aliases/old")).json()["aliases"] == {}
        assert (await client.delete("/v1/adapters/tuned/aliases/old")).status_code == 404
        await client.delete("/v1/adapters/other")
        assert "prod" not in world.core.publisher.current.models  # type: ignore[union-attr]
    async with start() as world:
        assert world.core.registry.aliases == {}


async def test_aliases_hide_nothing_and_make_no_circles(start: Start) -> None:
    async with api(start) as (world, client):
        await upload(world, client, "tuned", 1)
        await upload(world, client, "other", 2)
        await post(client, "tuned/aliases", alias="prod")
        await refused(client, 409, "is an adapter", "tuned/aliases", alias="other")
        await refused(client, 400, "base model's", "tuned/aliases", alias="base")
        await refused(client, 400, "cannot name", "tuned/aliases", alias="tuned@v1")
        await refused(client, 400, "is an alias; name the adapter it belongs to, 'tuned'", "prod/aliases", alias="more")
        await refused(client, 400, "is an alias", "prod/aliases", alias="prod")
        await refused(client, 404, "has no version 4; it has v1", "tuned/aliases", alias="new", version=4)
        await refused(client, 404, "no adapter 'nobody'", "nobody/aliases", alias="new")
        await refused(client, 400, "is an alias", "prod/rollback")
        answer = await client.post("/v1/adapters", data={"name": "prod"}, files=[("file", f) for f in world.files(3)])
        assert (answer.status_code, answer.json()["error"]["code"]) == (409, "name_taken")
        deleted = await client.delete("/v1/adapters/prod")
        assert (deleted.status_code, "aliases/prod forgets it" in deleted.text) == (400, True)


# Canaries


async def two_versions(world: World, client: httpx2.AsyncClient) -> None:
    await upload(world, client, "tuned", 1)
    await upload(world, client, "tuned", 2, promote="false")


REFUSED: list[tuple[int, str, dict[str, Any]]] = [
    (404, "has no version 9; it has v1, v2", {"version": 9, "weight": 5}),
    (400, "weight is 0;", {"version": 2, "weight": 0}),
    (400, "weight is 100;", {"version": 2, "weight": 100}),
    (400, "weight is -1;", {"version": 2, "weight": -1}),
    (400, "weight", {"version": 2, "weight": "much"}),
    (400, "version", {"weight": 5}),
    (409, "is what 'tuned' points to", {"version": 1, "weight": 5}),
    (400, "min_requests", {"version": 2, "weight": 5, "min_requests": 1}),
    (400, "max_slowdown", {"version": 2, "weight": 5, "max_slowdown": 0.5}),
    (400, "command", {"version": 2, "weight": 5, "command": "rm -r /"}),
]


async def test_canaries_that_cannot_be(start: Start) -> None:
    async with api(start) as (world, client):
        await two_versions(world, client)
        for status, words, body in REFUSED:
            await refused(client, status, words, "tuned/canary", **body)
        await refused(client, 404, "no adapter 'nobody'", "nobody/canary", version=2, weight=5)
        json_body = {"content": b'{"version": 2, "weight": NaN}', "headers": {"content-type": "application/json"}}
        assert (await client.post("/v1/adapters/tuned/canary", **json_body)).status_code == 400  # type: ignore[arg-type]
        assert world.core.registry.adapters["tuned"].canary is None


async def test_canary_by_hand(start: Start) -> None:
    async with api(start) as (world, client):
        await two_versions(world, client)
        shown = await post(client, "tuned/canary", version=2, weight=5, automatic=False)
        assert (shown["current_version"], shown["canary"]["version"], shown["canary"]["weight"]) == (1, 2, 5.0)
        split = world.model("tuned").canary
        assert (split.share, split.stay, split.model.id) == (0.05, "tuned@v1", "tuned@v2")
        assert split.model.adapter == world.model("tuned@v2").adapter
        await post(client, "tuned/canary", version=2, weight=20, automatic=False)
        assert world.model("tuned").canary.share == 0.2
        deleted = await client.delete("/v1/adapters/tuned@v2")
        assert (deleted.status_code, "is a canary" in deleted.text) == (409, True)
        ended = await post(client, "tuned/rollback")
        assert (ended["canary"], ended["current_version"]) == (None, 1)
        assert world.model("tuned").canary is None
        await post(client, "tuned/canary", version=2, weight=50, automatic=False)
        assert (await post(client, "tuned/promote"))["current_version"] == 2
        assert world.model("tuned").canary is None
        assert [line[:3] for line in await history(client, "tuned")] == [
            ("moved", 1, 2),
            ("canary started", 1, 2),
            ("canary ended", 2, 1),
            ("canary changed", 1, 2),
            ("canary started", 1, 2),
            ("moved", None, 1),
        ]


class Traffic:
    """What a relay would count of two versions."""

    def __init__(self, world: World) -> None:
        self._cells = Cells(world.run_dir / "relay-0.cells")

    def count(self, label: str, requests: int, errors: int = 0, ttft_us: int = 50_000) -> None:
        values = self._cells.values
        for status, count in (("200", requests - errors), ("502", errors), ("400", 7)):
            values[self._cells.series(series.REQUESTS, "/v1/chat/completions", label, status)] += count
        for metric in (series.TTFT, series.DURATION):
            first = self._cells.series(metric, label)
            values[first + next(i for i, bound in enumerate(metric.bounds) if bound >= ttft_us)] += requests
            values[first + metric.cells - 1] += requests * ttft_us


async def test_canary_is_promoted_by_its_figures(start: Start) -> None:
    async with api(start, canary_s=0.01) as (world, client):
        await two_versions(world, client)
        traffic = Traffic(world)
        traffic.count("tuned@v2", 5000, 5000)  # of an earlier canary: not counted
        await post(client, "tuned/canary", version=2, weight=5)
        traffic.count("tuned@v1", 2000)
        traffic.count("tuned@v2", 70)
        await until(lambda: (canary := world.core.registry.adapters["tuned"].canary) and canary.looks == 1)
        shown = (await client.get("/v1/adapters/tuned")).json()["canary"]
        assert (shown["looks"], shown["reason"]) == (1, "no worse so far, by 70 of 500 requests")
        assert (shown["now"], shown["figures"]["canary"]["requests"]) == ("70 of 126 requests for the next look", 70)
        traffic.count("tuned@v2", 450)
        await until(lambda: world.core.registry.adapters["tuned"].current == 2)
        moved = (await client.get("/v1/adapters/tuned")).json()["history"][0]
        assert (moved["event"], moved["who"]) == ("moved", "canary")
        assert moved["why"] == "no worse by 520 requests of each version"
        assert moved["figures"]["canary"]["requests"] == 520
        assert moved["figures"]["baseline"]["ttft_ms"]["mean"] == 50.0


@pytest.mark.parametrize(
    ("fault", "why"),
    [({"errors": 20}, "20 of 70 requests failed"), ({"ttft_us": 400_000}, "mean ttft is 8.00 times")],
)
async def test_canary_is_rolled_back_by_its_figures(start: Start, fault: dict[str, int], why: str) -> None:
    async with api(start, canary_s=0.01) as (world, client):
        await two_versions(world, client)
        traffic = Traffic(world)
        await post(client, "tuned/canary", version=2, weight=5)
        traffic.count("tuned@v1", 1000)
        traffic.count("tuned@v2", 70, **fault)
        await until(lambda: world.core.registry.adapters["tuned"].canary is None)
        ended = (await client.get("/v1/adapters/tuned")).json()["history"][0]
        assert (ended["event"], ended["from"], ended["to"], ended["who"]) == ("canary ended", 2, 1, "canary")
        assert why in ended["why"]
        assert world.core.registry.adapters["tuned"].current == 1


async def test_canary_by_hand_is_left_alone(start: Start) -> None:
    async with api(start, canary_s=0.01) as (world, client):
        await two_versions(world, client)
        await post(client, "tuned/canary", version=2, weight=5, automatic=False)
        traffic = Traffic(world)
        traffic.count("tuned@v1", 1000)
        traffic.count("tuned@v2", 1000, errors=900)
        shown = (await client.get("/v1/adapters/tuned")).json()["canary"]
        assert "900 of 1000 requests failed" in shown["now"]
        assert world.core.registry.adapters["tuned"].canary is not None


def score_command(folder: Path, code: str) -> tuple[str, ...]:
    script = folder / "score.py"
    script.write_text(code)
    return (sys.executable, str(script))


@pytest.mark.parametrize(
    ("code", "current", "why"),
    [
        ("import sys; print(len(sys.argv) - 4)", 2, "score 0"),
        ("import json, sys; print(json.dumps({'score': -0.5, 'asked': sys.argv[1:]}))", 1, "score -0.5"),
    ],
)
async def test_the_operators_score_has_the_last_word(
    start: Start, tmp_path: Path, code: str, current: int, why: str
) -> None:
    async with api(start, canary_s=0.01, score=score_command(tmp_path, code)) as (world, client):
        await two_versions(world, client)
        traffic = Traffic(world)
        await post(client, "tuned/canary", version=2, weight=5)
        traffic.count("tuned@v1", 9000)
        traffic.count("tuned@v2", 520)
        await until(lambda: world.core.registry.adapters["tuned"].canary is None)
        assert world.core.registry.adapters["tuned"].current == current
        line = (await client.get("/v1/adapters/tuned")).json()["history"][0]
        assert line["why"].endswith(why), line
        if current == 1:
            assert line["figures"]["score"]["asked"] == ["tuned@v1", "tuned@v2", "http://gateway"]


async def test_without_a_score_nothing_is_promoted(start: Start, tmp_path: Path) -> None:
    command = score_command(tmp_path, "import sys; sys.exit('no data')")
    async with api(start, canary_s=0.01, score=command) as (world, client):
        await two_versions(world, client)
        traffic = Traffic(world)
        await post(client, "tuned/canary", version=2, weight=5)
        traffic.count("tuned@v1", 9000)
        traffic.count("tuned@v2", 520)
        await until(lambda: (canary := world.core.registry.adapters["tuned"].canary) and canary.reason)
        canary = world.core.registry.adapters["tuned"].canary
        assert canary is not None and "ended with status 1: 'no data'" in canary.reason
        assert world.core.registry.adapters["tuned"].current == 1


async def test_a_canary_outlives_a_restart_of_control(start: Start) -> None:
    async with api(start) as (world, client):
        await two_versions(world, client)
        await post(client, "tuned/canary", version=2, weight=5)
        before = world.core.registry.adapters["tuned"].canary
    async with start() as world:
        assert world.core.registry.adapters["tuned"].canary == before
        assert world.model("tuned").canary.share == 0.05
        await world.core.registry.promote(world.core.registry.adapters["tuned"].versions[2], Cause("", "test"))
        assert json.dumps(world.service.adapter("tuned")["canary"]) == "null"


async def test_a_version_deleted_while_its_canary_starts(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    async with api(start) as (world, client):
        for seed in (1, 2):
            await upload(world, client, "tuned", seed)
        await post(client, "tuned/rollback")
        counts = world.core.rollouts.counts

        async def slow(name: str, versions: tuple[int, ...]) -> Any:
            assert (await client.delete("/v1/adapters/tuned@v2")).status_code == 200
            return await counts(name, versions)

        monkeypatch.setattr(world.core.rollouts, "counts", slow)
        await refused(client, 409, "meanwhile", "tuned/canary", version=2, weight=5)
        await world.core.published()
        assert world.model("tuned").canary is None


async def test_an_alias_is_never_nowhere(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    async with api(start) as (world, client):
        for seed, name in enumerate(("one", "two"), 1):
            await upload(world, client, name, seed)
        await post(client, "one/aliases", alias="prod")
        seen, change = [], world.core.publisher.change

        async def watched(delta: Any) -> None:
            await change(delta)
            seen.append("prod" in world.core.publisher.current.models)  # type: ignore[union-attr]  # published above

        monkeypatch.setattr(world.core.publisher, "change", watched)
        await post(client, "two/aliases", alias="prod")
        assert seen and all(seen)
        assert world.model("prod").adapter == world.model("two").adapter


async def test_what_could_not_be_numbered_is_published_later(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    async with api(start) as (world, client):
        await upload(world, client, "tuned", 1)
        monkeypatch.setattr("gateway.control.core._STORE_RETRY_S", 0.01)
        number, failures = world.core.registry.next_snapshot_version, [StorageFull("full"), StorageFull("full")]

        async def failing() -> int:
            if failures:
                raise failures.pop()
            return await number()

        world.core._number = None
        monkeypatch.setattr(world.core.registry, "next_snapshot_version", failing)
        await post(client, "tuned/aliases", alias="prod")
        assert not failures
        assert world.model("prod").adapter == world.model("tuned").adapter  # told before the answer


async def test_pins_go_with_their_adapter(start: Start) -> None:
    async with api(start) as (world, client):
        await upload(world, client, "tuned", 1)
        for pin in ("tuned", "tuned@v1", "other"):
            await world.core.pins.put(pin, None)
        assert (await client.delete("/v1/adapters/tuned")).status_code == 200
        assert list(world.core.pins.all) == ["other"]


async def test_a_body_that_is_too_large(start: Start) -> None:
    async def endless() -> AsyncIterator[bytes]:
        for _ in range(30):
            yield b" " * 100_000

    async with api(start) as (_, client):
        answer = await client.post("/v1/adapters/tuned/promote", content=endless())
        assert (answer.status_code, answer.json()["error"]["type"]) == (413, "invalid_request_error")
