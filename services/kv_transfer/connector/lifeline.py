"""What an engine must not leave behind: a process that outlives its host, names in shared memory.

After SIGKILL of the host vLLM's EngineCore lived on for 20 s.
"""

import multiprocessing
import os
from pathlib import Path

from shared.parent_death import die_with_parent


def die_with_host() -> None:
    """Does nothing in a process that is nobody's child. The host builds its engine on its main thread."""
    parent = multiprocessing.parent_process()
    if parent is None:
        return
    die_with_parent()
    if not parent.is_alive():
        os._exit(1)  # it went before we could ask


def unlink_names() -> None:
    """Of the memory in which ranks on one CPU meet: vLLM never unlinks it. To be called when every rank has joined.

    Who has mapped it goes on using it, and the kernel frees it with the last of them, however they end.
    """
    instance = os.environ.get("VLLM_DIST_IDENT", "")
    if instance.startswith("vllm_dist_"):
        for segment in Path("/dev/shm").glob(f"{instance}-*"):  # noqa: S108 - where shm_open makes them
            segment.unlink(missing_ok=True)
