"""What this machine has: cores, memory, shared memory, GPUs and free ports. Linux only; decides nothing."""

import importlib.metadata
import os
import random
import shutil
import socket
import subprocess
from collections.abc import Sequence
from pathlib import Path

import msgspec
import psutil

GIB = 1024**3
LOOPBACK = "127.0.0.1"


class Machine(msgspec.Struct, frozen=True, kw_only=True):
    """`cores` are the physical cores that this process may use, each with its hardware threads."""

    cores: tuple[tuple[int, ...], ...]
    memory_bytes: int
    free_memory_bytes: int
    free_shm_bytes: int
    gpus: tuple[str, ...] = ()  # as CUDA_VISIBLE_DEVICES names them; empty: the engines run on the CPU


def read_machine(shm_dir: str) -> Machine:
    total, free = _memory()
    return Machine(
        cores=_cores(),
        memory_bytes=total,
        free_memory_bytes=free,
        free_shm_bytes=shutil.disk_usage(shm_dir).free if Path(shm_dir).is_dir() else 0,
        gpus=_gpus(),
    )


def free_ports(count: int) -> list[int]:
    """Different loopback ports that nobody listens on, below the range from which the kernel takes ports for clients.

    So no outgoing connection can take one before the service listens there.
    """
    low = _first_number(Path("/proc/sys/net/ipv4/ip_local_port_range")) or 32768
    candidates = range(max(1024, low - 16000), low) if low > 4096 else range(49152, 65536)
    found: list[int] = []
    for port in random.sample(candidates, len(candidates)):
        if len(found) == count:
            break
        if not port_taken(LOOPBACK, port):
            found.append(port)
    return found


def port_taken(host: str, port: int) -> str | None:
    """None, or why nobody can listen there."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
            probe.listen(1)
        except OSError as error:
            return error.strerror or str(error)
    return None


def hold_port(host: str, port: int) -> socket.socket:
    """Keep a port for processes of this user that share it, as long as this socket is open. Raises OSError.

    It never listens, so no connection comes here; and who does not ask to share is refused, also while none of the
    processes runs.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    holder = socket.socket(family, socket.SOCK_STREAM)
    try:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        # Beside what a gateway with the port to itself left in TIME_WAIT, and then beside nobody who does not share.
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.bind((host, port))
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 0)
    except OSError:
        holder.close()
        raise
    return holder


def _memory() -> tuple[int, int]:
    """Total and available bytes, of the machine or of the container's limit."""
    machine = psutil.virtual_memory()
    total, free = int(machine.total), int(machine.available)
    for limit_file, used_file in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):
        limit, used = _first_number(Path(limit_file)), _first_number(Path(used_file))
        if limit is not None and limit < total:
            total = limit
            free = min(free, limit - (used or 0))
    return total, max(free, 0)


def _cores() -> tuple[tuple[int, ...], ...]:
    allowed = sorted(os.sched_getaffinity(0))
    siblings: dict[str, list[int]] = {}
    for cpu in allowed:
        topology = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        try:
            group = topology.read_text().strip()
        except OSError:
            group = str(cpu)
        siblings.setdefault(group, []).append(cpu)
    cores = tuple(tuple(group) for group in siblings.values())
    quota = _cpu_quota()
    return cores[:quota] if quota else cores


def _cpu_quota() -> int | None:
    """Whole cores that a container may use at once, or None without a limit."""
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()[:2]
    except (OSError, ValueError):
        return None
    return None if quota == "max" else max(1, int(quota) // int(period))


def _gpus() -> tuple[str, ...]:
    """GPUs, where the installed vLLM is the one that uses them."""
    try:
        importlib.metadata.version("vllm")
    except importlib.metadata.PackageNotFoundError:
        return ()
    if (visible := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return tuple(name.strip() for name in visible.split(",") if name.strip())
    return tuple(str(index) for index, line in enumerate(_output(["nvidia-smi", "-L"])) if line.startswith("GPU "))


def _output(command: Sequence[str]) -> list[str]:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return done.stdout.splitlines()


def _first_number(path: Path) -> int | None:
    try:
        return int(path.read_text().split()[0])
    except (OSError, ValueError, IndexError):
        return None
