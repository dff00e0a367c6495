"""The routes that are not inference, over a core with scripted engines."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
import uvicorn

from gateway.adapters.storage import AdapterStorage
from gateway.control import app
from tests.support.archives import tar_of, zip_of
from tests.unit.control.conftest import Start, World, until


@contextlib.asynccontextmanager
async def api(start: Start, **kwargs: Any) -> AsyncIterator[tuple[World, httpx2.AsyncClient]]:
    async with start(**kwargs) as world:
        (world.state / "import").mkdir(exist_ok=True)
        transport = httpx2.ASGITransport(
            app.create(world.service, [world.state / "import"], world.estate), raise_app_exceptions=False
        )
        async with httpx2.AsyncClient(transport=transport, base_url="http://control", timeout=20) as client:
            yield world, client


def multipart(files: list[tuple[str, bytes]]) -> list[tuple[str, tuple[str, bytes]]]:
    return [("file", file) for file in files]


def assert_error(answer: httpx2.Response, status: int, words: str = "", **fields: Any) -> dict[str, Any]:
    """The answer is OpenAI's error object, with all four keys."""
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert words in error["message"], error["message"]
    assert {key: error[key] for key in fields} == fields
    return dict(error)


def left(world: World) -> list[Path]:
    return [path for name in ("staging", "adapters") for path in (world.state / name).rglob("*")]


@pytest.mark.parametrize("form", ["files", "zip", "tar.gz"])
async def test_upload(start: Start, form: str) -> None:
    async with api(start) as (world, client):
        files = world.files()
        packed = {"zip": zip_of, "tar.gz": tar_of}
        sent = files if form == "files" else [(f"a.{form}", packed[form](files))]
        answer = await client.post("/v1/adapters", data={"name": "pirate"}, files=multipart(sent))
        assert answer.status_code == 201, answer.text
        shown = answer.json()
        assert shown.pop("created_at") > 1_700_000_000
        assert len(shown.pop("sha256")) == 64
        assert shown.pop("bytes") > 1000
        assert shown == {
            "id": "pirate@v1",
            "object": "adapter",
            "name": "pirate",
            "version": 1,
            "current": True,
            "current_version": 1,
            "previous": None,
            "coming": None,
            "canary": None,
            "aliases": {},
            "versions": [1],
            "base": "base",
            "rank": 8,
            "target_modules": ["k_proj", "o_proj", "q_proj", "v_proj"],
            "state": "ready",
            "reason": None,
            "replicas": [{"id": "r0", "state": "ready", "reason": None}],
            "metadata": {"gate": "none", "trained_on": "base"},
        }
        again = await client.post("/v1/adapters", data={"name": "pirate"}, files=multipart(sent))
        assert (again.status_code, again.json()["id"]) == (200, "pirate@v1")
        assert not list((world.state / "staging").iterdir())


async def test_list_show_delete(start: Start) -> None:
    async with api(start) as (world, client):
        await world.upload("pirate", seed=1)
        await world.upload("pirate", seed=2)
        await world.upload("robot", seed=3)
        listed = (await client.get("/v1/adapters")).json()
        assert listed["object"] == "list"
        assert [adapter["id"] for adapter in listed["data"]] == ["pirate@v2", "robot@v1"]
        assert (await client.get("/v1/adapters/pirate")).json()["versions"] == [1, 2]
        assert (await client.get("/v1/adapters/pirate@v1")).json()["current"] is False
        deleted = await client.delete("/v1/adapters/pirate")
        assert deleted.json() == {"id": "pirate", "object": "adapter", "deleted": True}
        assert_error(await client.get("/v1/adapters/pirate"), 404, "'pirate'", param="name")
        assert_error(await client.delete("/v1/adapters/pirate"), 404, "'pirate'", code="model_not_found")
        assert [adapter["name"] for adapter in (await client.get("/v1/adapters")).json()["data"]] == ["robot"]


