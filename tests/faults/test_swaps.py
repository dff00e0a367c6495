"""Names that move between versions, over emulated engines: under load nothing fails or is mixed; by command line."""

from __future__ import annotations

import asyncio
import itertools
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

from gateway.cli.residency import adapters
from tests.proofs.swaps import run
from tests.support.engines import adapter, chat, checkpoint, script, upload
from tests.support.gateway import Gateway, gateway


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    folder = tmp_path_factory.mktemp("swaps")
    base = checkpoint(folder / "base")
    flags = ("--engine-version", "emulator", "--device", "cuda", "--model", str(base))
    with gateway(*flags, "--replicas", "2", "--relays", "2", state=folder / "state") as running:
        yield running


def test_swaps_under_load(served: Gateway, tmp_path: Path) -> None:
    first, second = (adapter(tmp_path / f"v{seed}", seed) for seed in (1, 2))
    report = asyncio.run(run(served, first, second, swaps=6))
    assert report.good, str(report)
    assert len(report.swaps_ms) == 6
    assert min(report.answers[who] for who in ("base", "v1", "v2")) > 0, str(report)


def test_versions_by_command_line(served: Gateway, tmp_path: Path) -> None:
    first, second = (str(adapter(tmp_path / f"v{seed}", seed)) for seed in (3, 4))

    def cli(*arguments: str, status: int = 0) -> str:
        result = CliRunner().invoke(adapters, [*arguments, "--url", served.url], env={"COLUMNS": "200"})
        assert result.exit_code == status, result.output
        return result.output

    assert "tuned v1 ready" in cli("upload", first, "--name", "tuned")
    assert "tuned v2 ready" in cli("upload", second, "--name", "tuned", "--no-promote")
    assert "tuned@v2 gets 5 % of tuned" in cli("canary", "tuned@v2", "--weight", "5", "--manual")
    cli("alias", "prod", "tuned@v1")
    page = cli("show", "tuned")
    for line in ("tuned@v1: ready", "points to v1; it has v1, v2", "also called prod (v1)", "v2 gets 5 % since"):
        assert line in page, page
    assert [word in page for word in ("r0", "r1", "baseline", "canary started", "moved", "uploaded")] == [True] * 6
    assert "points to v1" in cli("rollback", "tuned")
    assert "pointed nowhere else before" in cli("rollback", "tuned", status=1)
    assert "points to v2" in cli("promote", "tuned")
    assert "'tuned' points to tuned@v2" in cli("rollback", "tuned", "--expect", "1", status=1)
    moved = cli("canary", "tuned@v1", "--weight", "5", "--expect", "1", status=1)
    assert moved == cli("promote", "tuned@v1", "--expect", "1", status=1)
    assert "points to v1" in cli("promote", "tuned@v1", "--expect", "2")
    assert "contradict" in cli("promote", "tuned@v1", "--version", "2", status=1)
    assert "tuned@v2" in cli("list") + cli("show", "tuned@v2")
    assert "is kept loaded, on r0, r1" in cli("load", "tuned")
    cli("unload", "tuned")
    cli("alias", "prod", "--delete")
    assert chat(served, "prod").status_code == 404
    assert "tuned@v2 deleted" in cli("delete", "tuned@v2")
    assert "has no version 2; it has v1" in cli("promote", "tuned@v2", status=1)
    cli("delete", "tuned")


def test_what_a_client_polls_is_ready_when_the_name_answers_with_it(tmp_path: Path) -> None:
    """Replicas that are started again one after the other, each held back by requests that it finishes first."""
    flags = ("--backend", "lmdeploy", "--engine-version", "emulator", "--device", "cuda", "--replicas", "2")
    first, second = (adapter(tmp_path / f"v{seed}", seed) for seed in (1, 2))
    with gateway(*flags, "--model", str(checkpoint(tmp_path / "base")), state=tmp_path / "state") as served:

        def said(model: str) -> str:
            return str(chat(served, model, max_tokens=8).json()["choices"][0]["message"]["content"])

        upload(served, "turncoat", first)
        before = said("turncoat")
        over = threading.Event()

        def busy() -> None:
            while not over.is_set():
                chat(served, max_tokens=40)

        for replica in ("r0", "r1"):
            script(served, replica, inter_token_ms=40)
        clients = [threading.Thread(target=busy) for _ in range(4)]
        for client in clients:
            client.start()
            time.sleep(0.3)  # not in step, so that some of a replica's requests have always long to go
        try:
            files = [("file", (file.name, file.read_bytes())) for file in sorted(second.iterdir())]
            with served.client() as http:
                answer = http.post("/v1/adapters", data={"name": "turncoat", "wait_s": "0"}, files=files)
                polled = [f"/v1/adapters/{name}" for name in ("turncoat", answer.json()["id"])]
                deadline = time.monotonic() + 60
                for path in itertools.cycle(polled):
                    if http.get(path).json()["state"] == "ready":
                        break
                    assert time.monotonic() < deadline, http.get(path).text
                    time.sleep(0.05)
                after = said("turncoat")
                assert http.get(polled[1]).json()["current"], path
        finally:
            over.set()
            for client in clients:
                client.join()
        assert after == said("turncoat@v2") != before
