"""The connector beside the model: copies pages out at the end of a step, and in on a thread, or small loads before it.

Invariants: every load on the thread ends in exactly one completion; a page that could not be filled with what its slot
promised is reported invalid with it, so the engine recomputes; no copy under a revoked lease starts.
"""

import itertools
import logging
import queue
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from services.kv_transfer.connector.device_pages import DevicePages, Snapshot, pin_arena
from services.kv_transfer.connector.fingerprint import geometry_of
from services.kv_transfer.connector.lifeline import unlink_names
from services.kv_transfer.connector.pages import HostPages, layers_of
from shared.errors import BatonError, KvMemory
from shared.kv.copier import Copier
from shared.kv.copies import Load, Save, StepPlan
from shared.kv.keeping import Keeper
from shared.kv.messages import Commit, Loaded
from shared.kv.rank_client import RankClient

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig

log = logging.getLogger(__name__)

# An idle engine spins; giving way for this long lets the loader thread have the interpreter.
IDLE_WAIT_S = 0.002


_STOP, _TELL, _COPY, _KEEP = range(4)


@dataclass(frozen=True)
class _Keeping:
    request: str
    pieces: Iterator[None]


@dataclass(frozen=True)
class _Saving:
    save: Save
    taken: Snapshot


_Work = Load | Loaded | _Saving | _Keeping


