"""How fast blocks come from other nodes, as placement is told."""

import threading

WEIGHT_BYTES = 64 * 1024 * 1024  # what came this many bytes ago counts for little


class Speed:
    """Bytes a second while a block's bytes come; what waits for the next block to be computed does not count."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._bytes = 0.0
        self._seconds = 0.0

    def saw(self, size_bytes: int, seconds: float) -> None:
        """From any thread."""
        with self._lock:
            kept = max(0.0, 1 - size_bytes / WEIGHT_BYTES)
            self._bytes = self._bytes * kept + size_bytes
            self._seconds = self._seconds * kept + seconds

    @property
    def bytes_per_s(self) -> float:
        """0: not known."""
        with self._lock:
            return self._bytes / self._seconds if self._seconds > 0 else 0.0
