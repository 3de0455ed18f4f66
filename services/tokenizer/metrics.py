"""What a tokenizer counts beside its calls: tokens both ways, streams and the sequences on them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge
from prometheus_client.core import GaugeMetricFamily, Metric

from mxgpt.v1 import tokenizer_pb2
from services.tokenizer.backends import Tokenizer


class TokenizerMetrics:
    """Counters of one tokenizer; a stream's are counted once a message, which is once an engine step."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.encoded = Counter("mxgpt_tokenizer_encoded_tokens", "Ids that texts became.", registry=registry)
        self.decoded = Counter("mxgpt_tokenizer_decoded_tokens", "Ids that became text.", registry=registry)
        self._streams = Gauge("mxgpt_tokenizer_streams", "Streams open; each executor has one.", registry=registry)
        self._sequences = Gauge("mxgpt_tokenizer_sequences", "Sequences open on all streams.", registry=registry)

    @contextlib.contextmanager
    def stream(self) -> Iterator[WatchedStream]:
        """Watch over one stream."""
        self._streams.inc()
        watched = WatchedStream(self.decoded, self._sequences)
        try:
            yield watched
        finally:
            watched.close()
            self._streams.dec()


class WatchedStream:
    """The sequences and ids of one stream."""

    def __init__(self, decoded: Counter, sequences: Gauge) -> None:
        self._decoded = decoded
        self._sequences = sequences
        self._num_sequences = 0

    def count(self, request: tokenizer_pb2.DetokenizeStreamRequest, num_sequences: int) -> None:
        """Take one message into account; what a replay or a resume says was released before is not counted again."""
        num_replayed = sum(max(0, len(each.replayed_token_ids) - each.num_released) for each in request.opens)
        self._decoded.inc(num_replayed + sum(len(tokens.token_ids) for tokens in request.tokens))
        if num_sequences != self._num_sequences:
            self._sequences.inc(num_sequences - self._num_sequences)
            self._num_sequences = num_sequences

    def close(self) -> None:
        """The stream has ended, and its sequences with it."""
        self._sequences.dec(self._num_sequences)


def store_metrics(tokenizers: Sequence[Tokenizer]) -> Iterable[Metric]:
    """Whose tokenizers are at hand."""
    models = GaugeMetricFamily(
        "mxgpt_tokenizer_model", "1 for each model whose tokenizer is at hand.", labels=["model", "digest", "backend"]
    )
    for tokenizer in tokenizers:
        models.add_metric([tokenizer.data.model, tokenizer.data.digest, tokenizer.backend], 1)
    return [models]