async def test_models(start: Start) -> None:
    async with api(start) as (world, client):
        await world.upload("pirate")
        base, adapter = (await client.get("/v1/models")).json()["data"]
        assert base == {
            "id": "base",
            "object": "model",
            "created": 1,
            "owned_by": "tunegate",
            "root": "base",
            "parent": None,
            "max_model_len": 2048,
        }
        assert adapter == base | {
            "id": "pirate",
            "created": adapter["created"],
            "root": "pirate@v1",
            "parent": "base",
        }
        assert (await client.get("/v1/models/base")).json() == base
        assert (await client.get("/v1/models/pirate")).json() == adapter
        assert (await client.get("/v1/models/pirate@v1")).json() == adapter | {"id": "pirate@v1"}
        assert_error(await client.get("/v1/models/org%2Fmodel"), 404, "`org/model`", code="model_not_found")
        assert_error(await client.delete("/v1/models/base"), 400, "base model")
        assert_error(await client.delete("/v1/models/pirate@v1"), 409, "is the only version")
        assert (await client.delete("/v1/models/pirate")).json() == {"id": "pirate", "object": "model", "deleted": True}
        assert [model["id"] for model in (await client.get("/v1/models")).json()["data"]] == ["base"]


@pytest.mark.parametrize(
    ("data", "words", "param"),
    [
        ({}, "cannot name an adapter", "name"),
        ({"name": "a/b"}, "'a/b'", "name"),
        ({"name": "base"}, "is the base model's", "name"),
        ({"name": "x", "base": "llama"}, "'llama' is not served here", "base"),
        ({"name": "x", "wait_s": "soon"}, "wait_s is 'soon'", "wait_s"),
        ({"name": "x", "wait_s": "nan"}, "wait_s", "wait_s"),
    ],
)
async def test_bad_fields(start: Start, data: dict[str, str], words: str, param: str) -> None:
    async with api(start) as (world, client):
        answer = await client.post("/v1/adapters", data=data, files=multipart(world.files()))
        assert_error(answer, 400, words, type="invalid_request_error", param=param)
        assert left(world) == []


async def test_bad_files_leave_nothing(start: Start) -> None:
    async with api(start) as (world, client):
        evil = zip_of([*world.files(), ("../evil", b"x")])
        answer = await client.post("/v1/adapters", data={"name": "x"}, files=multipart([("a.zip", evil)]))
        assert_error(answer, 400, "leads out", code="path_traversal", param="file")
        nothing = await client.post("/v1/adapters", data={"name": "x"}, files={"other": (None, "field")})
        assert_error(nothing, 400, "holds no file", code="no_file")
        assert left(world) == []
        assert world.core.registry.adapters == {}


@pytest.mark.parametrize(
    ("content_type", "body", "words"),
    [
        ("application/json", b"{}", "multipart/form-data"),
        ("multipart/form-data", b"x", "multipart/form-data"),
        ("multipart/form-data; boundary=b", b"nonsense", "damaged"),
        (
            "multipart/form-data; boundary=b",
            b'--b\r\nContent-Disposition: form-data; name="name"\r\n\r\nx',
            "last boundary",
        ),
        ("multipart/form-data; boundary=b", b"--b\r\nContent-Type: text/plain\r\n\r\nx\r\n--b--\r\n", "no name"),
        (
            "multipart/form-data; boundary=b",
            b'--b\r\nContent-Disposition: form-data; name="name"\r\n\r\n' + b"x" * 5000 + b"\r\n--b--\r\n",
            "longer than 4096 bytes",
        ),
        (
            "multipart/form-data; boundary=b",
            b'--b\r\nContent-Disposition: form-data; name="a"\r\n\r\n\r\n' * 70 + b"--b--\r\n",
            "more than 64 parts",
        ),
    ],
)
async def test_bodies_that_are_no_upload(start: Start, content_type: str, body: bytes, words: str) -> None:
    async with api(start) as (world, client):
        answer = await client.post("/v1/adapters", content=body, headers={"content-type": content_type})
        assert_error(answer, 400, words)
        assert left(world) == []


