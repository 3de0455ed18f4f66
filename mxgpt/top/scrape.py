"""One service's metrics at one moment."""

from __future__ import annotations

import http.client
import math
import ssl
import time
import urllib.error
import urllib.request
from collections import defaultdict
from dataclasses import dataclass

from prometheus_client.parser import text_string_to_metric_families

TIMEOUT_SECONDS = 3.0


@dataclass(frozen=True)
class Scrape:
    """Samples by name, each with its labels; counters' names end in _total, as they are told."""

    when: float  # time.monotonic()
    samples: dict[str, list[tuple[dict[str, str], float]]]

    def total(self, name: str, **labels: str) -> float:
        """The sum of a metric's samples that have these labels; 0 of none."""
        return sum(value for having, value in self.samples.get(name, ()) if labels.items() <= having.items())

    def by_label(self, name: str, label: str, **labels: str) -> dict[str, float]:
        """The same, for each value of one label."""
        found: dict[str, float] = defaultdict(float)
        for having, value in self.samples.get(name, ()):
            if labels.items() <= having.items():
                found[having.get(label, "")] += value
        return dict(found)

    def label(self, name: str, label: str) -> str:
        """A label of a metric that tells facts; empty where there is none."""
        samples = self.samples.get(name)
        return samples[0][0].get(label, "") if samples else ""

    def buckets(self, name: str) -> dict[float, float]:
        """Observations up to each bound of a histogram, all label values together."""
        return {_bound(text): count for text, count in self.by_label(f"{name}_bucket", "le").items()}


def scrape(address: str, tls: ssl.SSLContext | None = None) -> Scrape:
    """The metrics served on "host:port", over HTTPS where there is a `tls`.

    Raises:
        OSError: where nobody answers, or not in time.
        ValueError: where the answer is no metrics.
    """
    url = f"{'http' if tls is None else 'https'}://{address}/metrics"
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT_SECONDS, context=tls) as answer:
            text = answer.read().decode()
    except urllib.error.URLError as error:  # which is an OSError, but keeps what happened to itself
        raise error.reason if isinstance(error.reason, OSError) else error from None
    except http.client.HTTPException as error:
        raise ValueError(f"no HTTP is spoken there: {error!r}") from error
    samples: dict[str, list[tuple[dict[str, str], float]]] = defaultdict(list)
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            samples[sample.name].append((sample.labels, sample.value))
    return Scrape(time.monotonic(), dict(samples))


def quantile(before: dict[float, float], after: dict[float, float], share: float) -> float | None:
    """The value that `share` of the observations between two moments do not exceed, linear within its bucket.

    None where there were none. Values past the last finite bound count as that bound, as Prometheus has it.
    """
    bounds = sorted(after)
    counts = [max(0.0, after[bound] - before.get(bound, 0.0)) for bound in bounds]
    if not counts or counts[-1] <= 0:
        return None
    rank = share * counts[-1]
    lower, below = 0.0, 0.0
    for bound, count in zip(bounds, counts, strict=True):
        if count >= rank and count > below:
            return lower if math.isinf(bound) else lower + (bound - lower) * (rank - below) / (count - below)
        if not math.isinf(bound):
            lower = bound
        below = count
    return lower


def _bound(text: str) -> float:
    return math.inf if text == "+Inf" else float(text)
