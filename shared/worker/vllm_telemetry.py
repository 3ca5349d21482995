"""What vLLM says of itself: its own span of each request inside ours, and its metrics under their own names.

vLLM traces only when it was given a collector of its own to export to. Here its spans are made by this process's
recorder (shared/spans.py), so they belong to the request's trace and go where all of that goes, collector or not.
Invariant: where the engine was started with an `otlp_traces_endpoint`, nothing is changed.
"""

import logging
from collections.abc import Iterable
from typing import TYPE_CHECKING

from prometheus_client import REGISTRY
from prometheus_client.core import Metric
from prometheus_client.registry import Collector

if TYPE_CHECKING:
    from vllm.v1.engine.async_llm import AsyncLLM

log = logging.getLogger(__name__)

PREFIX = "vllm:"
HERE = "baton"  # no address: vLLM only looks whether there is one, once it has started


def trace_requests(llm: "AsyncLLM") -> None:
    """After the engine's start: EngineCore must not look for a collector."""
    try:
        if llm.observability_config.otlp_traces_endpoint is None:
            llm.observability_config.otlp_traces_endpoint = HERE
            llm.output_processor.tracing_enabled = True
    except AttributeError as error:  # another version of vLLM: its span is missing, nothing else
        log.info("engine: vLLM's own spans cannot be had: %s", error)


class EngineMetrics(Collector):
    """vLLM's families out of the process's default registry."""

    def collect(self) -> Iterable[Metric]:
        return (metric for metric in REGISTRY.collect() if metric.name.startswith(PREFIX))
