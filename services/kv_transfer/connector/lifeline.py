"""An engine process must not outlive its host: after SIGKILL of the host vLLM's EngineCore lived on for 20 s."""

import ctypes
import multiprocessing
import os
import signal

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
