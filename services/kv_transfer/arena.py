"""The node's arena: one file in shared memory, faulted in before anybody maps it.

Invariants: every start makes a new file; a file without a lock on it belongs to a dead store and is removed by the
node's next one; no page is missing when the first engine attaches, so a full /dev/shm shows at start and not as a
SIGBUS in an engine.
"""

import contextlib
import errno
import fcntl
import logging
import mmap
import os
import re
import secrets
import time
from pathlib import Path

import msgspec
import psutil

from services.kv_transfer.slots import GIB, PAGE_BYTES, WORD_BYTES, Layout
from shared.errors import SettingsError

log = logging.getLogger(__name__)

MADV_POPULATE_WRITE = 23  # Linux 5.14; Python does not name it
PIECE_BYTES = 64 * 1024 * 1024
PROGRESS_S = 2.0
DEFAULT_BYTES = 2 * GIB
DEFAULT_SHARE = 0.1  # of memory
KEPT_FREE_BYTES = 256 * 1024 * 1024  # the OOM killer takes bystanders
CGROUP = Path("/sys/fs/cgroup")


class Memory(msgspec.Struct, frozen=True, kw_only=True):
    """What the machine, or the container, has."""

    total_bytes: int
    available_bytes: int
    shm_free_bytes: int


def look_at_memory(shm_dir: Path) -> Memory:
    """The tighter of machine and cgroup. Raises SettingsError when there is no shared memory folder."""
    machine = psutil.virtual_memory()
    total, available = machine.total, machine.available
    try:
        limit = int((CGROUP / "memory.max").read_text())
        used = int((CGROUP / "memory.current").read_text())
    except (OSError, ValueError):  # no cgroup v2, or "max"
        pass
    else:
        total, available = min(total, limit), min(available, limit - used)
    try:
        shm = os.statvfs(shm_dir)
    except OSError as error:
        raise SettingsError(f"setting 'shm_dir': {shm_dir}: {error.strerror}") from error
    return Memory(total_bytes=total, available_bytes=available, shm_free_bytes=shm.f_bavail * shm.f_frsize)


def choose_size(arena_gib: float, memory: Memory) -> int:
    """Bytes of the arena, whole pages. Raises SettingsError when they are not there."""
    wanted = arena_gib * GIB if arena_gib > 0 else min(DEFAULT_BYTES, DEFAULT_SHARE * memory.total_bytes)
    size = max(1, int(wanted) // PAGE_BYTES) * PAGE_BYTES
    if size > memory.shm_free_bytes:
        raise SettingsError(
            f"setting 'arena_gib': {size / GIB:.2f} GiB are wanted, but shared memory has {_gib(memory.shm_free_bytes)}"
            " free: lower arena_gib, or give the container more (docker: --shm-size; Kubernetes: a Memory emptyDir)"
        )
    if size > memory.available_bytes - KEPT_FREE_BYTES:
        raise SettingsError(
            f"setting 'arena_gib': {size / GIB:.2f} GiB are wanted, but only {_gib(memory.available_bytes)} of memory "
            "are available: lower arena_gib, stop something, or raise the container's memory limit"
        )
    return size


class Arena:
    """The open file. Use `create`, end with `close`."""

    def __init__(self, path: Path, lock_fd: int, mapped: mmap.mmap) -> None:
        self.path = path
        self.name = path.stem
        self.size_bytes = len(mapped)
        self._lock_fd = lock_fd
        self._mapped = mapped
        self._view = memoryview(mapped)
        self._words: memoryview | None = None

    @classmethod
    def create(cls, shm_dir: Path, cluster: str, node: str, arena_gib: float) -> "Arena":
        """Remove what dead predecessors left, check memory, create and fault in. Raises SettingsError."""
        if not shm_dir.is_dir():
            raise SettingsError(f"setting 'shm_dir': {shm_dir} is no folder")
        remove_stale(shm_dir, cluster, node)
        size = choose_size(arena_gib, look_at_memory(shm_dir))
        path = shm_dir / f"{_prefix(cluster, node)}{secrets.token_hex(4)}.arena"
        # Under its final name the file must be locked already, or a starting neighbour would think it stale.
        unlocked = path.with_suffix(".new")
        fd = os.open(unlocked, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            unlocked.rename(path)
            os.ftruncate(fd, size)
            mapped = mmap.mmap(fd, size)
            fault_in(mapped, fd)
        except BaseException as error:
            unlocked.unlink(missing_ok=True)
            path.unlink(missing_ok=True)
            os.close(fd)
            if isinstance(error, OSError):
                raise SettingsError(f"setting 'arena_gib': {size / GIB:.2f} GiB: {error.strerror}") from error
            raise
        return cls(path, fd, mapped)

    def words(self, layout: Layout) -> memoryview:
        """The words region of a cut, as uint64; the one given before is dead."""
        if self._words is not None:
            self._words.release()
        end = layout.words_offset + layout.slots * WORD_BYTES
        self._words = self._view[layout.words_offset : end].cast("Q")
        return self._words

    def words_now(self) -> memoryview:
        """The words region as it was cut last."""
        if self._words is None:
            raise AssertionError("the arena is not cut yet")
        return self._words

    def block(self, layout: Layout, block: int) -> memoryview:
        """A block's bytes, of all ranks."""
        size = layout.slot_bytes * layout.ranks
        start = layout.slots_offset + block * size
        return self._view[start : start + size]

    def close(self) -> None:
        """Unlink first: nobody new can map it, and those who have keep their pages until they unmap."""
        self.path.unlink(missing_ok=True)
        with contextlib.suppress(BufferError):  # a slot's view is still held somewhere: the process's end unmaps
            if self._words is not None:
                self._words.release()
            self._view.release()
            self._mapped.close()
        os.close(self._lock_fd)


def remove_stale(shm_dir: Path, cluster: str, node: str) -> list[Path]:
    """Unlink arenas of this node that no process has locked."""
    pattern = re.compile(re.escape(_prefix(cluster, node)) + r"[0-9a-f]{8}\.arena")
    removed = []
    for path in shm_dir.iterdir():
        if not pattern.fullmatch(path.name):
            continue
        try:
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except OSError:  # gone, or another user's
            continue
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()
            removed.append(path)
            log.info("arena: removed %s of a dead store", path.name)
        except BlockingIOError:
            log.warning("arena: %s is in use by another kv_transfer of node %s", path.name, node)
        finally:
            os.close(fd)
    return removed


def fault_in(mapped: mmap.mmap, fd: int) -> None:
    """Give every page its memory now. Raises OSError when there is not enough."""
    size = len(mapped)
    started = told = time.monotonic()
    for start in range(0, size, PIECE_BYTES):
        length = min(PIECE_BYTES, size - start)
        try:
            mapped.madvise(MADV_POPULATE_WRITE, start, length)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            os.posix_fallocate(fd, start, length)  # an old kernel: an error here instead of a SIGBUS below
            for page in range(start, start + length, PAGE_BYTES):
                mapped[page] = 0
        now = time.monotonic()
        if now - told > PROGRESS_S:
            told = now
            log.info("arena: %.1f of %.1f GiB faulted in", (start + length) / GIB, size / GIB)
    log.info("arena: %.2f GiB in %.1f s", size / GIB, time.monotonic() - started)


def _prefix(cluster: str, node: str) -> str:
    return f"baton-{cluster}-{node}-"


def _gib(size_bytes: int) -> str:
    return f"{max(0, size_bytes) / GIB:.2f} GiB"
