"""Stores what ended requests leave behind for their next turn, on the thread that copies.

Invariants: what finds no room is left out, and nobody waits for room; whatever fails, the pages come free.
"""

import logging
from collections.abc import Iterator, Sequence

from shared.errors import BatonError, KvLost
from shared.kv import messages
from shared.kv.blocks import block_keys
from shared.kv.copier import Copier
from shared.kv.copies import KeepCopy, Page, Save
from shared.kv.messages import Geometry, Reserved
from shared.kv.rank_client import RankClient

log = logging.getLogger(__name__)

PIECE_BLOCKS = 8


class Keeper:
    """One engine rank's. Blocking."""

    def __init__(self, client: RankClient, copier: Copier, geometry: Geometry) -> None:
        self._client = client
        self._copier = copier
        self._geometry = geometry

    def pieces(self, keep: KeepCopy) -> Iterator[None]:
        """Each `next` copies a piece, so that others' copies can go between.

        Raises KvMemory when there is no room, KvLost when the store or the lease is gone: the rest is not kept.
        """
        arena, call = self._arena(), self._call(keep)
        pages = _missing(keep, self._client.keep(call))
        for start in range(0, len(pages), PIECE_BLOCKS):
            yield
            commit = self._copier.copy_out(Save(arena, call.lease, pages[start : start + PIECE_BLOCKS]))
            self._client.commit(commit.lease, commit.blocks, commit.checksums, commit.started_ns)

    def keep_all(self, keeps: Sequence[KeepCopy]) -> None:
        """Many short ones at once: few calls to the store. What cannot be kept is left out."""
        try:
            arena, calls = self._arena(), [self._call(keep) for keep in keeps]
            commits = []
            for keep, call, answer in zip(keeps, calls, self._client.keep_all(calls), strict=True):
                if isinstance(answer, BatonError):
                    log.debug("kv: not kept: %s", answer.message)
                elif pages := _missing(keep, answer):
                    commits.append(self._copier.copy_out(Save(arena, call.lease, pages)))
            for refusal in self._client.report(commits):
                if refusal is not None:
                    log.warning("kv: not all is kept: %s", refusal.message)
        except KvLost as error:
            log.warning("kv: not all is kept: %s", error.message)

    def _arena(self) -> str:
        if (arena := self._client.arena) is None:
            raise KvLost("the store is away")
        return arena

    def _call(self, keep: KeepCopy) -> messages.Keep:
        geometry = self._geometry
        keys = block_keys(keep.tokens, geometry.block_size, fingerprint=geometry.fingerprint, salt=keep.salt)
        return messages.Keep(lease=f"{keep.request}-k", request=keep.request, keys=keys)


def _missing(keep: KeepCopy, found: Reserved) -> list[Page]:
    return [
        Page(block, keep.block_ids[block], found.slots[block], found.words[block])
        for block, committed in enumerate(found.committed)
        if not committed
    ]
