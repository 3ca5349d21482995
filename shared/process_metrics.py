"""What every service says of its own process: memory, descriptors, tasks. Leaks show here first."""

import asyncio

from prometheus_client import CollectorRegistry, Gauge, ProcessCollector


def watch_process(registry: CollectorRegistry) -> None:
    """Adds Prometheus's standard `process_*` samples and the number of asyncio tasks. Scrape on the loop."""
    ProcessCollector(registry=registry)
    tasks = Gauge("baton_tasks", "Asyncio tasks that have not ended", registry=registry)
    tasks.set_function(lambda: len(asyncio.all_tasks()))
