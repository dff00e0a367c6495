"""`/metrics`: the relays' figures, and what control knows of replicas and adapters."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterator

from fastapi import APIRouter
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector
from starlette.responses import Response

from gateway.control import views
from gateway.control.core import Core
from gateway.control.replica import State
from gateway.observe.exposition import RelayCollector

_CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


def routes(core: Core) -> APIRouter:
    """The page, in Prometheus' text format."""
    router = APIRouter()
    registry = CollectorRegistry()
    registry.register(RelayCollector(core.setup.run_dir))
    registry.register(ControlCollector(core))

    @router.get("/metrics")
    async def metrics() -> Response:
        return Response(await asyncio.to_thread(generate_latest, registry), media_type=_CONTENT_TYPE)

    return router


class ControlCollector(Collector):
    """Replicas and adapters as they are at the moment of asking."""

    def __init__(self, core: Core) -> None:
        self._core = core

    def describe(self) -> list[Metric]:
        """Nothing: names are known without asking, and none clash."""
        return []

    def collect(self) -> Iterator[Metric]:
        """Engine up, replica states and restarts, adapters by state."""
        up = GaugeMetricFamily("tunegate_engine_up", "1 while the replica's engine answers.", labels=["replica"])
        states = GaugeMetricFamily(
            "tunegate_replica_state", "1 for the state that the replica is in.", labels=["replica", "state"]
        )
        restarts = CounterMetricFamily(
            "tunegate_replica_restarts", "Times the replica was started again.", labels=["replica"]
        )
        for replica in list(self._core.replicas):
            up.add_metric([replica.id], replica.answers)
            restarts.add_metric([replica.id], replica.restarts)
            for state in State:
                states.add_metric([replica.id, state], replica.state is state)
        yield from (up, states, restarts, self._adapters(), self._loaded(), *self._residency())

    def _adapters(self) -> Metric:
        """Counts by state, so that the page does not grow with the registry."""
        registry, replicas = self._core.registry, self._core.replicas
        found = Counter(
            views.everywhere(adapter.shown, replicas, registry.everywhere)[0]
            for adapter in list(registry.adapters.values())
        )
        family = GaugeMetricFamily("tunegate_adapters", "Registered adapters by state.", labels=["state"])
        for state in views.STATES:
            family.add_metric([state], found[state])
        return family

    def _loaded(self) -> Metric:
        family = GaugeMetricFamily(
            "tunegate_replica_adapters", "Adapters on a replica by state.", labels=["replica", "state"]
        )
        for replica in list(self._core.replicas):
            for state, count in sorted(Counter(status.state for status in replica.adapters.values()).items()):
                family.add_metric([replica.id, state], count)
        return family

    def _residency(self) -> Iterator[Metric]:
        """Loads and evictions of each replica, what loads cost, and how often an adapter was there when asked for."""
        loads = CounterMetricFamily("tunegate_adapter_loads", "Adapters loaded and verified.", labels=["replica"])
        evictions = CounterMetricFamily("tunegate_adapter_evictions", "Adapters unloaded.", labels=["replica"])
        seconds = CounterMetricFamily(
            "tunegate_adapter_load_seconds", "Time that loads took, verification included.", labels=["replica"]
        )
        residents = self._core.residents
        for replica in list(self._core.replicas):
            counts = residents.counts[replica.id]
            loads.add_metric([replica.id], counts.loads)
            evictions.add_metric([replica.id], counts.evictions)
            seconds.add_metric([replica.id], counts.load_s)
        served = CounterMetricFamily("tunegate_adapter_requests", "Requests that went to an adapter, hits and misses.")
        served.add_metric([], residents.demand.served)
        waiting = GaugeMetricFamily("tunegate_adapters_waiting", "Adapters that requests wait for.")
        waiting.add_metric([], residents.waiting)
        yield from (loads, evictions, seconds, served, waiting)
