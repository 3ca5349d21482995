"""Go on in the background: the caller returns when the work is announced or has failed, with its exit code."""

import contextlib
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from services.launcher.refusal import UserError
from shared.errors import SettingsError

Announce = Callable[[], None]


def in_background(work: Callable[[Announce], int], log: Path) -> int:
    """Run `work` in a session of its own. It speaks to the terminal until it announces itself, then to the log.

    Call before any thread or loop exists. Signals that come while waiting are passed on.
    """
    read_end, write_end = os.pipe()
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        os.close(read_end)
        os.setsid()
        os._exit(_background(work, write_end, log))
    os.close(write_end)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda received, _: os.kill(pid, received))
    with os.fdopen(read_end, "rb") as pipe:
        if pipe.read(1):
            return 0
    _, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status)


def _background(work: Callable[[Announce], int], pipe: int, log: Path) -> int:
    def announce() -> None:
        sys.stdout.flush()
        out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        null = os.open(os.devnull, os.O_RDONLY)
        for target, source in ((0, null), (1, out), (2, out)):
            os.dup2(source, target)
        os.close(out)
        os.close(null)
        with contextlib.suppress(OSError):  # nobody waits any more
            os.write(pipe, b"1")
        os.close(pipe)

    try:
        code = work(announce)
    except (UserError, SettingsError) as error:
        print(f"baton: {error}", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        code = 130
    except Exception as error:  # noqa: BLE001 - this is the process's boundary: nobody above prints it
        print(f"baton: {type(error).__name__}: {error}", file=sys.stderr)
        code = 1
    sys.stdout.flush()
    return code
