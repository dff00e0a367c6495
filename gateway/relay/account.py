"""Counting: what is in flight, and what each request came to. A count is a store into a cell."""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Callable

from gateway.observe import series
from gateway.observe.cells import IN_FLIGHT_ROW, PRESSING, WAITING, Cells, CellsFull, Peers
from gateway.observe.log import Access
from gateway.observe.series import Metric
from gateway.relay.http import Request
from gateway.relay.route import Candidate, Engine

_OTHER_MODELS = "(other)"  # where a model is counted that has no series of its own
_MODELS_COUNTED = 500  # that have; it bounds /metrics, whatever is registered
_TAKEN_OVER_EVERY_S = 0.1  # at most: giving a model's series to another costs as much as several requests

_TTFT_BOUNDS = series.TTFT.bounds
_TOKEN_TIME_BOUNDS = series.TOKEN_TIME.bounds
_DURATION_BOUNDS = series.DURATION.bounds
_QUEUE_WAIT_BOUNDS = series.QUEUE_WAIT.bounds
_ONE_A_MODEL = tuple(metric for metric in series.METRICS.values() if metric.labels == ("model",))


class ModelCells:
    """Where one model's counts are."""

    __slots__ = (
        "completion_tokens",
        "disconnects",
        "duration",
        "label",
        "prompt_tokens",
        "requests",
        "token_time",
        "ttft",
        "used",
    )

    def __init__(self, cells: Cells, label: str) -> None:
        """Raises CellsFull."""
        self.label = label
        self.used = True  # since it was last looked at for one unused
        self.prompt_tokens = cells.series(series.PROMPT_TOKENS, label)
        self.completion_tokens = cells.series(series.COMPLETION_TOKENS, label)
        self.ttft = cells.series(series.TTFT, label)
        self.token_time = cells.series(series.TOKEN_TIME, label)
        self.duration = cells.series(series.DURATION, label)
        self.disconnects = cells.series(series.DISCONNECTS, label)
        self.requests: dict[tuple[str, int], int] = {}  # (route, status) -> cell


