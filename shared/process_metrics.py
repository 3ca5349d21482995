"""What every service says of its own process: memory, descriptors, tasks. Leaks show here first."""

import asyncio

from prometheus_client import CollectorRegistry, Gauge, ProcessCollector

from shared import telemetry


def watch_process(registry: CollectorRegistry) -> None:
    """Adds Prometheus's standard `process_*` samples and the number of asyncio tasks. Scrape on the loop."""
    ProcessCollector(registry=registry)
    tasks = Gauge("baton_tasks", "Asyncio tasks that have not ended", registry=registry)
    tasks.set_function(lambda: len(asyncio.all_tasks()))
    dropped = Gauge("baton_log_lines_dropped", "Log lines that nobody took in time", registry=registry)
    dropped.set_function(telemetry.dropped_logs)
