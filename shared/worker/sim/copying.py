"""A thread that copies blocks between the sim's pages and the node's arena, beside the steps.

What was loaded before a step it only tells the store. Invariants: every load and save given to it ends in exactly one
`Copied`, told on the engine's loop; a load's comes as soon as its bytes are there, a save's when the store has answered
its commit. What waits is copied first and reported in one go: a call to the store for each of a thousand short prompts
a second would take the interpreter from the loop as often.
"""

import asyncio
import logging
import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass, field

from shared.errors import BatonError
from shared.kv.copier import Copier, Pages
from shared.kv.copies import KeepCopy, Load, Save
from shared.kv.keeping import Keeper
from shared.kv.messages import Commit, Geometry, Loaded
from shared.kv.rank_client import RankClient

log = logging.getLogger(__name__)

AT_ONCE = 64
JOIN_S = 5.0


@dataclass(slots=True)
class Copied:
    """The end of a copy; `invalid` pages of a load could not be filled."""

    copy: Load | Save | KeepCopy | Loaded
    invalid: set[int] = field(default_factory=set)


class CopyThread:
    """Owned by the engine. Needs a client that is attached."""

    def __init__(
        self, client: RankClient, geometry: Geometry, pages: Pages, on_copied: Callable[[list[Copied]], None]
    ) -> None:
        """Starts at once. `on_copied` is called on the running loop."""
        self._client = client
        self._copier = Copier(client, pages)
        self._keeper = Keeper(client, self._copier, geometry)
        self._on_copied = on_copied
        self._loop = asyncio.get_running_loop()
        self._queue: queue.SimpleQueue[Load | Save | KeepCopy | Loaded | None] = queue.SimpleQueue()
        self._told: list[Copied] = []
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="sim-copies", daemon=True)
        self._thread.start()

    def put(self, copy: Load | Save | KeepCopy) -> None:
        self._queue.put(copy)

    def load_now(self, load: Load) -> tuple[set[int], bool]:
        """On the caller's thread. Returns the pages that could not be filled, and whether the store is to hear of it.

        It does from the thread; a `Copied` of a `Loaded` then says that it has.
        """
        try:
            invalid, report = self._copier.copy_in(load)
        except Exception as error:  # noqa: BLE001 - as on the thread
            _explain(load, error)
            return {page.block_id for page in load.pages}, False
        self._queue.put(report)
        return invalid, True

    def close(self) -> None:
        """Blocking: what runs is ended, what waits is not begun."""
        self._queue.put(None)
        self._thread.join(JOIN_S)
        self._client.close()

    def _run(self) -> None:
        while (first := self._queue.get()) is not None:
            batch: list[Load | Save | KeepCopy | Loaded] = [first]
            while len(batch) < AT_ONCE and not self._queue.empty():
                following = self._queue.get()
                if following is None:
                    self._queue.put(None)
                    break
                batch.append(following)
            self._copy([copy for copy in batch if not isinstance(copy, KeepCopy)])
            if keeps := [copy for copy in batch if isinstance(copy, KeepCopy)]:
                self._keep(keeps)

    def _keep(self, keeps: list[KeepCopy]) -> None:
        try:
            self._keeper.keep_all(keeps)
        except Exception:  # whatever it is, the pages must come free
            log.exception("kv: keeping failed")
        self._tell([Copied(keep) for keep in keeps])

    def _copy(self, batch: list[Load | Save | Loaded]) -> None:
        reports: list[Commit | Loaded] = []
        answered: list[Copied] = []  # told behind the loads, which somebody waits for
        ended: list[Copied] = []
        for copy in batch:
            if isinstance(copy, Loaded):
                reports.append(copy)
                answered.append(Copied(copy))
                continue
            try:
                if isinstance(copy, Save):
                    reports.append(self._copier.copy_out(copy))
                    answered.append(Copied(copy))
                else:
                    invalid, report = self._copier.copy_in(copy)
                    reports.append(report)
                    ended.append(Copied(copy, invalid))
            except Exception as error:  # noqa: BLE001 - one broken copy must not stop the rest
                _explain(copy, error)
                ended.append(Copied(copy, {page.block_id for page in copy.pages}))
        # Before the engine hears of it, as vLLM's connector does: its request may end, and its lease with it.
        for told, refusal in zip(reports, self._client.report(reports), strict=True):
            if refusal is not None:
                what = "not committed" if isinstance(told, Commit) else "load not counted"
                log.warning("kv: %s: %s", what, refusal.message)
        self._tell([*ended, *answered])

    def _tell(self, ended: list[Copied]) -> None:
        if not ended:
            return
        with self._lock:
            is_first = not self._told
            self._told += ended
        if is_first:
            try:
                self._loop.call_soon_threadsafe(self._hand_over)
            except RuntimeError:
                log.debug("kv: the engine's loop is closed")

    def _hand_over(self) -> None:
        with self._lock:
            told, self._told = self._told, []
        self._on_copied(told)


def _explain(copy: Load | Save, error: Exception) -> None:
    what = "saved" if isinstance(copy, Save) else "loaded"
    if isinstance(error, BatonError):
        log.warning("kv: %d blocks not %s: %s", len(copy.pages), what, error.message)
    else:
        log.error("kv: %d blocks not %s", len(copy.pages), what, exc_info=error)