class Meter:
    """One relay's counters and its access log."""

    def __init__(self, cells: Cells, peers: Peers, relay: int, log: Callable[[Access], None]) -> None:
        self._cells = cells
        self._values = cells.values
        self._peers = peers
        self._log = log
        self._models: dict[str, ModelCells] = {}
        self._plain: dict[tuple[str, int], int] = {}
        self._other = ModelCells(cells, _OTHER_MODELS)
        # Made now: when it is needed there is no room for another.
        self._uncounted = cells.series(series.REQUESTS, "(other)", _OTHER_MODELS, "0")
        self._taken_over_s = 0.0
        self._continue()
        self._keepalives = cells.series(series.KEEPALIVES, str(relay))
        self._queue_wait = cells.series(series.QUEUE_WAIT)
        cells.name_cell(series.QUEUE_DEPTH, WAITING, str(relay))
        self._cpu = cells.series(series.RELAY_CPU, str(relay))
        self._adapter_waiting = cells.series(series.ADAPTER_WAITING, str(relay))
        self._misses = cells.series(series.ADAPTER_MISSES, str(relay))
        self._misses_before = self._values[self._misses]
        self._cpu_before_us = self._values[self._cpu]

    # In flight

    def name_replica(self, row: int, replica_id: str) -> None:
        """Which replica a row stands for, from now on. Raises CellsFull."""
        self._cells.name_row(series.IN_FLIGHT, row, replica_id)

    def enter(self, candidate: Candidate) -> None:
        """A request goes to a replica, by one of its models; matched by exactly one `leave`."""
        values, cell = self._values, candidate.cell
        values[IN_FLIGHT_ROW + candidate.engine.row] += 1
        values[cell] += 1
        values[cell + 1] += 1

    def leave(self, candidate: Candidate) -> None:
        """It is over."""
        self._values[IN_FLIGHT_ROW + candidate.engine.row] -= 1
        self._values[candidate.cell] -= 1

    def look(self, now_s: float) -> None:
        """Bring the other relays' share of `in_flight` up to date. now_s: monotonic."""
        self._peers.read(now_s)

    def in_flight(self, row: int) -> int:
        """Requests at a replica, of all relays; ours as of now, the others' as of the last look."""
        return self._values[IN_FLIGHT_ROW + row] + self._peers.in_flight(row)

    def adapter_waits(self, requests: int, ever: int) -> None:
        """Requests that wait for an adapter to be loaded, now and since this process began."""
        self._values[self._adapter_waiting] = requests
        self._values[self._misses] = self._misses_before + ever

    def load(self, row: int) -> tuple[int, int]:
        """Requests at a replica now: this relay's, and those of all others."""
        return self._values[IN_FLIGHT_ROW + row], self._peers.in_flight_now(row)

    # Waiting

    @property
    def has_peers(self) -> bool:
        """Whether there are other relays."""
        return self._peers.any

    def queued(self, count: int, pressing: int) -> None:
        """So many requests wait for room at this relay, so many of them no batch's; the others and control see it."""
        self._values[WAITING] = count
        self._values[PRESSING] = pressing

    def rivals(self) -> int:
        """Other relays at which requests wait."""
        return self._peers.waiting()

    def waited(self, wait_s: float) -> None:
        """A request got its slot after so long."""
        _observe(self._values, self._queue_wait, _QUEUE_WAIT_BOUNDS, int(wait_s * 1e6))

    # Events

    def count(self, metric: Metric, *labels: str) -> None:
        """One more of a counter."""
        try:
            self._values[self._cells.series(metric, *labels)] += 1
        except CellsFull:
            return  # the request itself is still counted

    def keepalive(self) -> None:
        """A comment was sent on a silent stream."""
        self._values[self._keepalives] += 1

    def upstream_error(self, engine: Engine, kind: str) -> None:
        """A replica failed. kind: one of those that the metric's help lists."""
        self.count(series.UPSTREAM_ERRORS, engine.id, kind)

    def tick(self) -> None:
        """A second has passed."""
        self._values[self._cpu] = self._cpu_before_us + round(time.process_time() * series.MICROSECONDS)
        self._peers.find()

    # Requests

    def _continue(self) -> None:
        """Take over the models that an earlier process of this relay counted."""
        for (label,) in self._cells.labels(series.DURATION):
            if label != _OTHER_MODELS:
                self._models[label] = ModelCells(self._cells, label)
        for route, label, status in self._cells.labels(series.REQUESTS):
            if label in self._models:
                self._models[label].requests[route, int(status)] = self._request_cell(route, label, int(status))

    def _model(self, label: str) -> ModelCells:
        """The cells of a model. They are its own only until the next call."""
        model = self._models.get(label)
        if model is None:
            try:
                if len(self._models) >= _MODELS_COUNTED and not self._drop_unused():
                    return self._other
                model = self._models[label] = ModelCells(self._cells, label)
            except CellsFull:
                return self._other
        model.used = True
        return model

    def _drop_unused(self) -> bool:
        """Forget the counts of the model unused for longest, or nearly; False: not so soon. Raises CellsFull."""
        now_s = time.monotonic()
        if now_s - self._taken_over_s < _TAKEN_OVER_EVERY_S:
            return False
        self._taken_over_s = now_s
        while True:
            label = next(iter(self._models))
            model = self._models.pop(label)
            if not model.used:
                break
            model.used = False
            self._models[label] = model  # a second chance, behind the others
        for metric in _ONE_A_MODEL:
            self._cells.drop(metric, label)
        for route, status in model.requests:
            self._cells.drop(series.REQUESTS, route, label, str(status))
        return True

    def plain(self, request: Request, route: str, status: int, outcome: str, path: str | None = None) -> None:
        """A request that went to no engine. path: for the log, where the metric's label is coarser."""
        if request.account is not None:
            request.account.leave(0)
        key = (route, status)
        cell = self._plain.get(key)
        if cell is None:
            cell = self._plain[key] = self._request_cell(route, "", status)
        self._values[cell] += 1
        duration_ms = round((time.monotonic() - request.started_s) * 1e3, 3)
        self._log(
            Access(
                time.time(), request.id.decode(), request.key_id, path or route, None, None, status, False,
                None, None, None, duration_ms, outcome,
            )
        )  # fmt: skip

    def inference(
        self,
        request: Request,
        route: str,
        label: str,
        replica: str | None,
        status: int,
        outcome: str,
        stream: bool,
        prompt_tokens: int | None,
        completion_tokens: int | None,
        first_s: float,
        estimated_tokens: int = 0,
    ) -> None:
        """A request for a model that exists: names that do not must never come here.

        label: of the model. first_s: when its first event came (monotonic), 0 if none did.
        estimated_tokens: of the prompt, charged where the engine did not say how many it had.
        """
        now_s = time.monotonic()
        duration_s = now_s - request.started_s
        if request.account is not None:
            prompt = prompt_tokens if prompt_tokens is not None else estimated_tokens
            request.account.leave(prompt + (completion_tokens or 0))
        values = self._values
        model = self._model(label)
        cell = model.requests.get((route, status))
        if cell is None:
            cell = model.requests[route, status] = self._request_cell(route, model.label, status)
        values[cell] += 1
        _observe(values, model.duration, _DURATION_BOUNDS, int(duration_s * 1e6))
        if prompt_tokens:
            values[model.prompt_tokens] += prompt_tokens
        if completion_tokens:
            values[model.completion_tokens] += completion_tokens
        if status == 499:
            values[model.disconnects] += 1
        ttft_ms = None
        if first_s:
            ttft_s = first_s - request.started_s
            ttft_ms = round(ttft_s * 1e3, 3)
            _observe(values, model.ttft, _TTFT_BOUNDS, int(ttft_s * 1e6))
            if completion_tokens is not None and completion_tokens > 1 and outcome == "ok":
                each_us = int((now_s - first_s) * 1e6 / (completion_tokens - 1))
                _observe(values, model.token_time, _TOKEN_TIME_BOUNDS, each_us)
        self._log(
            Access(
                time.time(), request.id.decode(), request.key_id, route, label, replica, status, stream,
                prompt_tokens, completion_tokens, ttft_ms, round(duration_s * 1e3, 3), outcome,
            )
        )  # fmt: skip

    def _request_cell(self, route: str, label: str, status: int) -> int:
        try:
            return self._cells.series(series.REQUESTS, route, label, str(status))
        except CellsFull:
            return self._uncounted


def _observe(values: memoryview, first: int, bounds: tuple[int, ...], value: int) -> None:
    """Count `value` in its bucket and in the sum, which follows the +Inf bucket."""
    values[first + bisect_left(bounds, value)] += 1
    values[first + len(bounds) + 1] += value
