"""How many bytes of request bodies a gateway holds at once, over all its clients, until they are checked."""

from prometheus_client import CollectorRegistry, Gauge

from shared.errors import QueueFull

RETRY_AFTER_S = 1.0


class Intake:
    def __init__(self, max_bytes: int, registry: CollectorRegistry) -> None:
        self._max_bytes = max_bytes
        self._held_bytes = 0
        Gauge(
            "baton_body_bytes", "Of request bodies that are arriving or being checked", registry=registry
        ).set_function(lambda: self._held_bytes)

    def take(self, size_bytes: int) -> None:
        """Raises QueueFull; then nothing was taken."""
        if self._held_bytes + size_bytes > self._max_bytes:
            raise QueueFull("too many large bodies are arriving", retry_after_s=RETRY_AFTER_S)
        self._held_bytes += size_bytes

    def give_back(self, size_bytes: int) -> None:
        self._held_bytes -= size_bytes
