"""Log lines on their way to a stream that may block, without whoever logs waiting for it.

One thread writes; whoever logs only appends. Invariants: what waits is bounded, and what does not fit is dropped and
counted, in the log itself as soon as it flows again; at the end what waits is written, for EXIT_S at most.
"""

import atexit
import os
import threading
from typing import TextIO

MAX_BYTES = 1024 * 1024  # characters, to be exact: some thousand lines
TOGETHER_S = 0.02  # lines that come within it are one write
EXIT_S = 2.0


class LogWriter:
    """A stream for logging.StreamHandler, in front of another."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._lines: list[str] = []
        self._size = 0
        self.dropped = 0  # lines, since the start
        self._untold = 0
        self._lock = threading.Lock()
        self._has_work = threading.Event()
        self._is_idle = threading.Event()
        self._is_idle.set()
        self._start()
        os.register_at_fork(after_in_child=self._start)  # a child has no thread but the one that forked
        atexit.register(self.close)

    def write(self, text: str) -> None:
        """Never waits."""
        with self._lock:
            if self._size + len(text) > MAX_BYTES:
                self.dropped += 1
                self._untold += 1
                return
            self._lines.append(text)
            self._size += len(text)
            self._is_idle.clear()
        self._has_work.set()

    def flush(self) -> None:
        """Of the interface: the thread does it."""

    def close(self) -> None:
        """Wait for the thread, a little."""
        self._is_idle.wait(EXIT_S)

    def _start(self) -> None:
        threading.Thread(target=self._run, name="log-writer", daemon=True).start()

    def _run(self) -> None:
        while True:
            self._has_work.wait()
            self._has_work.clear()
            threading.Event().wait(TOGETHER_S)
            with self._lock:
                lines, self._lines, self._size = self._lines, [], 0
                untold, self._untold = self._untold, 0
            if untold:
                lines.append(f"{untold} log lines were lost: nobody took them\n")
            try:
                self._stream.write("".join(lines))
                self._stream.flush()
            except (OSError, ValueError):  # whoever read it has gone
                self.dropped += len(lines)
            with self._lock:
                if not self._lines:
                    self._is_idle.set()
