"""Cells: counting, naming, restarts, and what Prometheus reads of them."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from gateway.observe import cells as cells_module
from gateway.observe.cells import (
    FIRST_FREE,
    IN_FLIGHT_ROW,
    MAX_REPLICAS,
    Cells,
    CellsFull,
    InFlight,
    Peers,
    forget_surplus,
    read_series,
)
from gateway.observe.exposition import RelayCollector, sum_relays
from gateway.observe.series import IN_FLIGHT, METRICS, PROMPT_TOKENS, REQUESTS, TTFT, Metric


def path(folder: Path, index: int = 0) -> Path:
    return folder / f"relay-{index}.cells"


def exposed(folder: Path) -> str:
    registry = CollectorRegistry()
    registry.register(RelayCollector(folder))
    return generate_latest(registry).decode()


def test_series_are_made_once_and_do_not_overlap(tmp_path: Path) -> None:
    cells = Cells(path(tmp_path))
    first = cells.series(PROMPT_TOKENS, "a")
    histogram = cells.series(TTFT, "a")
    after = cells.series(PROMPT_TOKENS, "b")
    assert first == cells.series(PROMPT_TOKENS, "a") == FIRST_FREE
    assert histogram == first + 1
    assert after == histogram + TTFT.cells == histogram + len(TTFT.buckets) + 2


def test_a_restart_goes_on_counting_with_nothing_in_flight(tmp_path: Path) -> None:
    cells = Cells(path(tmp_path))
    cells.name_row(IN_FLIGHT, 3, "r3")
    cells.values[IN_FLIGHT_ROW + 3] = 5
    cells.values[IN_FLIGHT_ROW + 9] = 1  # a row whose name was never written
    counter = cells.series(PROMPT_TOKENS, "a")
    cells.values[counter] += 41
    cells.close()
    again = Cells(path(tmp_path))
    assert again.series(PROMPT_TOKENS, "a") == counter
    again.values[counter] += 1
    assert again.values[counter] == 42
    assert sum(again.values[IN_FLIGHT_ROW:FIRST_FREE]) == 0
    assert again.series(PROMPT_TOKENS, "new") > counter


def test_a_last_line_cut_short_is_dropped(tmp_path: Path) -> None:
    cells = Cells(path(tmp_path))
    cells.series(PROMPT_TOKENS, "a")
    cells.close()
    names = path(tmp_path).with_suffix(".series")
    whole = names.read_bytes()
    names.write_bytes(whole + b'{"metric":"tunegate_prompt_tok')
    assert len(list(read_series(path(tmp_path)))) == 1
    again = Cells(path(tmp_path))
    assert names.read_bytes() == whole
    assert again.series(PROMPT_TOKENS, "b") == FIRST_FREE + 1


def test_a_file_of_another_layout_is_started_anew(tmp_path: Path) -> None:
    cells = Cells(path(tmp_path))
    cells.series(PROMPT_TOKENS, "a")
    cells.values[0] = 7
    cells.close()
    again = Cells(path(tmp_path))
    assert again.values[0] == cells_module.MAGIC
    assert list(read_series(path(tmp_path))) == []


def test_room_ends_with_an_error_that_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cells = Cells(path(tmp_path))
    monkeypatch.setattr(cells_module, "CAPACITY", FIRST_FREE + 2)
    cells.series(PROMPT_TOKENS, "a")
    with pytest.raises(CellsFull, match="no room"):
        cells.series(TTFT, "a")
    with pytest.raises(CellsFull, match="there are 1024"):
        cells.name_row(IN_FLIGHT, MAX_REPLICAS, "r")


def test_a_full_disk_is_an_error_and_not_a_crash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cells = Cells(path(tmp_path))

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    monkeypatch.setattr(cells_module, "_STEP", 1)
    with pytest.raises(CellsFull, match="No space left"):
        for i in range(100_000):
            cells.series(TTFT, str(i))
    monkeypatch.undo()
    cells.series(TTFT, "later")


def test_disk_is_taken_a_little_at_a_time(tmp_path: Path) -> None:
    Cells(path(tmp_path))
    assert path(tmp_path).stat().st_blocks * 512 < 1_000_000


def test_peers_see_each_other(tmp_path: Path) -> None:
    mine, other = Cells(path(tmp_path, 0)), Cells(path(tmp_path, 1))
    peers = Peers({1: path(tmp_path, 1), 2: path(tmp_path, 2)})
    other.values[IN_FLIGHT_ROW + 4] = 3
    mine.values[IN_FLIGHT_ROW + 4] = 9
    peers.read(1.0)
    assert peers.in_flight(4) == 3
    late = Cells(path(tmp_path, 2))
    late.values[IN_FLIGHT_ROW + 4] = 2
    peers.find()
    peers.read(1.001)
    assert peers.in_flight(4) == 3  # a moment old
    peers.read(1.01)
    assert peers.in_flight(4) == 5
    assert peers.in_flight(700) == 0


def test_relays_are_added_up(tmp_path: Path) -> None:
    for index in range(3):
        cells = Cells(path(tmp_path, index))
        cells.values[cells.series(REQUESTS, "/v1/x", "demo", "200")] = 10 + index
        cells.name_row(IN_FLIGHT, 0, "r0")
        cells.values[IN_FLIGHT_ROW] = 2
        first = cells.series(TTFT, "demo")
        cells.values[first] += 1  # up to 1 ms
        cells.values[first + 3] += 2  # up to 10 ms
        cells.values[first + len(TTFT.buckets)] += 1  # above all
        cells.values[first + len(TTFT.buckets) + 1] += 200_000_000  # microseconds
    text = exposed(tmp_path)
    assert 'tunegate_requests_total{model="demo",route="/v1/x",status="200"} 33.0' in text
    assert 'tunegate_in_flight_requests{replica="r0"} 6.0' in text
    assert 'tunegate_time_to_first_token_seconds_bucket{le="0.001",model="demo"} 3.0' in text
    assert 'tunegate_time_to_first_token_seconds_bucket{le="0.005",model="demo"} 3.0' in text
    assert 'tunegate_time_to_first_token_seconds_bucket{le="0.01",model="demo"} 9.0' in text
    assert 'tunegate_time_to_first_token_seconds_bucket{le="+Inf",model="demo"} 12.0' in text
    assert 'tunegate_time_to_first_token_seconds_count{model="demo"} 12.0' in text
    assert 'tunegate_time_to_first_token_seconds_sum{model="demo"} 600.0' in text


def test_a_row_that_changed_hands_counts_once(tmp_path: Path) -> None:
    cells = Cells(path(tmp_path))
    cells.name_row(IN_FLIGHT, 0, "r0")
    cells.name_row(IN_FLIGHT, 0, "r7")
    cells.name_row(IN_FLIGHT, 0, "r7")
    cells.values[IN_FLIGHT_ROW] = 4
    assert sum_relays(tmp_path)[IN_FLIGHT.name] == {("r7",): [4]}


def test_no_relay_no_series(tmp_path: Path) -> None:
    assert "tunegate_requests_total{" not in exposed(tmp_path)
    path(tmp_path).write_bytes(b"")  # a relay that is starting
    assert "# HELP tunegate_requests_total" in exposed(tmp_path)


@pytest.mark.parametrize("metric", METRICS.values(), ids=lambda metric: metric.name)
def test_metrics_are_well_formed(metric: Metric) -> None:
    assert metric.name.startswith("tunegate_")
    assert metric.help.endswith(".")
    assert list(metric.buckets) == sorted(set(metric.buckets))
    assert (metric.kind == "histogram") == bool(metric.buckets)
    assert metric.name.endswith("_seconds") == (metric.per_unit > 1)


def test_a_count_costs_well_under_a_microsecond(tmp_path: Path) -> None:
    cells = Cells(path(tmp_path))
    values, cell = cells.values, cells.series(PROMPT_TOKENS, "a")
    best_s = 1.0
    for _ in range(5):
        started = time.perf_counter()
        for _ in range(20_000):
            values[cell] += 1
        best_s = min(best_s, (time.perf_counter() - started) / 20_000)
    assert best_s < 1e-6


def test_dropped_series_give_their_cells_to_others(tmp_path: Path) -> None:
    cells = Cells(path(tmp_path))
    counter, histogram = cells.series(PROMPT_TOKENS, "a"), cells.series(TTFT, "a")
    cells.values[counter] = cells.values[histogram] = 5
    cells.drop(PROMPT_TOKENS, "a")
    cells.drop(TTFT, "a")
    cells.drop(TTFT, "never")
    assert list(read_series(path(tmp_path))) == []
    assert (cells.series(TTFT, "b"), cells.series(PROMPT_TOKENS, "b")) == (histogram, counter)
    assert (cells.values[counter], cells.values[histogram]) == (0, 0)
    cells.drop(TTFT, "b")
    cells.close()
    again = Cells(path(tmp_path))
    assert again.labels(TTFT) == []
    assert again.labels(PROMPT_TOKENS) == [("b",)]
    assert again.series(TTFT, "c") == histogram
    assert again.series(TTFT, "d") == histogram + TTFT.cells


def test_the_list_of_series_does_not_grow_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cells_module, "_LIST_BYTES", 2000)
    cells = Cells(path(tmp_path))
    cells.values[cells.series(TTFT, "kept")] = 7
    for replica in ("r0", "r9", "r0"):
        cells.name_row(IN_FLIGHT, 3, replica)
    for number in range(200):
        cells.series(PROMPT_TOKENS, str(number))
        cells.drop(PROMPT_TOKENS, str(number))
    assert path(tmp_path).with_suffix(".series").stat().st_size < 4000
    assert sum_relays(tmp_path)[TTFT.name][("kept",)][0] == 7
    assert sum_relays(tmp_path)[IN_FLIGHT.name] == {("r0",): [0]}
    cells.close()
    again = Cells(path(tmp_path))
    assert (again.labels(TTFT), again.labels(PROMPT_TOKENS)) == ([("kept",)], [])
    used = again._free
    again.series(PROMPT_TOKENS, "new")
    assert again._free == used  # in the place of one that was dropped


def test_relays_that_no_longer_run_have_nothing_in_flight(tmp_path: Path) -> None:
    for index in range(3):
        cells = Cells(tmp_path / f"relay-{index}.cells")
        cells.values[IN_FLIGHT_ROW] = 1 + index
        cells.values[cells.series(PROMPT_TOKENS, "a")] = 10
        cells.close()
    forget_surplus(tmp_path, 1)
    assert InFlight(tmp_path).replica(0) == 1
    assert sum_relays(tmp_path)[PROMPT_TOKENS.name]["a",][0] == 30
