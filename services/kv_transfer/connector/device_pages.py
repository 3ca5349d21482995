"""An engine's KV pages on a CUDA device: batches of blocks, gathered there and copied to and from pinned memory.

A slot's bytes are those that `HostPages` would give it. Pages are gathered into rows of a staging tensor, one kernel a
layer; a row is a slot, and goes over the bus in one copy on a stream of our own. Invariants: the engine's thread never
waits for its stream, nor its stream for a copy; nothing here runs unordered with what the engine had enqueued before: a
read takes pages after `mark`, a snapshot is taken in the engine's own stream, so pages may be given out again as soon
as it is enqueued.
"""

import logging
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch

from shared.errors import KvLost

log = logging.getLogger(__name__)

STAGING_BYTES = 128 * 1024 * 1024  # of the copying thread
SNAPSHOT_BYTES = 512 * 1024 * 1024  # on their way out at once
SNAPSHOT_S = 5.0
HOST_REGISTER_PORTABLE = 1
WORDS = (torch.int64, torch.int32, torch.uint8)


class PageTable:
    """Every layer's pages as rows of wide words: kernels that move single bytes are several times slower."""

    def __init__(self, layers: Sequence[torch.Tensor]) -> None:
        pages = [layer.view(torch.uint8).reshape(layer.shape[0], -1) for layer in layers]
        self.slot_bytes = sum(page.shape[1] for page in pages)
        word = next(
            w for w in (torch.int64, torch.int32, torch.uint8) if all(p.shape[1] % w.itemsize == 0 for p in pages)
        )
        self._word = word
        self._layers: list[tuple[torch.Tensor, int, int]] = []  # pages, and where they lie in a slot, in words
        start = 0
        for page in pages:
            wide = page.view(word)
            self._layers.append((wide, start, start + wide.shape[1]))
            start += wide.shape[1]

    def rows(self, count: int, device: torch.device) -> torch.Tensor:
        """Memory for so many slots, as bytes."""
        return torch.empty((count, self.slot_bytes), dtype=torch.uint8, device=device)

    def gather(self, block_ids: torch.Tensor, rows: torch.Tensor) -> None:
        """Pages -> rows."""
        wide = rows.view(self._word)
        for pages, start, end in self._layers:
            wide[:, start:end] = pages.index_select(0, block_ids)

    def scatter(self, block_ids: torch.Tensor, rows: torch.Tensor) -> None:
        """Rows -> pages."""
        wide = rows.view(self._word)
        for pages, start, end in self._layers:
            pages.index_copy_(0, block_ids, wide[:, start:end])


class Budget:
    """So many bytes at once; who wants more waits for others to give theirs back. Thread-safe."""

    def __init__(self, size_bytes: int) -> None:
        self._left = self._size = size_bytes
        self._changed = threading.Condition()

    def take(self, size_bytes: int, timeout_s: float) -> None:
        """Raises KvLost at the timeout. One that is larger than the whole budget goes alone."""
        size_bytes = min(size_bytes, self._size)
        with self._changed:
            if not self._changed.wait_for(lambda: self._left >= size_bytes, timeout_s):
                raise KvLost(f"copies out of the device are {timeout_s:g} s behind")
            self._left -= size_bytes

    def give(self, size_bytes: int) -> None:
        with self._changed:
            self._left += min(size_bytes, self._size)
            self._changed.notify_all()


