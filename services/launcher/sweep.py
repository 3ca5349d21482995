"""Clean up what a launcher that was killed left: processes, sockets, shared memory. Also the last step of every end."""

import contextlib
import os
import shutil
import signal
import time
from collections.abc import Iterable
from pathlib import Path

import psutil

from services.launcher.state import ClusterFolder, ClusterRecord, ServiceRecord, born, lives

ORDER = (("gateway",), ("prefill", "decode"), ("kv",), ("redis",), ("nats",))  # who is stopped before whom
GRACE_S = 5.0  # they had a SIGTERM when their launcher died
LOOK_S = 0.05


def sweep(folder: ClusterFolder, record: ClusterRecord) -> int:
    """Stop the recorded processes that still live, tier by tier, and remove the files. Returns how many lived."""
    found = 0
    for roles in ORDER:
        left = [service for service in record.services if service.role in roles]
        processes = [process for service in left for process in _remains(service, record.run_folder)]
        found += len(processes)
        _stop(processes)
    remove_files(record)
    folder.forget()
    return found


def remove_files(record: ClusterRecord) -> None:
    """The run folder with its sockets, and this cluster's shared memory."""
    shutil.rmtree(record.run_folder, ignore_errors=True)
    for file in Path(record.shm_dir).glob(f"baton-{record.cluster}-*"):
        with contextlib.suppress(OSError):
            file.unlink()


def _remains(service: ServiceRecord, run_folder: str) -> Iterable[psutil.Process]:
    """The process, if it is still the one that was started, and what it left in its group."""
    if lives(service.pid, service.born):
        with contextlib.suppress(psutil.NoSuchProcess):
            yield psutil.Process(service.pid)
    if not service.pid or (born(service.pid) and not lives(service.pid, service.born)):
        return  # never started, or the number is somebody else's by now
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.pid == service.pid or os.getpgid(process.pid) != service.pid:
                continue
            # Every service knows this random path by its settings, and what it starts inherits them.
            if any(run_folder in value for value in process.environ().values()):
                yield process


def _stop(processes: list[psutil.Process]) -> None:
    for number in (signal.SIGTERM, signal.SIGKILL):
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(number)  # psutil checks that the number was not given again
        processes = until_gone(processes, GRACE_S)


def until_gone(processes: list[psutil.Process], limit_s: float) -> list[psutil.Process]:
    """Wait until they have ended, also where nobody waits for their zombies. Returns those that have not."""
    deadline = time.monotonic() + limit_s
    while (left := [process for process in processes if born(process.pid)]) and time.monotonic() < deadline:
        time.sleep(LOOK_S)  # other processes' children cannot be waited for
    return left
