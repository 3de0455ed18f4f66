"""What a view remembers of each service: its scrapes of the last minute, and the rates that its sparklines draw."""

from __future__ import annotations

import ssl
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from mxgpt.top.scrape import Scrape, quantile, scrape

WINDOW = 30  # scrapes over which latencies and outcomes are taken
NUM_RATES = 240  # kept for sparklines


@dataclass
class Watched:
    """One service."""

    address: str
    scrapes: deque[Scrape] = field(default_factory=lambda: deque(maxlen=WINDOW))
    rates: deque[float] = field(default_factory=lambda: deque(maxlen=NUM_RATES))  # tokens or calls a second
    error: str = "not asked yet"  # why the last scrape brought nothing; empty if it brought something

    @property
    def is_there(self) -> bool:
        """It answered the last time."""
        return not self.error

    @property
    def now(self) -> Scrape:
        return self.scrapes[-1]

    @property
    def service(self) -> str:
        """ "loader", "tokenizer" or "executor"; empty where it has never answered."""
        return self.now.label("mxgpt_info", "service") if self.scrapes else ""

    def add(self, found: Scrape | str) -> None:
        """Take the newest scrape in, or why there is none."""
        if isinstance(found, str):
            self.error = found
            self.rates.append(0.0)
            return
        self.error = ""
        if self.scrapes and found.total("process_start_time_seconds") != self.now.total("process_start_time_seconds"):
            self.scrapes.clear()  # started again, its counters from 0
        self.scrapes.append(found)
        if len(self.scrapes) > 1:
            self.rates.append(self.rate(_RATES.get(self.service, "")))

    def rate(self, name: str, **labels: str) -> float:
        """A counter's growth a second since the last scrape but one."""
        if len(self.scrapes) < 2 or not self.is_there:
            return 0.0
        before = self.scrapes[-2]
        grown = self.now.total(name, **labels) - before.total(name, **labels)
        return max(0.0, grown) / (self.now.when - before.when)

    def recent(self, name: str, label: str, **labels: str) -> dict[str, float]:
        """A counter's growth within the window, for each value of a label; a new value has grown from 0."""
        before = self.scrapes[0].by_label(name, label, **labels)
        after = self.now.by_label(name, label, **labels)
        return {value: count - before.get(value, 0.0) for value, count in after.items()}


_RATES = {
    "executor": "mxgpt_executor_output_tokens_total",
    "tokenizer": "mxgpt_tokenizer_decoded_tokens_total",
    "loader": "mxgpt_loader_calls_total",
}


class History:
    """All services of a view.

    Args:
        addresses: "host:port" of each one's metrics.
        tls: for HTTPS.
    """

    def __init__(self, addresses: Sequence[str], tls: ssl.SSLContext | None = None) -> None:
        self.watched = [Watched(address) for address in addresses]
        self.rates: deque[float] = deque(maxlen=NUM_RATES)  # tokens a second, of all executors
        self.running: deque[float] = deque(maxlen=NUM_RATES)  # their sequences in the batch
        self._tls = tls
        self._pool = ThreadPoolExecutor(max_workers=min(32, len(addresses)))

    def update(self) -> None:
        """Ask every service, all at once."""
        found = self._pool.map(lambda watched: _scrape(watched.address, self._tls), self.watched)
        for watched, scraped in zip(self.watched, found, strict=True):
            watched.add(scraped)
        executors = self.of("executor")
        if any(len(each.scrapes) > 1 for each in executors):
            self.rates.append(sum(each.rates[-1] for each in executors if each.rates))
            there = [each.now for each in executors if each.is_there]
            self.running.append(sum(now.total("mxgpt_executor_sequences", state="running") for now in there))

    def forget_absent(self) -> None:
        """Leave out the addresses that have not answered so far."""
        self.watched = [each for each in self.watched if each.scrapes]

    def of(self, service: str) -> list[Watched]:
        """The services of a kind, those that have gone included."""
        return [each for each in self.watched if each.service == service]

    def quantile(self, name: str, share: float, services: Sequence[Watched]) -> float | None:
        """A quantile of a histogram of several services, over the window; None without observations."""
        before: dict[float, float] = {}
        after: dict[float, float] = {}
        for each in services:
            for total, buckets in ((before, each.scrapes[0].buckets(name)), (after, each.now.buckets(name))):
                for bound, count in buckets.items():
                    total[bound] = total.get(bound, 0.0) + count
        return quantile(before, after, share)

    def close(self) -> None:
        """Stop asking."""
        self._pool.shutdown(wait=False, cancel_futures=True)


def _scrape(address: str, tls: ssl.SSLContext | None) -> Scrape | str:
    try:
        return scrape(address, tls)
    except (OSError, ValueError) as error:
        return str(error) or type(error).__name__
