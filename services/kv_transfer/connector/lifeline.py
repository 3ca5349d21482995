"""What an engine must not leave behind: a process that outlives its host, names in shared memory.

After SIGKILL of the host vLLM's EngineCore lived on for 20 s.
"""

import ctypes
import multiprocessing
import os
import signal
from pathlib import Path

PR_SET_PDEATHSIG = 1


def die_with_parent() -> None:
    """Ask the kernel for SIGKILL when the parent goes. Does nothing in a process that is nobody's child.

    It fires when the creating *thread* exits, so the host builds its engine on the main thread.
    """
    parent = multiprocessing.parent_process()
    if parent is None:
        return
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
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
