"""Snapshots from control, and the access log: what a relay has besides requests."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import time
from pathlib import Path

import msgspec
import pytest
from relay_harness import Relay, replica, until
from scripted_upstream import DONE, END, STREAM_HEAD, answer, chunk, completion, token

from gateway.observe.log import Access, AccessLog
from gateway.relay.link import Link
from gateway.snapshot import Applied, Model, Replica, Snapshot
from tests.support.connections import Connections
from tests.support.pipes import full_pipe


class Control:
    """The other end of the snapshots socket."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.writers: list[asyncio.StreamWriter] = []
        self.applied: list[Applied] = []

    async def start(self) -> None:
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(self.path))
        listener.listen()
        self._open = Connections(listener, self._accept)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.writers.append(writer)
        while line := await reader.readline():
            self.applied.append(msgspec.json.decode(line, type=Applied))

    def send(self, version: int, data: bytes | None = None) -> None:
        snapshot = Snapshot(version, (), {}, {})
        self.writers[-1].write(data if data is not None else msgspec.json.encode(snapshot) + b"\n")

    async def stop(self) -> None:
        self._open.abort()
        await self._open.closed()
        self.path.unlink(missing_ok=True)


async def test_snapshots_are_applied_and_acknowledged_also_after_control_was_away(tmp_path: Path) -> None:
    path = tmp_path / "snapshots.sock"
    versions: list[int] = []
    notes: list[str] = []
    task = asyncio.create_task(Link(path, 3, notes.append).follow(lambda snapshot: versions.append(snapshot.version)))
    control = Control(path)
    await control.start()  # later than the relay
    await until(lambda: control.writers)
    control.send(1)
    control.send(2)
    await until(lambda: control.applied == [Applied(3, 1), Applied(3, 2)])
    await control.stop()
    again = Control(path)
    await again.start()
    await until(lambda: again.writers)
    again.send(0, b'{"version":"wrong"}\n')  # of a control that is not ours: dropped, not fatal
    await until(lambda: len(again.writers) == 2)
    again.send(7)
    await until(lambda: again.applied == [Applied(3, 7)])
    assert versions == [1, 2, 7]
    assert len(notes) == 1
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    await again.stop()


async def test_a_snapshot_of_ten_thousand_adapters(tmp_path: Path, relay: Relay) -> None:
    models = {f"m{i}": Model(f"m{i}", "demo", f"a-{i:012x}", {"r0": f"a-{i:012x}"}, "") for i in range(10_000)}
    line = msgspec.json.encode(Snapshot(1, (Replica("r0", 0, "vllm", "127.0.0.1", 9, "", True),), models, {}))
    decode = msgspec.json.Decoder(Snapshot).decode
    started = time.process_time()
    relay.app.apply(decode(line))
    assert time.process_time() - started < 0.5


async def test_a_new_snapshot_counts_from_the_next_request_on(relay: Relay) -> None:
    finish = asyncio.Event()
    old = await relay.engine([finish, answer(completion("old"))])
    client = await relay.client()
    client.chat()
    await old.request()
    new = await relay.engine([answer(completion("new"))], serve=False)
    relay.serve(replica(new, "r1", 1))
    assert (await relay.ask()).body == completion("new")
    finish.set()
    assert (await client.answer()).body == completion("old")
    assert relay.in_flight() == 0


async def test_an_adapter_is_called_by_its_public_name_only(relay: Relay) -> None:
    engine = await relay.engine(
        [answer(completion(model="a-0123456789ab"))],
        [STREAM_HEAD, chunk(token("x", "a-0123456789ab") + DONE), END],
        [answer(b'{"error":{"message":"a-0123456789ab: too long","type":"x","param":null,"code":400}}', "400 Bad")],
        serve=False,
    )
    french = Model("french", "demo", "a-0123456789ab", {"r0": "a-0123456789ab"}, "")
    relay.serve(replica(engine), models={"french": french, "french@v1": french})
    plain = await relay.ask(model="french@v1")
    assert plain.json["model"] == "french@v1"
    streamed = await relay.ask(model="french", stream=True)
    assert streamed.events[0]["model"] == "french"
    assert [seen.json["model"] for seen in engine.seen] == ["a-0123456789ab"] * 2
    assert "a-0123456789ab" not in (plain.body + streamed.body).decode()
    assert (await relay.ask(model="french")).error["message"] == "french: too long"
    assert (await relay.ask(model="a-0123456789ab")).status == 404  # never by the engine's name
    assert set(relay.counted("tunegate_requests")) == {
        ("/v1/chat/completions", "french", "200"),
        ("/v1/chat/completions", "french", "400"),
        ("/v1/chat/completions", "", "404"),
    }


