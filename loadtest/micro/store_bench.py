"""The store's decisions alone: no process, no socket, no bytes; next to plain dictionaries that do the least of it.

`get`: is a key held; `prefix`: how long a prefix of 32 keys is; `pin`: reserve and release 32 held blocks, counted in
blocks; `put`: reserve, commit and release 32 new blocks, each of which evicts one, counted in blocks.
"""

import gc
import secrets
import time
from array import array
from collections import OrderedDict
from collections.abc import Callable

from services.kv_transfer.slots import Layout
from services.kv_transfer.store import Store
from shared.kv.messages import Attach, Commit, Geometry, Reserve

BLOCKS = 100_000
KEYS = 32
KEY_BYTES = 16
SLOT_BYTES = 64  # there are no bytes, but a size is needed
SESSION = "bench"
TTL_S = 60.0

# What is called so often, and how many things one call does.
Work = tuple[Callable[[list[bytes]], object], int]


class StoreBench:
    """A store whose arena is full of committed blocks, and dictionaries of the same size."""

    def __init__(self, blocks: int = BLOCKS) -> None:
        self._leases = 0
        self._held: list[list[bytes]] = []
        self._index: dict[bytes, int] = {}
        self._recent: OrderedDict[bytes, None] = OrderedDict()
        self._store = _filled_store(blocks)
        for _ in range(blocks // KEYS):
            keys = new_keys()
            self._put(keys)
            self._held.append(keys)
            for key in keys:
                self._index[key] = len(self._index)
                self._recent[key] = None

    def measure(self, calls: int) -> dict[str, float]:
        """Operations a second. What puts takes new keys, whatever else those that are held."""
        # What the puts of the round before evicted is not held any more, in either.
        self._held = [keys for keys in self._held if self._is_held(keys)]
        held = [self._held[turn * 7 % len(self._held)] for turn in range(calls)]
        work: dict[str, Work] = {
            "get": (self._get, KEYS),
            "raw get": (self._raw_get, KEYS),
            "prefix": (self._store.held_prefix, 1),
            "pin": (self._pin, KEYS),
            "raw pin": (self._raw_pin, KEYS),
        }
        found = {name: _rate(call, held, each) for name, (call, each) in work.items()}
        fresh = [new_keys() for _ in range(calls)]
        found["put"] = _rate(self._put, fresh, KEYS)
        found["raw put"] = _rate(self._raw_put, fresh, KEYS)
        self._held += fresh
        return found

    def _is_held(self, keys: list[bytes]) -> bool:
        return self._store.held_prefix(keys) == len(keys) and all(key in self._recent for key in keys)

    def _get(self, keys: list[bytes]) -> None:
        holds = self._store.holds
        for key in keys:
            holds(key)

    def _raw_get(self, keys: list[bytes]) -> None:
        index = self._index
        for key in keys:
            index.get(key)

    def _pin(self, keys: list[bytes]) -> None:
        lease = self._reserve(keys, write=False)
        self._store.release(lease, 0.0)
        self._store.take_events()

    def _raw_pin(self, keys: list[bytes]) -> None:
        """Moves them to the recent end."""
        recent = self._recent
        for key in keys:
            recent.move_to_end(key)

    def _put(self, keys: list[bytes]) -> None:
        lease = self._reserve(keys, write=True)
        everything = list(range(len(keys)))
        self._store.commit(SESSION, 0, Commit(lease=lease, blocks=everything, checksums=everything), 0.0)
        self._store.release(lease, 0.0)
        self._store.take_events()

    def _raw_put(self, keys: list[bytes]) -> None:
        recent = self._recent
        for key in keys:
            recent.popitem(last=False)
            recent[key] = None

    def _reserve(self, keys: list[bytes], *, write: bool) -> str:
        self._leases += 1
        lease = f"lease-{self._leases}"
        call = Reserve(lease=lease, request="r", keys=keys, write=write, ttl_s=TTL_S)
        self._store.reserve(SESSION, call, self._leases, 0.0)
        return lease


def new_keys(count: int = KEYS) -> list[bytes]:
    data = secrets.token_bytes(count * KEY_BYTES)
    return [data[start : start + KEY_BYTES] for start in range(0, len(data), KEY_BYTES)]


def _filled_store(blocks: int) -> Store:
    geometry = Geometry(fingerprint="f" * 64, block_size=16, slot_bytes=SLOT_BYTES, ranks=1, max_model_len=16)
    size_bytes = 4096 + blocks * (SLOT_BYTES + 8)

    def words(layout: Layout) -> "array[int]":
        return array("Q", bytes(8 * layout.slots))

    store = Store("node-0", size_bytes, words)
    store.attach(Attach(session=SESSION, kind="rank", worker=SESSION, geometry=geometry))
    store.take_events()
    return store


def _rate(call: Callable[[list[bytes]], object], batches: list[list[bytes]], each: int) -> float:
    gc.collect()
    started = time.perf_counter()
    for keys in batches:
        call(keys)
    return len(batches) * each / (time.perf_counter() - started)
