"""Counters of a server in Prometheus' text format (version 0.0.4). Used from the event loop's thread alone."""

from __future__ import annotations

import bisect
import collections

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0)
SIZES = (1, 2, 4, 8, 16, 32)


class Histogram:
    """Cumulative buckets, sum and count."""

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self._bounds, self._counts, self._sum = bounds, [0] * (len(bounds) + 1), 0.0

    def add(self, value: float) -> None:
        """One more observation."""
        self._counts[bisect.bisect_left(self._bounds, value)] += 1
        self._sum += value

    def lines(self, name: str) -> list[str]:
        """As Prometheus reads it."""
        out, total = [], 0
        for bound, count in zip((*self._bounds, "+Inf"), self._counts, strict=True):
            total += count
            out.append(f'{name}_bucket{{le="{bound}"}} {total}')
        return [*out, f"{name}_sum {self._sum}", f"{name}_count {total}"]


class Metrics:
    """What a server counts.

    Attributes:
      clients: connected now.
      requests: answered with actions.
      errors: answered otherwise, by reason.
    """

    def __init__(self) -> None:
        self.clients = 0
        self.connections = 0
        self.requests = 0
        self.errors: collections.Counter[str] = collections.Counter()
        self.request_seconds = Histogram(SECONDS)
        self.infer_seconds = Histogram(SECONDS)
        self.batch_size = Histogram(SIZES)

    def text(self) -> str:
        """The page of /metrics."""
        lines: list[str] = []

        def add(name: str, kind: str, what: str, values: list[str]) -> None:
            lines.extend([f"# HELP openpi_port_{name} {what}", f"# TYPE openpi_port_{name} {kind}", *values])

        def one(name: str, kind: str, what: str, value: int) -> None:
            add(name, kind, what, [f"openpi_port_{name} {value}"])

        one("clients", "gauge", "connected clients", self.clients)
        one("connections_total", "counter", "connections accepted", self.connections)
        one("requests_total", "counter", "requests answered with actions", self.requests)
        errors = [f'openpi_port_errors_total{{reason="{reason}"}} {n}' for reason, n in sorted(self.errors.items())]
        add("errors_total", "counter", "requests answered with an error", errors)
        for name, what in (
            ("request_seconds", "from a request's arrival to its reply"),
            ("infer_seconds", "one pass of the model"),
            ("batch_size", "requests in one pass of the model"),
        ):
            add(name, "histogram", what, getattr(self, name).lines(f"openpi_port_{name}"))
        return "\n".join(lines) + "\n"
