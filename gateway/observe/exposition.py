"""Control's side of the relays' metrics: every relay's cells, summed, as a Prometheus collector."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric as Family
from prometheus_client.registry import Collector

from gateway.observe.cells import read_series
from gateway.observe.series import METRICS, Metric

_Labels = tuple[str, ...]


class RelayCollector(Collector):
    """Register it beside control's own metrics: `registry.register(RelayCollector(run_dir))`."""

    def __init__(self, run_dir: Path) -> None:
        self._run_dir = run_dir

    def describe(self) -> list[Family]:
        """Nothing: names are known without reading, and none clash."""
        return []

    def collect(self) -> Iterator[Family]:
        """Every metric, with relays that share labels added up."""
        totals = sum_relays(self._run_dir)
        for metric in METRICS.values():
            yield _family(metric, totals.get(metric.name, {}))


def sum_relays(run_dir: Path) -> dict[str, dict[_Labels, list[int]]]:
    """metric name -> label values -> cells, added over all relays' files in `run_dir`."""
    totals: dict[str, dict[_Labels, list[int]]] = defaultdict(dict)
    for path in sorted(run_dir.glob("relay-*.cells")):
        try:
            for metric, labels, cells in read_series(path):
                key = tuple(labels[name] for name in metric.labels)
                known = totals[metric.name].get(key)
                added = cells.tolist() if known is None else [a + b for a, b in zip(known, cells, strict=True)]
                totals[metric.name][key] = added
        except FileNotFoundError:
            continue  # a relay that is starting: its list comes after its cells
    return totals


def _family(metric: Metric, series: dict[_Labels, list[int]]) -> Family:
    if metric.kind == "histogram":
        histogram = HistogramMetricFamily(metric.name, metric.help, labels=metric.labels)
        for labels, cells in sorted(series.items()):
            histogram.add_metric(labels, _cumulative(metric, cells), sum_value=cells[-1] / metric.per_unit)
        return histogram
    kind = CounterMetricFamily if metric.kind == "counter" else GaugeMetricFamily
    family = kind(metric.name, metric.help, labels=metric.labels)
    for labels, cells in sorted(series.items()):
        family.add_metric(labels, cells[0] / metric.per_unit if metric.per_unit > 1 else cells[0])
    return family


def _cumulative(metric: Metric, cells: list[int]) -> list[tuple[str, float]]:
    """Prometheus buckets count everything up to their bound; ours count only what is between two."""
    buckets, seen = [], 0
    for bound, count in zip([*(str(float(bound)) for bound in metric.buckets), "+Inf"], cells[:-1], strict=True):
        seen += count
        buckets.append((bound, float(seen)))
    return buckets
