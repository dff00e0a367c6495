"""What models a relay counts one by one."""

from __future__ import annotations

from pathlib import Path

import pytest

from gateway.observe import series
from gateway.observe.cells import Cells, CellsFull, Peers
from gateway.observe.exposition import sum_relays
from gateway.relay import account
from gateway.relay.account import Meter
from gateway.relay.http import Request


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(account, "_MODELS_COUNTED", 2)
    monkeypatch.setattr(account, "_TAKEN_OVER_EVERY_S", 0.0)


def meter(folder: Path) -> Meter:
    return Meter(Cells(folder / "relay-0.cells"), Peers({}), 0, lambda _: None)


def ask(meter: Meter, *labels: str) -> None:
    for label in labels:
        request = Request(b"POST", b"/v1/completions", {}, True)
        meter.inference(request, "/v1/completions", label, "r0", 200, "ok", False, 3, 2, 0.0)


def counted(folder: Path) -> dict[str, int]:
    found = sum_relays(folder)[series.REQUESTS.name].items()
    return {labels[1]: cells[0] for labels, cells in found if labels[1] and cells[0]}


@pytest.mark.usefixtures("few")
def test_the_one_unused_for_longest_gives_way(tmp_path: Path) -> None:
    relay = meter(tmp_path)
    ask(relay, "a", "b", "b", "c")  # nobody was looked at yet: the first goes
    assert counted(tmp_path) == {"b": 2, "c": 1}
    ask(relay, "c", "d")
    assert counted(tmp_path) == {"c": 2, "d": 1}
    for metric in (series.TTFT, series.DURATION, series.PROMPT_TOKENS):
        assert {labels[0] for labels in sum_relays(tmp_path)[metric.name]} == {"(other)", "c", "d"}
    ask(relay, "a")
    assert counted(tmp_path)["a"] == 1  # from zero


def test_what_comes_too_fast_is_counted_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(account, "_MODELS_COUNTED", 2)
    monkeypatch.setattr(account, "_TAKEN_OVER_EVERY_S", 1e9)
    ask(meter(tmp_path), "a", "b", "c", "d", "c", "a")
    assert counted(tmp_path) == {"a": 2, "b": 1, "(other)": 3}


def test_where_no_series_can_be_added_requests_are_counted_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    relay = meter(tmp_path)
    ask(relay, "a")

    def full(*_: object) -> None:
        raise CellsFull("the disk is full")

    monkeypatch.setattr(Cells, "_append", full)
    ask(relay, "a", "b", "b")
    relay.plain(Request(b"GET", b"/health", {}, True), "/health", 200, "ok")
    assert counted(tmp_path) == {"a": 2, "(other)": 3}
    assert sum(sum_relays(tmp_path)[series.DURATION.name]["(other)",][:-1]) == 2


@pytest.mark.usefixtures("few")
def test_an_earlier_process_s_models_give_way_too(tmp_path: Path) -> None:
    ask(meter(tmp_path), "a", "b")
    relay = meter(tmp_path)
    ask(relay, "b")
    assert counted(tmp_path) == {"a": 1, "b": 2}
    ask(relay, "c", "d")
    assert len(counted(tmp_path)) == 2
    assert "d" in counted(tmp_path)
