"""What a user can get wrong: each has its message, its status, and leaves nothing half-done."""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import disks
from tests.support.engines import adapter, chat, checkpoint, upload
from tests.support.gateway import Gateway, gateway


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint(tmp_path_factory.mktemp("model") / "base")


@pytest.fixture(scope="module")
def running(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    with gateway(
        *("--engine-version", "emulator", "--model", str(base), "--max-body-mb", "16"),
        state=tmp_path_factory.mktemp("state"),
        api_key="secret",
    ) as serving:
        yield serving


def test_requests(running: Gateway) -> None:
    good = {"model": "base", "messages": [{"role": "user", "content": "hi"}]}
    cases = [
        (b'{"model": "base", ', 400, "JSON"),
        (b"[1]", 400, "object"),
        (b'{"messages": []}', 400, "model"),
        (b'{"model": 7, "messages": []}', 400, "model"),
        (b'{"model": "base", "stream": "yes", "messages": []}', 400, "stream"),
        (b'{"model": "bsae", "messages": []}', 404, "base"),
        (b'{"model": "base", "messages": "' + b"x" * 20_000_000 + b'"}', 413, "16"),
    ]
    with running.client() as client:
        for body, status, word in cases:
            answer = client.post("/v1/chat/completions", content=body)
            assert answer.status_code == status, (body[:80], answer.text)
            assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
            assert word in answer.json()["error"]["message"]
            assert answer.headers["x-request-id"]
        assert client.post("/v1/chat/completions", json=good).status_code == 200
        assert client.get("/v1/chat/completions").status_code == 405
        assert client.get("/v1/nothing").json()["error"]["type"] == "invalid_request_error"
        assert client.post("/v1/chat/completions", json=good, headers={"authorization": "Bearer x"}).status_code == 401


def refused(*flags: str) -> str:
    """Start a gateway that must refuse; what it says."""
    argv = [sys.executable, "-m", "gateway", "serve", *flags]
    ended = subprocess.run(argv, capture_output=True, text=True, timeout=60)
    assert ended.returncode != 0
    assert "Traceback" not in ended.stderr
    return ended.stderr


def test_unknown_flag() -> None:
    assert "No such option '--bakend'" in refused("--bakend", "vllm")


def test_port_taken(base: Path, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        flags = ("--engine-version", "emulator", "--model", str(base), "--port", port, "--state", str(tmp_path))
        message = refused(*flags)
    assert f"127.0.0.1:{port}" in message and "choose another --port" in message


def test_state_in_use(running: Gateway, base: Path) -> None:
    message = refused("--engine-version", "emulator", "--model", str(base), "--state", str(running.state))
    assert f"process {running.process.pid} already serves" in message


def test_missing_engine(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUNEGATE_HOME", str(tmp_path))
    assert "gateway engines install vllm" in refused("--model", str(base), "--device", "cpu")


def test_bad_model(tmp_path: Path) -> None:
    assert "/no/such/dir is neither a directory here" in refused(
        "--engine-version", "emulator", "--model", "/no/such/dir"
    )
    (tmp_path / "empty").mkdir()
    assert "config.json" in refused("--engine-version", "emulator", "--model", str(tmp_path / "empty"))


def test_engine_that_cannot_start(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cause is found in the engine's own log and told in words."""
    monkeypatch.setenv("TUNEGATE_EMULATOR", '{"start_failure": "cuda_oom"}')
    message = refused("--engine-version", "emulator", "--model", str(base), "--port", "0", "--state", str(tmp_path))
    assert "memory" in message and "--memory-fraction" in message


def test_full_disk(base: Path, tmp_path: Path) -> None:
    """An upload that fills the disk is refused whole; the next, smaller one works."""
    with (
        disks.small_disk(tmp_path / "disk", "48m") as disk,
        gateway("--engine-version", "emulator", "--model", str(base), state=disk / "state") as serving,
    ):
        filler = disk / "filler"
        filler.write_bytes(b"\0" * (shutil.disk_usage(disk).free - 400_000))
        big = adapter(tmp_path / "big", rank=64) / "README.md"
        big.write_bytes(b"\0" * 2_000_000)
        with serving.client() as client:
            files = [("file", (file.name, file.read_bytes())) for file in sorted(big.parent.iterdir())]
            answer = client.post("/v1/adapters", data={"name": "big"}, files=files)
            assert answer.status_code == 507, answer.text
            assert "disk" in answer.json()["error"]["message"]
            assert client.get("/v1/adapters").json()["data"] == []
        assert list((serving.state / "staging").iterdir()) == []
        assert list((serving.state / "adapters").iterdir()) == []
        filler.unlink()
        upload(serving, "small", adapter(tmp_path / "small"))
        assert chat(serving, "small").status_code == 200
