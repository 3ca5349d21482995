"""What serving costs, from prices in the settings: pure, time is an argument.

The cluster's price an hour is that of the processes whose beats are heard; this gateway's share of it is one part of as
many gateways as live, so that sums over gateways are right. Figures per token and request are of the last WINDOW_S.
"""

import collections
from collections.abc import Iterable
from dataclasses import dataclass, field

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from shared.settings import Prices

WINDOW_S = 300.0
STEP_S = 5.0  # between two marks of the window
HOUR_S = 3600.0
MILLION = 1e6


@dataclass(frozen=True, slots=True)
class _Mark:
    at: float
    cost: float
    tokens: float
    requests: float


@dataclass(slots=True, eq=False)
class Costs(Collector):
    prices: Prices
    per_hour: float = 0.0  # of the whole cluster
    total: float = 0.0  # this gateway's share, since it began
    _marks: collections.deque[_Mark] = field(default_factory=lambda: collections.deque(maxlen=int(WINDOW_S / STEP_S)))
    _last: _Mark = _Mark(0.0, 0.0, 0.0, 0.0)

    def see(self, roles: Iterable[str], *, tokens: float, requests: float, now: float) -> None:
        """At every beat. `roles`: of the processes that live; `tokens` and `requests`: served here so far."""
        living = list(roles)
        self.per_hour = sum(getattr(self.prices, role, 0.0) for role in living)
        share = self.per_hour / max(1, living.count("gateway"))
        if self._last.at:
            self.total += share * (now - self._last.at) / HOUR_S
        self._last = _Mark(now, self.total, tokens, requests)
        if not self._marks or now - self._marks[-1].at >= STEP_S:
            self._marks.append(self._last)

    def per(self, what: str) -> float:
        """Of one token or request (`tokens`, `requests`), of late; 0 while none was served."""
        if not self._marks:
            return 0.0
        first = self._marks[0]
        served = float(getattr(self._last, what) - getattr(first, what))
        return (self._last.cost - first.cost) / served if served else 0.0

    def collect(self) -> Iterable[Metric]:
        currency = [self.prices.currency]
        for name, text, value in (
            ("baton_cost_per_hour", "Of all processes of the cluster, by the prices in the settings", self.per_hour),
            ("baton_cost_per_million_tokens", "Prompt and completion, of late", self.per("tokens") * MILLION),
            ("baton_cost_per_request", "Of late", self.per("requests")),
        ):
            gauge = GaugeMetricFamily(name, text, labels=["currency"])
            gauge.add_metric(currency, value)
            yield gauge
        spent = CounterMetricFamily("baton_cost", "This gateway's share of what was spent", labels=["currency"])
        spent.add_metric(currency, self.total)
        yield spent
