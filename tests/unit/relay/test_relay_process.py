"""The relay as a process: its start, its end, and that it does not outlive its parent."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
from relay_harness import Client, replica, until
from scripted_upstream import DONE, END, STREAM_HEAD, ScriptedUpstream, answer, chunk, completion, token

from gateway.observe.exposition import sum_relays
from gateway.snapshot import Key, Model, Snapshot


async def serve_snapshots(folder: Path, engine: ScriptedUpstream) -> asyncio.Server:
    snapshot = Snapshot(1, (replica(engine),), {"demo": Model("demo", None, None, {"r0": "demo"}, "")}, {})

    async def send(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(msgspec.json.encode(snapshot) + b"\n")
        await reader.read()
        writer.close()

    return await asyncio.start_unix_server(send, folder / "snapshots.sock")


def command(folder: Path, listener: socket.socket, index: int = 0, relays: int = 1) -> list[str]:
    flags = {"index": index, "relays": relays, "fd": listener.fileno(), "run-dir": folder, "drain-timeout-s": 5}
    return [sys.executable, "-m", "gateway.relay", *(part for k, v in flags.items() for part in (f"--{k}", str(v)))]


class Running:
    """Relay processes on one port, and the clients made to them."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.processes: list[subprocess.Popen[bytes]] = []
        self._clients: list[Client] = []

    async def client(self) -> Client:
        self._clients.append(Client(*await asyncio.open_connection("127.0.0.1", self.port)))
        return self._clients[-1]

    def close(self) -> None:
        for client in self._clients:
            client.go()
        for process in self.processes:
            process.kill()
            process.wait()


@contextlib.asynccontextmanager
async def running(folder: Path, engine: ScriptedUpstream, relays: int = 1) -> AsyncIterator[Running]:
    """Ready relays."""
    await engine.start()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        run = Running(listener.getsockname()[1])
        server = await serve_snapshots(folder, engine)
        for index in range(relays):
            with (folder / f"log-{index}").open("wb") as log:
                argv = command(folder, listener, index, relays)
                run.processes.append(subprocess.Popen(argv, pass_fds=(listener.fileno(),), stderr=log))
        try:
            await until(lambda: len(list(folder.glob("relay-*.cells"))) == relays, 20)
            await ready(run.port)
            yield run
        finally:
            run.close()
            server.close()
            await engine.close()


async def ready(port: int) -> None:
    async with asyncio.timeout(20):
        status = 0
        while status != 200:
            await asyncio.sleep(0.02)
            client = Client(*await asyncio.open_connection("127.0.0.1", port))
            client.send("GET", "/ready", connection="close")
            status = (await client.answer()).status
            client.writer.close()


async def test_sigterm_finishes_what_is_in_flight_and_exits_0(tmp_path: Path) -> None:
    finish = asyncio.Event()
    engine = ScriptedUpstream([STREAM_HEAD, chunk(token("a")), finish, chunk(DONE), END])
    async with running(tmp_path, engine) as run:
        (process,) = run.processes
        client = await run.client()
        client.chat(stream=True)
        await client.head()
        await client.piece()
        process.send_signal(signal.SIGTERM)
        await asyncio.sleep(0.1)
        assert process.poll() is None
        finish.set()
        assert await client.piece() == DONE
        assert await client.piece() == b""
        await until(lambda: process.poll() is not None)
        assert process.returncode == 0
    lines = [json.loads(line) for line in (tmp_path / "log-0").read_text().splitlines()]
    assert [line["status"] for line in lines if line["route"] == "/v1/chat/completions"] == [200]


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return "Z" not in Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]


async def test_counts_go_on_and_nothing_stays_in_flight_after_a_kill(tmp_path: Path) -> None:
    hang = asyncio.Event()
    engine = ScriptedUpstream([answer(completion())], [hang])
    async with running(tmp_path, engine) as run:
        for number in range(2):
            client = await run.client()
            client.chat()
            if number == 0:
                assert (await client.answer()).status == 200
        await engine.request(1)
        assert sum_relays(tmp_path)["tunegate_in_flight_requests"] == {("r0",): [1]}
    hang.set()
    again = ScriptedUpstream([answer(completion())])
    (tmp_path / "snapshots.sock").unlink(missing_ok=True)
    async with running(tmp_path, again) as run:
        assert sum_relays(tmp_path)["tunegate_in_flight_requests"] == {("r0",): [0]}
        client = await run.client()
        client.chat()
        assert (await client.answer()).status == 200
        # The answer leaves a moment before it is counted.
        chats = ("/v1/chat/completions", "demo", "200")
        await until(lambda: sum_relays(tmp_path)["tunegate_requests"].get(chats) == [2])


async def test_two_relays_share_the_port_and_see_each_others_load(tmp_path: Path) -> None:
    finish = asyncio.Event()
    engine = ScriptedUpstream([finish, answer(completion())])
    async with running(tmp_path, engine, relays=2) as run:
        clients = [await run.client() for _ in range(20)]
        for client in clients:
            client.chat()
        await engine.request(19)
        assert sum_relays(tmp_path)["tunegate_in_flight_requests"] == {("r0",): [20]}
        finish.set()
        for client in clients:
            assert (await client.answer()).status == 200
        await until(lambda: sum_relays(tmp_path)["tunegate_in_flight_requests"] == {("r0",): [0]})


async def test_a_relay_that_a_defect_made_deaf_to_control_ends(tmp_path: Path) -> None:
    """Whoever started it starts it again; else it would go by its last picture for ever."""
    picture = Snapshot(1, (), {}, {})
    never = Key("key-1", frozenset(), row=1, requests_per_minute=0)  # which control does not make
    lines = [
        msgspec.json.encode(news) + b"\n" for news in (picture, msgspec.structs.replace(picture, keys={"0": never}))
    ]

    async def send(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.writelines(lines)
        await reader.read()
        writer.close()

    server = await asyncio.start_unix_server(send, tmp_path / "snapshots.sock")
    with socket.create_server(("127.0.0.1", 0)) as listener, (tmp_path / "log").open("wb") as log:
        argv = command(tmp_path, listener)
        process = subprocess.Popen(argv, pass_fds=(listener.fileno(),), stderr=log)
    try:
        await until(lambda: process.poll() is not None, 20)
        assert process.returncode == 1
        assert b"ZeroDivisionError" in (tmp_path / "log").read_bytes()
    finally:
        process.kill()
        process.wait()
        server.close()