async def test_full_disk_while_uploading(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    async with api(start) as (world, client):

        def full(*_: Any) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(os, "fsync", full)
        answer = await client.post("/v1/adapters", data={"name": "x"}, files=multipart(world.files()))
        monkeypatch.undo()
        assert_error(answer, 507, "disk", type="server_error")
        assert answer.headers["x-should-retry"] == "false"
        assert left(world) == []
        answer = await client.post("/v1/adapters", data={"name": "x"}, files=multipart(world.files()))
        assert answer.status_code == 201


async def test_engine_that_refuses_is_quoted(start: Start) -> None:
    async with api(start) as (world, client):
        world.script.rejects = "vLLM does not like it."
        answer = await client.post("/v1/adapters", data={"name": "x"}, files=multipart(world.files()))
        assert_error(answer, 400, "vLLM does not like it.", code="adapter_refused")
        await until(lambda: left(world) == [])


async def test_upload_that_does_not_wait(start: Start) -> None:
    async with api(start) as (world, client):
        world.script.hangs_loading = True
        data = {"name": "x", "wait_s": "0"}
        answer = await client.post("/v1/adapters", data=data, files=multipart(world.files()))
        assert (answer.status_code, answer.json()["state"]) == (201, "loading")


async def test_upload_before_any_replica_is_ready(start: Start) -> None:
    async with api(start, wait=False, script=lambda world: setattr(world.script, "never_ready", True)) as (
        world,
        client,
    ):
        data = {"name": "x", "wait_s": "0.05"}
        answer = (await client.post("/v1/adapters", data=data, files=multipart(world.files()))).json()
        assert (answer["state"], answer["reason"]) == ("validated", "no replica is ready yet")
        assert answer["replicas"][0]["state"] == "unloaded"
        world.script.never_ready = False
        await until(lambda: world.service.adapter("x")["state"] == "ready")


async def test_gateway_without_adapters(start: Start) -> None:
    async with api(start) as (world, client):
        world.service.policy = type(world.service.policy)("base", world.base_path, 0, 16, 1_000_000)
        answer = await client.post("/v1/adapters", data={"name": "x"}, files=multipart(world.files()))
        assert_error(answer, 400, "--adapter-slots", code="adapters_off")


async def test_errors_of_routes(start: Start) -> None:
    async with api(start) as (_, client):
        assert_error(await client.get("/nothing/here"), 404, "GET /nothing/here", type="invalid_request_error")
        wrong = await client.put("/v1/adapters")
        assert_error(wrong, 405, "PUT /v1/adapters")
        assert "POST" in wrong.headers["allow"] or "GET" in wrong.headers["allow"]
        answer = await client.post("/v1/load_lora_adapter", json={"lora_name": "x"})
        assert_error(answer, 400, "Field required", param="lora_path")
        answer = await client.post("/v1/load_lora_adapter", content=b"{", headers={"content-type": "application/json"})
        assert_error(answer, 400, "JSON")


async def test_defect_of_ours(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    async with api(start) as (world, client):
        monkeypatch.setattr(world.service, "models", lambda: 1 / 0)
        assert_error(await client.get("/v1/models"), 500, "defect", type="server_error")


async def test_vllms_own_routes(start: Start) -> None:
    async with api(start) as (world, client):
        folder = world.state / "import" / "pirate"
        folder.mkdir()
        for name, contents in world.files():
            (folder / name).write_bytes(contents)
        body = {"lora_name": "pirate", "lora_path": str(folder)}
        loaded = await client.post("/v1/load_lora_adapter", json=body)
        assert (loaded.status_code, loaded.text) == (200, "Success: LoRA adapter 'pirate' added successfully.")
        assert world.service.adapter("pirate")["state"] == "ready"
        assert sorted(path.name for path in folder.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
        assert_error(await client.post("/v1/load_lora_adapter", json=body), 400, "already been loaded")
        for name, contents in world.files(seed=2):
            (folder / name).write_bytes(contents)
        again = body | {"lora_path": "pirate", "load_inplace": True}
        assert (await client.post("/v1/load_lora_adapter", json=again)).status_code == 200
        assert world.service.adapter("pirate")["version"] == 2
        unload = {"lora_name": "pirate"}
        unloaded = await client.post("/v1/unload_lora_adapter", json=unload)
        assert (unloaded.status_code, unloaded.text) == (200, "Success: LoRA adapter 'pirate' removed successfully.")
        assert_error(await client.post("/v1/unload_lora_adapter", json=unload), 404, "cannot be found")


async def test_load_reads_inside_of_its_roots_only(start: Start, tmp_path: Path) -> None:
    async with api(start) as (world, client):
        outside = tmp_path / "outside"
        outside.mkdir()
        for name, contents in world.files():
            (outside / name).write_bytes(contents)
        (world.state / "import" / "link").symlink_to(outside)
        half = world.state / "import" / "half"
        half.mkdir()
        (half / "adapter_config.json").symlink_to(outside / "adapter_config.json")
        for path in (str(outside), "../../outside", "link", "half", f"{world.state}/import/../../outside"):
            answer = await client.post("/v1/load_lora_adapter", json={"lora_name": "x", "lora_path": path})
            assert_error(answer, 400, "--adapter-root", code="path_not_allowed", param="lora_path")
        answer = await client.post("/v1/load_lora_adapter", json={"lora_name": "x", "lora_path": "nothing"})
        assert_error(answer, 404, "not a directory", param="lora_path")
        answer = await client.post("/v1/load_lora_adapter", json={"lora_name": "x", "lora_path": "a\0b"})
        assert_error(answer, 400, "NUL", param="lora_path")
        assert left(world) == []


async def test_admin(start: Start) -> None:
    async with api(start, replicas=2) as (world, client):
        listed = (await client.get("/admin/replicas")).json()["data"]
        assert [(r["id"], r["state"], r["backend"], r["restarts"]) for r in listed] == [
            ("r0", "ready", "vllm", 0),
            ("r1", "ready", "vllm", 0),
        ]
        assert "api_key" not in str(listed) and "key" not in str(listed)
        assert (await client.post("/admin/replicas/r0/drain")).json()["state"] == "draining"
        assert world.model("base").engine_models == {"r1": "base"}
        assert world.estate.running.drained == (0,)
        assert (await client.post("/admin/replicas/r0/resume")).json()["state"] == "ready"
        assert world.estate.running.drained == ()
        assert len(world.model("base").engine_models) == 2
        assert_error(await client.post("/admin/replicas/r7/drain"), 404, "r0, r1")


async def test_metrics(start: Start) -> None:
    async with api(start, replicas=2, first_backoff_s=30, last_backoff_s=30) as (world, client):
        await world.upload("pirate")
        world.hosts[1].engine.die()
        await until(lambda: world.replicas[1].state == "unhealthy")
        answer = await client.get("/metrics")
        assert answer.headers["content-type"].startswith("text/plain")
        lines = set(answer.text.splitlines())
        assert {
            'tunegate_engine_up{replica="r0"} 1.0',
            'tunegate_engine_up{replica="r1"} 0.0',
            'tunegate_replica_state{replica="r1",state="unhealthy"} 1.0',
            'tunegate_replica_state{replica="r0",state="unhealthy"} 0.0',
            'tunegate_adapters{state="ready"} 1.0',
            'tunegate_adapters{state="failed"} 0.0',
            'tunegate_replica_adapters{replica="r0",state="ready"} 1.0',
        } <= lines


@contextlib.asynccontextmanager
async def served(world: World, tmp_path: Path) -> AsyncIterator[httpx2.AsyncClient]:
    """The application on a real Unix socket, as control runs it."""
    server = uvicorn.Server(
        uvicorn.Config(app.create(world.service, [tmp_path], world.estate), lifespan="off", log_config=None)
    )
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "api.sock"))
        listener.listen()
        task = asyncio.create_task(server._serve([listener]))
        transport = httpx2.AsyncHTTPTransport(uds=str(tmp_path / "api.sock"))
        async with httpx2.AsyncClient(transport=transport, base_url="http://control", timeout=20) as client:
            yield client
        server.should_exit = True
        await task


HEAD = b'--b\r\nContent-Disposition: form-data; name="file"; filename="a.zip"\r\n\r\n'


@pytest.mark.parametrize("declared", [True, False])
async def test_too_large_is_said_at_once_and_the_rest_is_read(start: Start, tmp_path: Path, declared: bool) -> None:
    """The refusal arrives although the client is still sending, and the client is not cut off while it sends."""
    pieces = [HEAD, *[b"x" * 100_000] * 90]
    async with start() as world, served(world, tmp_path):
        reader, writer = await asyncio.open_unix_connection(tmp_path / "api.sock")
        framing = f"content-length: {sum(map(len, pieces))}" if declared else "transfer-encoding: chunked"
        writer.write(f"POST /v1/adapters HTTP/1.1\r\nhost: x\r\n{framing}\r\n".encode())
        writer.write(b"content-type: multipart/form-data; boundary=b\r\nconnection: close\r\n\r\n")

        async def send(some: list[bytes]) -> None:
            for piece in some:
                writer.write(piece if declared else b"%x\r\n%b\r\n" % (len(piece), piece))
                await writer.drain()

        async with asyncio.timeout(10):
            await send(pieces[:40])
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            body = await reader.readuntil(b"}}")
            assert "413" in head.splitlines()[0]
            assert b"1 MB, the limit (--max-adapter-mb)" in body
            await send(pieces[40:])
            if not declared:
                writer.write(b"0\r\n\r\n")
                await writer.drain()
            assert await reader.read() == b""
        writer.close()
        assert left(world) == []


JSON_ROUTES = ("/v1/load_lora_adapter", "/v1/adapters/x/promote", "/admin/keys", "/admin/backend")


@pytest.mark.parametrize("path", JSON_ROUTES)
@pytest.mark.parametrize("declared", [True, False])
async def test_multipart_is_refused_unread_where_json_is_due(
    start: Start, tmp_path: Path, path: str, declared: bool
) -> None:
    """By the head alone, and the client is not cut off while it sends the rest."""
    async with start() as world, served(world, tmp_path):
        reader, writer = await asyncio.open_unix_connection(tmp_path / "api.sock")
        framing = "content-length: 9000000" if declared else "transfer-encoding: chunked"
        kind = "content-type:  Multipart/Form-Data; boundary=b\r\nconnection: close"
        writer.write(f"POST {path} HTTP/1.1\r\nhost: x\r\n{framing}\r\n{kind}\r\n\r\n".encode())
        async with asyncio.timeout(10):
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            body = (await reader.readuntil(b"}}")).decode()
            assert "415" in head.splitlines()[0]
            assert "'Multipart/Form-Data; boundary=b'" in body and f"POST {path} takes application/json" in body
            assert '"type":"invalid_request_error"' in body
            for _ in range(90):
                writer.write(b"x" * 100_000 if declared else b"186a0\r\n%b\r\n" % (b"x" * 100_000))
                await writer.drain()
            writer.write(b"" if declared else b"0\r\n\r\n")
            await reader.read()
        writer.close()


async def test_every_json_route_has_the_limit(start: Start) -> None:
    form = {"content-type": "multipart/form-data; boundary=b"}
    async with api(start) as (_, client):
        for path in JSON_ROUTES:
            assert_error(await client.post(path, content=b" " * 2_000_001), 413, "over 2000000 bytes")
        assert_error(await client.post("/v1/adapters", json={"a": "x" * 2_000_000}), 413, "as multipart/form-data")
        put = await client.put("/v1/adapters", content=b"--b--", headers=form)
        assert_error(put, 405, "PUT /v1/adapters")
        assert_error(await client.post("/v1/audio/transcriptions", content=b"--b--", headers=form), 404, "No route")
        assert (await client.get("/v1/models", headers=form)).status_code == 200
        bare = form | {"content-length": "0"}
        assert (await client.post("/admin/replicas/r0/resume", headers=bare)).status_code == 200


async def test_client_that_goes_away_leaves_nothing(start: Start, tmp_path: Path) -> None:
    async with start() as world, served(world, tmp_path):
        _, writer = await asyncio.open_unix_connection(tmp_path / "api.sock")
        writer.write(b"POST /v1/adapters HTTP/1.1\r\nhost: x\r\ncontent-length: 900000\r\n")
        writer.write(b"content-type: multipart/form-data; boundary=b\r\n\r\n" + HEAD + b"x" * 1000)
        await until(lambda: left(world))
        writer.transport.abort()
        await until(lambda: left(world) == [])


async def test_upload_over_a_real_socket(start: Start, tmp_path: Path) -> None:
    async with start() as world, served(world, tmp_path) as client:
        answer = await client.post("/v1/adapters", data={"name": "pirate"}, files=multipart(world.files()))
        assert (answer.status_code, answer.json()["state"]) == (201, "ready")


async def test_staging_holds_the_upload_not_the_memory(start: Start, tmp_path: Path) -> None:
    """While 900 KB have been sent and not ended, they lie in the state directory."""
    async with start() as world, served(world, tmp_path):
        _, writer = await asyncio.open_unix_connection(tmp_path / "api.sock")
        writer.write(b"POST /v1/adapters HTTP/1.1\r\nhost: x\r\ncontent-length: 1900000\r\n")
        writer.write(b"content-type: multipart/form-data; boundary=b\r\n\r\n" + HEAD + b"x" * 1_800_000)
        staged = world.state / "staging"
        await until(lambda: sum(path.stat().st_size for path in staged.rglob("part-*")) >= 1_000_000)
        writer.transport.abort()
        await until(lambda: left(world) == [])


def test_storage_directories_are_private(tmp_path: Path) -> None:
    AdapterStorage(tmp_path / "state")
    assert (tmp_path / "state" / "staging").stat().st_mode & 0o777 == 0o700
    assert (tmp_path / "state" / "adapters").stat().st_mode & 0o777 == 0o700
