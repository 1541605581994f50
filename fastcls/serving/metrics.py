"""What a server counts, for Prometheus: under the names of text-embeddings-inference where it counts the same."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Histogram, generate_latest
from prometheus_client.metrics_core import Metric

_SECONDS = tuple(0.001 * 1.5**step for step in range(25))
_COUNTS = tuple(2.0**step for step in range(15))
_HELP = {
    "te_request_count": "Requests that came, by whether they held one text or a batch",
    "te_request_success": "Requests that were answered",
    "te_request_failure": "Requests that were refused or failed, by why",
    "te_queue_size": "Texts that wait for a pass",
    "fastcls_texts": "Texts that were computed",
    "fastcls_computed_tokens": "Tokens that were computed",
    "fastcls_padding_avoided_tokens": "Tokens of padding that a server that pads would have computed in these passes",
}
_UNLABELLED = ("fastcls_texts", "fastcls_computed_tokens", "fastcls_padding_avoided_tokens")


class Metrics:
    """Counters and histograms of one server.

    Args:
        waiting: how many texts wait now.
    """

    content_type = "text/plain; version=0.0.4; charset=utf-8"

    def __init__(self, waiting: Callable[[], int]) -> None:
        self._registry = CollectorRegistry()
        self._waiting = waiting
        # Those without a label are there before anything is counted, so that a rate has a beginning.
        self._counts: Counter[tuple[str, str, str]] = Counter({(name, "", ""): 0 for name in _UNLABELLED})

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(name, text, buckets=buckets, registry=self._registry)

        self._request = histogram("te_request_duration", "Seconds from a request to its answer", _SECONDS)
        self._tokenization = histogram("te_request_tokenization_duration", "Seconds of tokenization", _SECONDS)
        self._queue = histogram("te_request_queue_duration", "Seconds that a text waited", _SECONDS)
        self._inference = histogram("te_request_inference_duration", "Seconds of a text's pass", _SECONDS)
        self._size = histogram("te_batch_next_size", "Texts in a pass", _COUNTS)
        self._tokens = histogram("te_batch_next_tokens", "Tokens in a pass", _COUNTS)
        self._registry.register(self)

    def came(self, *, is_batch: bool) -> None:
        """A request has come that can be computed."""
        self._counts["te_request_count", "method", "batch" if is_batch else "single"] += 1

    def failed(self, reason: str) -> None:
        """A request was refused, or failed."""
        self._counts["te_request_failure", "err", reason] += 1

    def answered(self, *, is_batch: bool, total: float, tokenization: float, queue: float, inference: float) -> None:
        """A request was answered, after so many seconds."""
        self._counts["te_request_success", "method", "batch" if is_batch else "single"] += 1
        self._request.observe(total)
        self._tokenization.observe(tokenization)
        self._queue.observe(queue)
        self._inference.observe(inference)

    def passed(self, texts: int, tokens: int, padded: int) -> None:
        """A pass has ended, which padded would have had so many tokens."""
        self._counts["fastcls_texts", "", ""] += texts
        self._counts["fastcls_computed_tokens", "", ""] += tokens
        self._counts["fastcls_padding_avoided_tokens", "", ""] += padded - tokens
        self._size.observe(texts)
        self._tokens.observe(tokens)

    def collect(self) -> Iterator[Metric]:
        """The counters, called by the registry: its own would add "_total" to their names."""
        found = dict(self._counts)
        for name, text in _HELP.items():
            metric = Metric(name, text, "gauge" if name == "te_queue_size" else "unknown")
            if name == "te_queue_size":
                metric.add_sample(name, {}, self._waiting())
            for (counted, label, value), count in found.items():
                if counted == name:
                    metric.add_sample(name, {label: value} if label else {}, count)
            yield metric

    def text(self) -> bytes:
        """All of them, as Prometheus reads them."""
        found: bytes = generate_latest(self._registry)
        return found