class DevicePages:
    """`read` and `write` belong to one copying thread, `mark` and `snapshot` to the engine's."""

    def __init__(self, layers: Sequence[torch.Tensor]) -> None:
        self._table = PageTable(layers)
        self._device = layers[0].device
        self.slot_bytes = self._table.slot_bytes
        self.at_once = max(1, STAGING_BYTES // self.slot_bytes)
        self._stream = torch.cuda.Stream(self._device)
        self._staging = self.rows(self.at_once)
        self._budget = Budget(SNAPSHOT_BYTES)
        self._marked: torch.cuda.Event | None = None

    def mark(self) -> None:
        """What the engine has enqueued until now comes before every copy that begins from here on."""
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self._device))
        self._marked = event

    def read(self, block_ids: Sequence[int], slots: Sequence[memoryview]) -> None:
        with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            self._after_marked()
            rows = self._staging[: len(block_ids)]
            self._table.gather(self._ids(block_ids), rows)
            self.copy_rows(rows, slots)

    def write(self, block_ids: Sequence[int], slots: Sequence[memoryview]) -> None:
        with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            self._after_marked()
            rows = self._staging[: len(block_ids)]
            for row, slot in zip(rows, slots, strict=True):
                row.copy_(torch.frombuffer(slot, dtype=torch.uint8), non_blocking=True)
            self._table.scatter(self._ids(block_ids), rows)
        self._stream.synchronize()

    def rows(self, count: int) -> torch.Tensor:
        """Device memory for so many slots."""
        return self._table.rows(count, self._device)

    def snapshot(self, block_ids: Sequence[int]) -> "Snapshot":
        """These pages as they are once all is done that the engine has enqueued; at most `at_once`.

        Raises KvLost when too many are still on their way out.
        """
        size = len(block_ids) * self.slot_bytes
        self._budget.take(size, SNAPSHOT_S)
        rows = self.rows(len(block_ids))
        self._table.gather(self._ids(block_ids), rows)
        taken = torch.cuda.Event()
        taken.record(torch.cuda.current_stream(self._device))
        return Snapshot(self, rows, taken, lambda: self._budget.give(size))

    def copy_snapshot(self, rows: torch.Tensor, taken: torch.cuda.Event, slots: Sequence[memoryview]) -> None:
        with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            self._stream.wait_event(taken)
            self.copy_rows(rows, slots)

    def copy_rows(self, rows: torch.Tensor, slots: Sequence[memoryview]) -> None:
        """On our stream; returns when the bytes are in the slots. The interpreter is free meanwhile."""
        for row, slot in zip(rows, slots, strict=True):
            torch.frombuffer(slot, dtype=torch.uint8).copy_(row, non_blocking=True)
        self._stream.synchronize()

    def _after_marked(self) -> None:
        if (marked := self._marked) is not None:
            self._stream.wait_event(marked)

    def _ids(self, block_ids: Sequence[int]) -> torch.Tensor:
        # Pinned, or the copy of these few bytes would wait for everything before it.
        return torch.tensor(block_ids, dtype=torch.int64).pin_memory().to(self._device, non_blocking=True)


class Snapshot:
    """Pages that were taken; a `Pages` to read once, all of them. `close` always."""

    def __init__(
        self, pages: DevicePages, rows: torch.Tensor, taken: torch.cuda.Event, closed: Callable[[], None]
    ) -> None:
        self.slot_bytes = pages.slot_bytes
        self.at_once = len(rows)
        self._pages = pages
        self._rows: torch.Tensor | None = rows
        self._taken = taken
        self._closed = closed

    def read(self, block_ids: Sequence[int], slots: Sequence[memoryview]) -> None:  # noqa: ARG002 - they are known
        if self._rows is None:
            raise KvLost("it was read already")
        self._pages.copy_snapshot(self._rows, self._taken, slots)

    def write(self, block_ids: Sequence[int], slots: Sequence[memoryview]) -> None:
        raise NotImplementedError("a snapshot is read")

    def close(self) -> None:
        """Idempotent."""
        if self._rows is not None:
            self._rows = None
            self._closed()


def pin_arena(device: int) -> Callable[[memoryview], Callable[[], None]]:
    """For RankClient: registers a mapped arena with CUDA, so that copies are asynchronous and at full speed."""

    def pin(view: memoryview) -> Callable[[], None]:
        cudart: Any = torch.cuda.cudart()
        address = torch.frombuffer(view, dtype=torch.uint8).data_ptr()
        with torch.cuda.device(device):
            error = int(cudart.cudaHostRegister(address, len(view), HOST_REGISTER_PORTABLE))
        if error:
            log.warning("kv: the arena cannot be pinned (CUDA error %d): copies will be slow", error)
            return lambda: None

        def unpin() -> None:
            with torch.cuda.device(device):
                cudart.cudaHostUnregister(address)

        return unpin

    return pin