async def test_models_that_do_not_exist_make_no_series(relay: Relay) -> None:
    await relay.engine([answer(completion())])
    await relay.ask(model="x")
    before = relay.cells._free
    for i in range(50):
        await relay.ask(model=f"guess-{i}")
    assert relay.cells._free == before


async def test_load_is_spread_by_what_is_in_flight(relay: Relay) -> None:
    finish = asyncio.Event()
    script = [finish, answer(completion())]
    engines = [await relay.engine(script, serve=False) for _ in range(3)]
    relay.serve(*(replica(engine, f"r{i}", i) for i, engine in enumerate(engines)))
    clients = [await relay.client() for _ in range(9)]
    for client in clients:
        client.chat()
    await until(lambda: relay.in_flight() == 9)
    await until(lambda: [len(engine.seen) for engine in engines] == [3, 3, 3])
    assert relay.counted("tunegate_in_flight_requests") == {("r0",): 3, ("r1",): 3, ("r2",): 3}
    finish.set()
    for client in clients:
        assert (await client.answer()).status == 200
    assert relay.in_flight() == 0


# The access log


def entry(number: int) -> Access:
    return Access(1.5, f"req-{number}", "k", "/r", "demo", "r0", 200, False, 1, 2, None, 3.0, "ok")


async def lines_until(reading: int, said: bytes) -> list[bytes]:
    """What a pipe holds, up to where `said` is in it."""
    os.set_blocking(reading, False)
    text = b""

    def found() -> bool:
        nonlocal text
        with contextlib.suppress(BlockingIOError):
            text += os.read(reading, 1 << 20)
        return said in text

    await until(found)
    return text.splitlines()


async def test_lines_are_json_and_come_within_a_moment(tmp_path: Path) -> None:
    file = tmp_path / "log"
    with file.open("wb") as out:
        log = AccessLog(out.fileno(), asyncio.get_running_loop())
        for number in range(1000):
            log.add(entry(number))
        await until(lambda: file.read_bytes().count(b"\n") == 1000)
    first = json.loads(file.read_text().splitlines()[0])
    assert first == msgspec.to_builtins(entry(0))


async def test_a_reader_that_does_not_read_stops_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.observe.log._KEPT_BYTES", 200_000)
    reading, writing = os.pipe()
    log = AccessLog(writing, asyncio.get_running_loop())
    for number in range(20_000):
        log.add(entry(number))
        if number % 100 == 0:
            started = time.monotonic()
            log.flush()
            assert time.monotonic() - started < 10
    lines = [json.loads(line) for line in await lines_until(reading, b"dropped_log_lines")]
    dropped = sum(line.get("dropped_log_lines", 0) for line in lines)
    assert dropped > 0
    assert dropped + sum("request_id" in line for line in lines) == 20_000
    log.flush()
    os.close(reading)
    os.close(writing)


async def test_a_note_waits_for_no_reader_either() -> None:
    """It would hold up every request of its relay."""
    reading, writing = full_pipe()
    log = AccessLog(writing, asyncio.get_running_loop())
    log.note("the link to control broke")
    log.flush()
    *_, noted = await lines_until(reading, b"the link to control broke")
    assert json.loads(noted).keys() == {"ts", "note"}
    os.close(reading)
    os.close(writing)


async def test_a_closed_reader_stops_nothing() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    log = AccessLog(writing, asyncio.get_running_loop())
    log.add(entry(1))
    log.flush()
    os.close(writing)
