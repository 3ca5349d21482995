"""The drivers' processes: forked before anything runs, started together, stopped together, their notes collected.

Invariants: each driver counts from its own clock's "go"; a driver ends when its parent does; one that dies costs its
own rows and no more, and is named.
"""

import asyncio
import contextlib
import gc
import multiprocessing
import resource
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Self

import msgspec
import uvloop

from loadtest.load.drive import Driver, Job, Progress
from loadtest.load.records import Share

GO, STOP = b"go", b"stop"
YOUNG = 50_000  # objects between two collections: a full one pauses every stream
END_S = 5.0


class _Ended(msgspec.Struct, frozen=True, tag=True):
    share: Share


class _Heard(msgspec.Struct, frozen=True, tag=True):
    progress: Progress


_decoder = msgspec.msgpack.Decoder(_Ended | _Heard)
_encode = msgspec.msgpack.Encoder().encode


class _Ends(msgspec.Struct, frozen=True):
    """One process's ends of two pipes: words from the parent, notes from the driver."""

    words: Connection
    notes: Connection

    def close(self) -> None:
        self.words.close()
        self.notes.close()


class Crew:
    """`with Crew(jobs) as crew: await crew.run(...)`. Enter it where no event loop and no thread runs."""

    def __init__(self, jobs: Sequence[Job]) -> None:
        self._jobs = jobs
        self._pipes: list[_Ends] = []
        self._processes: list[BaseProcess] = []
        self.shares: list[Share] = []  # after `run`; not its result, because uvloop makes a text of what a task returns
        self.lost: list[str] = []  # what became of drivers that did not end as they should

    def __enter__(self) -> Self:
        fork = multiprocessing.get_context("fork")
        for job in self._jobs:
            (words_out, words_in), (notes_out, notes_in) = fork.Pipe(duplex=False), fork.Pipe(duplex=False)
            self._pipes.append(_Ends(words_in, notes_out))
            theirs = _Ends(words_out, notes_in)
            process = fork.Process(
                target=_child, args=(job, theirs, tuple(self._pipes)), name=f"driver-{job.part}", daemon=True
            )
            process.start()
            theirs.close()
            self._processes.append(process)
        return self

    def __exit__(self, *_: object) -> None:
        for ends in self._pipes:
            ends.close()
        for process in self._processes:
            process.join(END_S)
            if process.is_alive():
                process.kill()
                process.join()

    async def run(self, on_progress: Callable[[int, Progress], None]) -> None:
        """From "go" to the last driver's end."""
        loop = asyncio.get_running_loop()

        def heard(part: int, progress: Progress) -> None:
            loop.call_soon_threadsafe(on_progress, part, progress)

        with ThreadPoolExecutor(len(self._jobs), "driver") as threads:
            listening = [loop.run_in_executor(threads, self._listen, part, heard) for part in range(len(self._jobs))]
            self._say(GO)
            self.shares = [share for share in await asyncio.gather(*listening) if share is not None]

    def stop(self) -> None:
        """Drivers give up what is in flight and tell what they have."""
        self._say(STOP)

    def kill(self) -> None:
        """Drivers end at once; what they know is lost."""
        for process in self._processes:
            process.kill()

    def _say(self, word: bytes) -> None:
        for ends in self._pipes:
            with contextlib.suppress(OSError):  # that one has ended
                ends.words.send_bytes(word)

    def _listen(self, part: int, heard: Callable[[int, Progress], None]) -> Share | None:
        """In a thread: an event loop would make the pipe non-blocking, and a share is larger than a pipe."""
        notes = self._pipes[part].notes
        try:
            while True:
                message = _decoder.decode(notes.recv_bytes())
                if isinstance(message, _Ended):
                    return message.share
                heard(part, message.progress)
        except (EOFError, OSError):
            self._processes[part].join(END_S)
            self.lost.append(f"driver {part} ended with {self._processes[part].exitcode}")
            return None


def _child(job: Job, ends: _Ends, parents: Sequence[_Ends]) -> None:
    """A driver's whole life. `parents`: ends that the fork has copied; while one is open, nobody sees an end."""
    for other in parents:
        other.close()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    _raise_file_limit()
    gc.freeze()
    gc.set_threshold(YOUNG, 50, 100)
    try:
        if ends.words.recv_bytes() == GO:
            uvloop.run(_driven(job, ends))
    except (EOFError, BrokenPipeError):
        sys.exit(1)  # the parent is gone
    except Exception:  # noqa: BLE001 - a process boundary: the parent names the driver and goes on without it
        traceback.print_exc()
        sys.exit(1)


async def _driven(job: Job, ends: _Ends) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.add_reader(ends.words.fileno(), stop.set)  # a word after "go", or the parent's end
    try:
        share = await Driver(job, lambda progress: ends.notes.send_bytes(_encode(_Heard(progress)))).run(stop)
        ends.notes.send_bytes(_encode(_Ended(share)))
    finally:
        loop.remove_reader(ends.words.fileno())


def _raise_file_limit() -> None:
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
