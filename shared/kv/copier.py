"""Copies between an engine's pages and the node's arena, under leases: what a rank does for its engine's planner.

Blocking; to be called from the thread that may wait for memory. Invariants: a slot is checked, copied, and checked
again, since it may have got another owner when its lease is gone; no copy under a revoked lease starts.
"""

import logging
import time
from typing import Protocol

import xxhash

from shared.errors import KvLost
from shared.kv.copies import Load, Page, Save
from shared.kv.messages import Commit, Loaded
from shared.kv.rank_client import RankClient

log = logging.getLogger(__name__)


class Pages(Protocol):
    """Copies whole blocks between the engine's pages and a slot."""

    slot_bytes: int

    def read(self, block_id: int, slot: memoryview) -> None:
        """Page -> slot."""
        ...

    def write(self, block_id: int, slot: memoryview) -> None:
        """Slot -> page."""
        ...


class Copier:
    """One engine rank's. What it returns is to be told to the store, see RankClient."""

    def __init__(self, client: RankClient, pages: Pages, rank: int = 0) -> None:
        self._client = client
        self._pages = pages
        self._rank = rank

    def copy_out(self, save: Save) -> Commit:
        """Pages -> reserved slots. Raises KvLost when the lease or a slot is gone: its reader recomputes."""
        if not self._client.begin_copy(save.lease, save.arena):
            raise KvLost("their lease is gone")
        started_ns, checksums = time.time_ns(), []
        try:
            for page in save.pages:
                if self._client.word(page.slot) != page.word:
                    raise KvLost("a reserved slot has another owner")
                slot = self._client.slot_view(page.slot + self._rank)
                self._pages.read(page.block_id, slot)
                checksums.append(xxhash.xxh3_64_intdigest(slot))
        finally:
            self._client.end_copy(save.lease)
        blocks = [page.block for page in save.pages]
        return Commit(lease=save.lease, blocks=blocks, checksums=checksums, started_ns=started_ns)

    def copy_in(self, load: Load) -> tuple[set[int], Loaded]:
        """Committed slots -> pages. Returns the pages that were not filled, and what the store is to hear."""
        started_ns = time.time_ns()
        if not self._client.begin_copy(load.lease, load.arena):
            invalid = {page.block_id for page in load.pages}
        else:
            try:
                invalid = {page.block_id for page in load.pages if not self._fill(page)}
            finally:
                self._client.end_copy(load.lease)
        if invalid:
            log.warning("kv: %d of %d blocks could not be loaded", len(invalid), len(load.pages))
        return invalid, Loaded(
            lease=load.lease,
            blocks=len(load.pages) - len(invalid),
            failed=len(invalid),
            started_ns=started_ns,
            ended_ns=time.time_ns(),
        )

    def _fill(self, page: Page) -> bool:
        if self._client.word(page.slot) != page.word:
            return False
        self._pages.write(page.block_id, self._client.slot_view(page.slot + self._rank))
        return bool(self._client.word(page.slot) == page.word)
