"""What the service measures of itself. The names are the same with and without Ray Serve; who keeps the numbers is not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0)


@dataclass(frozen=True)
class Figure:
    """A metric: its name, what it is, its labels, and the bounds of its histogram if it is one."""

    name: str
    text: str
    labels: tuple[str, ...] = ()
    bounds: tuple[float, ...] = ()


COUNTERS = (
    Figure("chatray_requests", "Requests by endpoint and status.", ("path", "status")),
    Figure("chatray_prompt_tokens", "Tokens of prompts, hidden ones included.", ("model",)),
    Figure("chatray_reply_tokens", "Tokens written.", ("model",)),
    Figure("chatray_moderation_hits", "Texts over a threshold.", ("side", "action")),
    Figure("chatray_recitals", "Replies ended because they recited the hidden prompt.", ("model",)),
    Figure("chatray_abandoned", "Replies whose client left before the end.", ("model",)),
)
GAUGES = (Figure("chatray_ongoing", "Requests at work or waiting in this process."),)
HISTOGRAMS = (
    Figure("chatray_first_token_seconds", "From the request to its first text.", ("model",), SECONDS),
    Figure("chatray_token_seconds", "Time per token after the first, mean of each reply.", ("model",), TOKEN_SECONDS),
    Figure("chatray_reply_seconds", "From the request to the end of its reply.", ("model",), SECONDS),
    Figure("chatray_held_seconds", "Longest that text of a reply waited for the rest of its word and its verdict.", ("model",), SECONDS),
    Figure("chatray_moderation_seconds", "Time that judging a text took, waiting included.", ("side",), SECONDS),
)


class Metrics(Protocol):
    def count(self, name: str, by: float = 1.0, **labels: str) -> None: ...

    def set(self, name: str, value: float) -> None: ...

    def observe(self, name: str, value: float, **labels: str) -> None: ...

    def text(self) -> str | None:
        """All of it in Prometheus' form; None where somebody else publishes it."""


class PrometheusMetrics:
    """Kept in this process."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.counters = {f.name: Counter(f.name, f.text, f.labels, registry=self.registry) for f in COUNTERS}
        self.gauges = {f.name: Gauge(f.name, f.text, f.labels, registry=self.registry) for f in GAUGES}
        self.histograms = {f.name: Histogram(f.name, f.text, f.labels, buckets=f.bounds, registry=self.registry) for f in HISTOGRAMS}

    def count(self, name: str, by: float = 1.0, **labels: str) -> None:
        counter = self.counters[name]
        (counter.labels(**labels) if labels else counter).inc(by)

    def set(self, name: str, value: float) -> None:
        self.gauges[name].set(value)

    def observe(self, name: str, value: float, **labels: str) -> None:
        histogram = self.histograms[name]
        (histogram.labels(**labels) if labels else histogram).observe(value)

    def text(self) -> str | None:
        return generate_latest(self.registry).decode()