class WorkerSide:
    """Owned by one engine rank; `save` and `take_*` are called on its main thread."""

    def __init__(self, vllm_config: "VllmConfig", kv_cache_config: "KVCacheConfig") -> None:
        extra: dict[str, Any] = vllm_config.kv_transfer_config.kv_connector_extra_config
        self._vllm_config = vllm_config
        self._kv_cache_config = kv_cache_config
        self._rank = vllm_config.parallel_config.rank
        self._client = RankClient(
            extra["socket"],
            session=extra["session"],
            worker=extra["worker"],
            rank=self._rank,
            on_mapped=pin_arena(torch.cuda.current_device()) if _is_cuda(vllm_config) else None,
        )
        # Bounded by the engine's own requests. What is on somebody's way to a first token goes first.
        self._queue: queue.PriorityQueue[tuple[int, int, _Work | None]] = queue.PriorityQueue()
        self._serial = itertools.count()
        self._done = threading.Condition()
        self._received: set[str] = set()
        self._invalid: set[int] = set()
        self._reported: set[int] = set()
        self._kept: set[str] = set()
        self._running = 0
        self._thread = threading.Thread(target=self._run, name="kv-copies", daemon=True)

    def register(self, kv_caches: dict[str, torch.Tensor]) -> None:
        """Attach to the store. Raises KvMismatch or KvLost, which stops the engine's start with a clear line."""
        unlink_names()
        layers = layers_of(kv_caches)
        pages: HostPages | DevicePages = DevicePages(layers) if _is_cuda(self._vllm_config) else HostPages(layers)
        self._device_pages = pages if isinstance(pages, DevicePages) else None
        geometry = geometry_of(self._vllm_config, self._kv_cache_config, pages.slot_bytes, kv_caches)
        self._client.attach(geometry)
        self._copier = Copier(self._client, pages, self._rank)
        self._keeper = Keeper(self._client, self._copier, geometry)
        self._thread.start()

    # ---- saving -----------------------------------------------------------------------------------------------

    def begin_step(self) -> None:
        """Before the step is computed."""
        if self._device_pages is not None:
            self._device_pages.mark()

    def save(self, saves: list[Save]) -> None:
        """Before the step ends the pages are copied out and committed, or, on a device, taken to be so soon.

        What fails stays uncommitted: its reader recomputes.
        """
        for save in saves:
            if self._device_pages is not None:
                self._take(save, self._device_pages)
                continue
            try:
                self._commit(self._copier.copy_out(save))
            except BatonError as error:
                log.warning("kv: %d blocks not saved: %s", len(save.pages), error.message)

    def _take(self, save: Save, pages: DevicePages) -> None:
        for start in range(0, len(save.pages), pages.at_once):
            some = save.pages[start : start + pages.at_once]
            try:
                taken = pages.snapshot([page.block_id for page in some])
            except BatonError as error:
                log.warning("kv: %d blocks not saved: %s", len(some), error.message)
            else:
                self._put(_COPY, _Saving(Save(save.arena, save.lease, some), taken))

    def _commit(self, commit: Commit) -> None:
        self._client.commit(commit.lease, commit.blocks, commit.checksums, commit.started_ns)

    def _save_taken(self, saving: "_Saving") -> None:
        try:
            self._commit(self._copier.copy_out(saving.save, saving.taken))
        except BatonError as error:
            log.warning("kv: %d blocks not saved: %s", len(saving.save.pages), error.message)
        except Exception:  # the thread's boundary
            log.exception("kv: saving failed")
        finally:
            saving.taken.close()

    # ---- loading, keeping -------------------------------------------------------------------------------------

    def start(self, plan: StepPlan) -> None:
        """What this step reads is loaded when it returns; the rest is handed over to the thread."""
        beside = [load for load in plan.loads if not load.in_step]
        with self._done:
            self._running += len(beside) + len(plan.keeps)
        for load in plan.loads:
            if load.in_step:
                self._load_in_step(load)
        for load in beside:
            self._put(_COPY, load)
        for keep in plan.keeps:
            self._put(_KEEP, _Keeping(keep.request, self._keeper.pieces(keep)))

    def take_ended(self, *, wait: bool) -> tuple[set[str], set[str]]:
        """Requests whose load has ended since the last call, and whose keeping has.

        `take_invalid` then tells of the same loads.
        """
        with self._done:
            if wait and self._running and not (self._received or self._kept):
                self._done.wait(IDLE_WAIT_S)
            received, self._received = self._received, set()
            kept, self._kept = self._kept, set()
            self._reported |= self._invalid
            self._invalid = set()
            return received, kept

    def take_invalid(self) -> set[int]:
        """Pages of the loads just taken that could not be filled."""
        reported, self._reported = self._reported, set()
        return reported

    def _put(self, order: int, work: "_Work | None") -> None:
        self._queue.put((order, next(self._serial), work))

    def _run(self) -> None:
        while (work := self._queue.get()[2]) is not None:
            if isinstance(work, _Keeping):
                self._go_on(work)
                continue
            if isinstance(work, _Saving):
                self._save_taken(work)
                continue
            if isinstance(work, Loaded):
                self._tell(work)
                continue
            invalid, loaded = self._copy_in(work)
            if loaded is not None:
                self._tell(loaded)
            with self._done:
                self._invalid |= invalid
                self._received.add(work.request)
                self._running -= 1
                self._done.notify_all()

    def _go_on(self, keeping: "_Keeping") -> None:
        """One piece; the next comes behind loads that have come meanwhile."""
        try:
            next(keeping.pieces)
        except (StopIteration, KvMemory):
            pass  # the store counts what found no room
        except BatonError as error:
            log.warning("kv: not all is kept: %s", error.message)
        except Exception:  # the thread's boundary: the pages must come free
            log.exception("kv: keeping failed")
        else:
            self._put(_KEEP, keeping)
            return
        with self._done:
            self._kept.add(keeping.request)
            self._running -= 1
            self._done.notify_all()

    def _load_in_step(self, load: Load) -> None:
        """The store hears of it from the thread: it must not hold up the step."""
        invalid, loaded = self._copy_in(load)
        with self._done:
            self._invalid |= invalid
        if loaded is not None:
            self._put(_TELL, loaded)

    def _copy_in(self, load: Load) -> tuple[set[int], Loaded | None]:
        """Returns the pages that were not filled, and what the store is to hear."""
        try:
            return self._copier.copy_in(load)
        except Exception:  # a load that breaks must still end, as a recompute
            log.exception("kv: load failed")
            return {page.block_id for page in load.pages}, None

    def _tell(self, loaded: Loaded) -> None:
        try:
            self._client.loaded(
                loaded.lease,
                blocks=loaded.blocks,
                failed=loaded.failed,
                started_ns=loaded.started_ns,
                ended_ns=loaded.ended_ns,
            )
        except BatonError as error:
            log.warning("kv: load not counted: %s", error.message)
        except Exception:  # the thread's boundary
            log.exception("kv: load not counted")

    def close(self) -> None:
        if self._thread.is_alive():
            self._put(_STOP, None)
            self._thread.join(timeout=5)
        self._client.close()


def _is_cuda(vllm_config: "VllmConfig") -> bool:
    return bool(vllm_config.device_config.device_type == "cuda")
