"""What the launcher says to the terminal: lines, and how long each process has been starting."""

import contextlib
import shutil
import time
from collections.abc import Callable
from typing import TextIO

FIRST_S = 2.0
NEXT_S = 10.0


class Progress:
    """On a terminal the waiting processes share one line that is rewritten; elsewhere each gets a line now and then."""

    def __init__(self, out: TextIO, clock: Callable[[], float] = time.monotonic) -> None:
        self._out = out
        self._clock = clock
        self._started: dict[str, tuple[float, str]] = {}
        self._due: dict[str, float] = {}
        self._rewritten = out.isatty()
        self._shown = False

    def line(self, text: str) -> None:
        self._clear()
        self._write(text + "\n")

    def begin(self, name: str, what: str) -> None:
        """`name` starts to wait, or says something new of it."""
        began = self._started[name][0] if name in self._started else self._clock()
        self._started[name] = (began, what)
        self._due.setdefault(name, FIRST_S)

    def done(self, name: str, what: str = "") -> None:
        """It waits no more; said only if it took long enough to be noticed."""
        began, _ = self._started.pop(name, (self._clock(), ""))
        self._due.pop(name, None)
        if what and self._clock() - began >= FIRST_S:
            self.line(f"  {name} {what} after {self._clock() - began:.0f} s")

    def tick(self) -> None:
        """Call about once a second."""
        now = self._clock()
        waiting = {
            name: f"{name} {what} … {now - began:.0f} s"
            for name, (began, what) in self._started.items()
            if now - began >= FIRST_S
        }
        if self._rewritten:
            self._clear()
            if waiting:
                width = shutil.get_terminal_size().columns - 1  # a wrapped line could not be taken back
                self._write(("  " + " · ".join(waiting.values()))[:width])
                self._shown = True
            return
        for name, text in waiting.items():
            elapsed = now - self._started[name][0]
            if elapsed >= self._due[name]:
                self.line(f"  {text}")
                self._due[name] = elapsed + (FIRST_S + 1 if elapsed < NEXT_S else NEXT_S)

    def _clear(self) -> None:
        if self._shown:
            self._write("\r\x1b[K")
            self._shown = False

    def _write(self, text: str) -> None:
        with contextlib.suppress(OSError):  # the terminal may be gone; the cluster goes on
            self._out.write(text)
            self._out.flush()
