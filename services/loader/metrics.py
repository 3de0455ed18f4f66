"""What a loader counts beside its calls: loads, the memory that models take, and who holds leases on it."""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Histogram
from prometheus_client.core import GaugeMetricFamily, Metric

from services.loader.leases import Leases
from services.loader.loads import Loads
from services.loader.store import ModelStore

LOAD_SECONDS = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250)


class LoadMetrics:
    """Loads that have ended."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._seconds = Histogram(
            "mxgpt_loader_load_duration_seconds",
            "From the start of a load to its end, by outcome: OK, or the reason of its error.",
            ["outcome"],
            buckets=LOAD_SECONDS,
            registry=registry,
        )

    def on_ended(self, outcome: str, seconds: float) -> None:
        """A load has ended."""
        self._seconds.labels(outcome).observe(seconds)


def loader_metrics(store: ModelStore, loads: Loads, leases: Leases) -> Iterable[Metric]:
    """What is resident, who holds it, and how far the loads under way are."""
    memory = loads.options.memory
    resident = GaugeMetricFamily(
        "mxgpt_loader_resident_bytes", "Bytes of a model's planes.", labels=["model", "digest", "layout", "device"]
    )
    held = GaugeMetricFamily("mxgpt_loader_leases", "Leases that executors hold on a model.", labels=["model"])
    for model in store.models:
        manifest = model.manifest
        resident.add_metric([manifest.model, manifest.digest, manifest.layout, memory.device], model.resident_bytes)
        held.add_metric([manifest.model], len(leases.holders(model)))
    used = GaugeMetricFamily("mxgpt_loader_used_bytes", "Bytes in use there by anybody; 0: the CPU.", labels=["device"])
    used.add_metric([memory.device], memory.used_bytes())
    free = GaugeMetricFamily("mxgpt_loader_free_bytes", "Bytes free on the device of the weights.", labels=["device"])
    free.add_metric([memory.device], memory.free_bytes())
    done = GaugeMetricFamily("mxgpt_loader_load_done_bytes", "Bytes placed by a load under way.", labels=["model"])
    total = GaugeMetricFamily("mxgpt_loader_load_total_bytes", "Bytes that it will place in all.", labels=["model"])
    for load in loads.under_way:
        done.add_metric([load.source.name], load.progress.bytes_done)
        total.add_metric([load.source.name], load.progress.bytes_total)
    return [resident, held, used, free, done, total]
