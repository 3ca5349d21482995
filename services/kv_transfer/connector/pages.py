"""An engine's KV pages on a CPU as bytes: whole pages only; what is inside one is the attention backend's affair.

A slot of the arena holds one block: the pages of every layer, in the order of registration, one after the other.
"""

import ctypes
from collections.abc import Sequence

import torch


def layers_of(kv_caches: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """Each layer's pages. Raises ValueError when a block of a layer is not one contiguous run."""
    layers = []
    seen: set[int] = set()
    for name, tensor in kv_caches.items():
        if tensor.data_ptr() in seen:
            continue  # layers that share their cache are one
        seen.add(tensor.data_ptr())
        if not tensor.is_contiguous():
            raise ValueError(f"KV cache of {name} is not contiguous: shape {tuple(tensor.shape)}")
        layers.append(tensor)
    return layers


class HostPages:
    """Pages in this process's memory: one memoryview slice a page.

    Slices hold the GIL while they copy. That is meant: `ctypes.memmove` releases it once a page and then waits for
    busy threads every time (measured 720 ms against 5 ms for 256 pages).
    """

    at_once = 1

    def __init__(self, layers: list[torch.Tensor]) -> None:
        self._layers: list[tuple[memoryview, int, int]] = []  # bytes, page size, offset in the slot
        offset = 0
        for tensor in layers:
            size = tensor.nbytes
            view = memoryview((ctypes.c_char * size).from_address(tensor.data_ptr())).cast("B")
            page = size // tensor.shape[0]
            self._layers.append((view, page, offset))
            offset += page
        self._owners = layers  # keeps the memory behind the views
        self.slot_bytes = offset

    def read(self, block_ids: Sequence[int], slots: Sequence[memoryview]) -> None:
        for block_id, slot in zip(block_ids, slots, strict=True):
            for view, page, offset in self._layers:
                slot[offset : offset + page] = view[block_id * page : (block_id + 1) * page]

    def write(self, block_ids: Sequence[int], slots: Sequence[memoryview]) -> None:
        for block_id, slot in zip(block_ids, slots, strict=True):
            for view, page, offset in self._layers:
                view[block_id * page : (block_id + 1) * page] = slot[offset : offset + page]
