"""What a launcher leaves on disk so that other commands find its cluster: `<home>/<port>/cluster.json` and logs.

Processes are known by pid and start time, never by name. cluster.json holds passwords, so only its user reads it.
"""

import fcntl
import os
from pathlib import Path
from typing import IO, Any

import msgspec

VERSION = 1


class ServiceRecord(msgspec.Struct, kw_only=True):
    role: str
    id: str
    node: str = ""
    pid: int = 0  # 0: not started
    born: str = ""  # see `born`
    state: str = "starting"  # starting | ready | draining | lost | stopped, as the launcher saw it last
    probe_url: str = ""
    settings: dict[str, Any] = {}


class ClusterRecord(msgspec.Struct, kw_only=True):
    version: int = VERSION
    cluster: str
    address: str
    model: str
    model_path: str
    arrangement: str
    pid: int  # of the launcher
    born: str
    run_folder: str
    shm_dir: str
    nats_url: str
    started: bool = False  # every process has been ready
    services: list[ServiceRecord]


class ClusterFolder:
    """One port's folder under BATON_HOME."""

    def __init__(self, home: Path, port: int) -> None:
        self.path = home / str(port)
        self.logs = self.path / "logs"
        self._record = self.path / "cluster.json"
        self._lock: IO[str] | None = None

    def create(self) -> None:
        self.logs.mkdir(parents=True, exist_ok=True)
        self.path.chmod(0o700)

    def take(self) -> bool:
        """Become this port's launcher until this process ends; False when another one is."""
        lock = (self.path / "lock").open("w")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.close()
            return False
        self._lock = lock
        return True

    def read(self) -> ClusterRecord | None:
        try:
            return msgspec.json.decode(self._record.read_bytes(), type=ClusterRecord)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except msgspec.DecodeError:
            return None  # of another version; its launcher is found by the lock

    def write(self, record: ClusterRecord) -> None:
        new = self._record.with_suffix(".new")
        new.touch(mode=0o600)
        new.write_bytes(msgspec.json.format(msgspec.json.encode(record), indent=2))
        new.replace(self._record)

    def forget(self) -> None:
        self._record.unlink(missing_ok=True)

    def log(self, service_id: str) -> Path:
        return self.logs / f"{service_id}.log"


def born(pid: int) -> str:
    """When a process started, in the kernel's own clock; "" when there is none or only its zombie is left.

    The boot's id comes first: ticks and pids begin again with every boot.
    """
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""
    state, *rest = stat.rpartition(")")[2].split()  # the name before it may hold spaces and brackets
    return "" if state in "ZX" else f"{boot}:{rest[18]}"


def lives(pid: int, since: str) -> bool:
    """Whether the recorded process, and not another one with its number, still runs."""
    return pid > 0 and bool(since) and born(pid) == since


def own_identity() -> tuple[int, str]:
    return os.getpid(), born(os.getpid())
