"""Copies between an engine's pages and the node's arena, under leases: what a rank does for its engine's planner.

Blocking; to be called from the thread that may wait for memory. Invariants: a slot is checked, copied, and checked
again, since it may have got another owner when its lease is gone; no copy under a revoked lease starts.
"""

import logging
import time
from collections.abc import Iterator, Sequence
from typing import Protocol

import xxhash

from shared.errors import KvLost
from shared.kv.copies import Load, Page, Save
from shared.kv.messages import Commit, Loaded
from shared.kv.rank_client import RankClient

log = logging.getLogger(__name__)


class Pages(Protocol):
    """Copies whole blocks between the engine's pages and slots; a call returns when its bytes are there."""

    slot_bytes: int
    at_once: int  # blocks a call: what is copied is then looked at while it is in the cache

    def read(self, block_ids: Sequence[int], slots: Sequence[memoryview]) -> None:
        """Pages -> slots."""
        ...

    def write(self, block_ids: Sequence[int], slots: Sequence[memoryview]) -> None:
        """Slots -> pages."""
        ...


class Copier:
    """One engine rank's. What it returns is to be told to the store, see RankClient."""

    def __init__(self, client: RankClient, pages: Pages, rank: int = 0) -> None:
        self._client = client
        self._pages = pages
        self._rank = rank

    def copy_out(self, save: Save, pages: Pages | None = None) -> Commit:
        """Pages, or what was taken of them, -> reserved slots.

        Raises KvLost when the lease or a slot is gone: its reader recomputes.
        """
        source = pages or self._pages
        if not self._client.begin_copy(save.lease, save.arena):
            raise KvLost("their lease is gone")
        started_ns, checksums = time.time_ns(), []
        try:
            for some in _parts(save.pages, source.at_once):
                if any(self._client.word(page.slot) != page.word for page in some):
                    raise KvLost("a reserved slot has another owner")
                slots = [self._slot(page) for page in some]
                source.read([page.block_id for page in some], slots)
                checksums += [xxhash.xxh3_64_intdigest(slot) for slot in slots]
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
                invalid = set()
                for some in _parts(load.pages, self._pages.at_once):
                    invalid |= self._fill(some)
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

    def _fill(self, some: list[Page]) -> set[int]:
        """Returns the pages that were not filled."""
        there = [page for page in some if self._client.word(page.slot) == page.word]
        if there:
            self._pages.write([page.block_id for page in there], [self._slot(page) for page in there])
        right = {page.block_id for page in there if self._client.word(page.slot) == page.word}
        return {page.block_id for page in some} - right

    def _slot(self, page: Page) -> memoryview:
        return self._client.slot_view(page.slot + self._rank)


def _parts(pages: list[Page], size: int) -> Iterator[list[Page]]:
    for start in range(0, len(pages), size):
        yield pages[start : start + size]
