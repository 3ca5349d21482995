"""`python -m loadtest eviction`: a recorded trace through the store's own code, in several arenas and eviction orders.

What is counted is what a prefill would have found: the leading blocks of each prompt. A prompt's lease is held until so
many more prompts have come, so eviction works around what is pinned.
"""

import argparse
import json
import sys
from collections import deque
from collections.abc import Iterable, Sequence

import msgspec

from loadtest.load import trace
from services.kv_transfer.eviction import LeastRecentlyUsed, Orders, ScanResistant
from services.kv_transfer.slots import PAGE_BYTES, WORD_BYTES
from services.kv_transfer.store import Store
from shared.errors import SettingsError
from shared.kv.messages import Attach, Commit, Geometry, Reserve

ARENAS = (1000, 2000, 4000, 8000, 16000, 32000, 64000)
HELD = 16
ORDERS: dict[str, Orders] = {"lru": LeastRecentlyUsed, "2q": ScanResistant}
SLOT_BYTES = PAGE_BYTES  # nothing is written


class Replayed(msgspec.Struct, frozen=True, kw_only=True):
    arena_blocks: int
    order: str
    hit_rate: float
    evicted_blocks: int


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("trace", nargs="?", default="mooncake-conversation", help="a shipped one, or a file")
    parser.add_argument("--blocks", type=int, nargs="+", default=ARENAS, help="arenas, in blocks of the trace")
    parser.add_argument("--held", type=int, default=HELD, help="prompts that are pinned at any time")
    parser.add_argument("--json", action="store_true")


def run(args: argparse.Namespace) -> int:
    try:
        prompts = read_prompts(args.trace)
    except SettingsError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    total = sum(map(len, prompts))
    infinite = 1 - len({key for prompt in prompts for key in prompt}) / total
    found = [replay(prompts, blocks, order, held=args.held) for blocks in args.blocks for order in ORDERS if blocks > 0]
    if args.json:
        print(json.dumps({"prompts": len(prompts), "blocks": total, "infinite": infinite}))
        print(*(json.dumps(msgspec.to_builtins(each)) for each in found), sep="\n")
        return 0
    print(f"{args.trace}: {len(prompts)} prompts of {total} blocks; an infinite arena would hit {infinite:.1%}")
    print(f"{'blocks':>8}" + "".join(f"{order:>9}" for order in ORDERS))
    for blocks in args.blocks:
        rates = {each.order: each.hit_rate for each in found if each.arena_blocks == blocks}
        print(f"{blocks:>8}" + "".join(f"{rates[order]:>9.1%}" for order in ORDERS))
    return 0


def read_prompts(name: str) -> list[list[bytes]]:
    """Block keys by prompt. Raises SettingsError for a trace that has none."""
    path = trace.find(name)
    if path is None:
        raise SettingsError(f"no such trace: {name}; shipped: {', '.join(trace.shipped())}")
    prompts = [_keys(entry.blocks) for entry in trace.read(path) if entry.blocks]
    if not prompts:
        raise SettingsError(f"{name}: this trace does not say which blocks its prompts share")
    return prompts


def _keys(blocks: Iterable[int]) -> list[bytes]:
    return [block.to_bytes(16, "little") for block in dict.fromkeys(blocks)]


def replay(prompts: Sequence[list[bytes]], arena_blocks: int, order: str, *, held: int) -> Replayed:
    store = Store(
        "node", PAGE_BYTES + arena_blocks * (SLOT_BYTES + WORD_BYTES), lambda cut: [0] * cut.slots, ORDERS[order]
    )
    geometry = Geometry(fingerprint="f", block_size=1, slot_bytes=SLOT_BYTES, ranks=1, max_model_len=1)
    for kind in ("rank", "host"):
        store.attach(Attach(session="s", kind=kind, worker="w", geometry=geometry))
    leases: deque[tuple[str, int]] = deque()
    pinned = hits = total = 0
    for number, keys in enumerate(prompts):
        while leases and (len(leases) >= held or pinned + len(keys) > arena_blocks):
            lease, size = leases.popleft()
            pinned -= size
            store.release(lease, now=0.0)
        total += len(keys)
        if len(keys) > arena_blocks:
            continue  # it would be served without the store
        hits += store.held_prefix(keys)
        lease = str(number)
        call = Reserve(lease=lease, request=lease, keys=keys, write=True, ttl_s=1.0)
        granted = store.reserve("s", call, ticket=number, now=0.0)
        if granted is None:
            raise AssertionError("there is room")
        new = [position for position, is_there in enumerate(granted.committed) if not is_there]
        store.commit("s", 0, Commit(lease=lease, blocks=new, checksums=[0] * len(new)), now=0.0)
        leases.append((lease, len(keys)))
        pinned += len(keys)
        store.take_events()
    return Replayed(arena_blocks=arena_blocks, order=order, hit_rate=hits / total, evicted_blocks=store.evicted_blocks)
