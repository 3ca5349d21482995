"""`python -m loadtest kv --device cuda`: copies between a GPU's KV pages and a pinned arena, beside the card's limit.

Needs torch and a GPU, nothing else: the paged KV of a Llama-3-8B shape is made here, the arena is memory like the
store's, and what copies is the connector's own `DevicePages`. Baton and the limit are measured in turns. Beside a
running matrix product both are looked at: what becomes of the copies, and of the product.
"""

import argparse
import json
import mmap
import sys
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Self

from loadtest.cluster.stream import percentile

if TYPE_CHECKING:
    import torch


LAYERS, KV_HEADS, HEAD_SIZE, BLOCK = 32, 8, 128, 32  # of Llama-3-8B; tokens in a block
ENGINE_BLOCKS = 512
ARENA_BLOCKS = 128
BATCH = 32  # blocks a copy: a chunk of 1,024 tokens
MATRIX = 8192
BESIDE_S = 2.0
AIM, MOST_SLOWED = 0.8, 0.03
GB = 1e9


def run(args: argparse.Namespace) -> int:
    try:
        import torch
    except ImportError:
        sys.stderr.write("kv --device cuda: torch is not installed\n")
        return 2
    if not torch.cuda.is_available():
        sys.stderr.write("kv --device cuda: there is no CUDA device here, so nothing was measured\n")
        return 2
    with _Card() as card:
        rows = card.measure(args.rounds)
    figures = {name: percentile(values, 0.5) for name, values in rows.items()}
    result = {"device": torch.cuda.get_device_name(), "slot_mib": card.slot_bytes / 2**20, "batch": BATCH, **figures}
    sys.stdout.write(_table(result))
    if args.out:
        args.out.write_text(json.dumps(result, indent=2) + "\n")
    return 0


class _Card:
    """The KV cache, the arena, and the two ways between them."""

    def __init__(self) -> None:
        import torch

        from services.kv_transfer.connector.device_pages import DevicePages, pin_arena

        self._torch = torch
        shape = (ENGINE_BLOCKS, KV_HEADS, BLOCK, 2 * HEAD_SIZE)
        layers = [torch.randn(shape, dtype=torch.bfloat16, device="cuda") for _ in range(LAYERS)]
        self._pages: DevicePages = DevicePages(layers)
        self._layers = layers
        self.slot_bytes = self._pages.slot_bytes
        self._mapped = mmap.mmap(-1, ARENA_BLOCKS * self.slot_bytes)
        self._arena = memoryview(self._mapped)
        self._unpin = pin_arena(torch.cuda.current_device())(self._arena)
        self._turn = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._torch.cuda.synchronize()
        self._unpin()

    def measure(self, rounds: int) -> dict[str, list[float]]:
        rows: dict[str, list[float]] = {}
        for number in range(rounds + 1):
            row = self._round()
            if number:  # the first warms up
                for name, value in row.items():
                    rows.setdefault(name, []).append(value)
        self._check()
        return rows

    def _round(self) -> dict[str, float]:
        row: dict[str, float] = {}
        for name, ours, plain in (
            ("device to arena", self._out, self._plain_out),
            ("arena to device", self._in, self._plain_in),
        ):
            limit = self._rate(plain)
            row[f"{name}, GB/s"] = self._rate(ours)
            row[f"{name}, limit, GB/s"] = limit
            row[f"{name}, of limit"] = row[f"{name}, GB/s"] / limit
            beside, slowed = self._beside(ours)
            row[f"{name} beside a product, of limit"] = beside / limit
            row[f"product beside {name}, slowed"] = slowed
        return row

    def _slots(self) -> tuple[list[int], list[memoryview]]:
        """A batch of blocks, scattered on both sides."""
        self._turn += 1
        ids = [(self._turn * 97 + step * 31) % ENGINE_BLOCKS for step in range(BATCH)]
        places = [(self._turn * 13 + step * 7) % ARENA_BLOCKS for step in range(BATCH)]
        return ids, [self._arena[place * self.slot_bytes : (place + 1) * self.slot_bytes] for place in places]

    def _out(self) -> None:
        self._pages.read(*self._slots())

    def _in(self) -> None:
        self._pages.write(*self._slots())

    def _plain(self) -> "tuple[torch.Tensor, torch.Tensor]":
        """As many bytes, in one piece on both sides."""
        size = BATCH * self.slot_bytes
        host = self._torch.frombuffer(self._arena[:size], dtype=self._torch.uint8)
        return host, self._pages.rows(BATCH).reshape(-1)

    def _plain_out(self) -> None:
        host, device = self._plain()
        host.copy_(device, non_blocking=True)
        self._torch.cuda.current_stream().synchronize()

    def _plain_in(self) -> None:
        host, device = self._plain()
        device.copy_(host, non_blocking=True)
        self._torch.cuda.current_stream().synchronize()

    def _rate(self, copy: Callable[[], None], for_s: float = 0.5) -> float:
        """Bytes a second."""
        copies, began_s = 0, time.perf_counter()
        while (took_s := time.perf_counter() - began_s) < for_s:
            copy()
            copies += 1
        moved_bytes: int = copies * BATCH * self.slot_bytes
        return moved_bytes / took_s / GB

    def _beside(self, copy: Callable[[], None]) -> tuple[float, float]:
        """(GB/s of copies beside products, by which share the products became slower)."""
        alone = self._products()
        found: list[float] = []
        copying = threading.Thread(target=lambda: found.append(self._rate(copy, BESIDE_S)))
        copying.start()
        both = self._products()
        copying.join()
        return found[0], both / alone - 1

    def _products(self) -> float:
        """Seconds of a matrix product, over about half of BESIDE_S."""
        torch = self._torch
        a, b = (torch.randn((MATRIX, MATRIX), dtype=torch.bfloat16, device="cuda") for _ in range(2))
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.matmul(a, b)
        torch.cuda.current_stream().synchronize()
        count, began_s = 0, time.perf_counter()
        start.record()
        while time.perf_counter() - began_s < BESIDE_S / 2:
            for _ in range(8):
                torch.matmul(a, b)
            count += 8
            torch.cuda.current_stream().synchronize()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3 / count

    def _check(self) -> None:
        """What came out is what was there, and comes back so."""
        torch = self._torch
        ids, slots = self._slots()
        self._pages.read(ids, slots)
        before = [layer[ids].clone() for layer in self._layers]
        for layer in self._layers:
            layer[ids] = 0
        torch.cuda.synchronize()
        self._pages.write(ids, slots)
        if not all(torch.equal(layer[ids], was) for layer, was in zip(self._layers, before, strict=True)):
            raise AssertionError("blocks came back changed")


def _table(result: dict[str, Any]) -> str:
    lines = [f"{result['device']}: {result['batch']} scattered blocks of {result['slot_mib']:.0f} MiB a call"]
    lines += [f"  {name:46} {value:8.3f}" for name, value in result.items() if isinstance(value, float)]
    lines.append(f"  aim: at least {AIM:g} of the limit, a product slowed by at most {MOST_SLOWED:.0%}")
    return "\n".join(lines) + "\n"
