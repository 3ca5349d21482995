"""Clusters that a measurement starts for itself, as a user would: `baton up --detach`, and `baton down` at its end.

Invariants: a cluster ends with its measurement, on every way out; settings of the shell do not reach it.
"""

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence

import msgspec

from loadtest.machine import ROOT
from services.launcher.machine import LOOPBACK, free_ports
from services.launcher.refusal import UserError
from shared.settings import LAUNCHER_KEYS, PREFIX

BATON = (sys.executable, "-m", "services.launcher")
UP_S = 300.0  # real engines load and compile
DOWN_S = 90.0


class Started(msgspec.Struct, frozen=True, kw_only=True):
    """A cluster that is ready."""

    url: str
    port: int


@contextlib.contextmanager
def started(options: Sequence[str], settings: Mapping[str, str], *, port: int = 0) -> Iterator[Started]:
    """`options` of `baton up`; `settings` by their names. Port 0: any. Raises UserError when it does not come up."""
    chosen = port or free_ports(1)[0]
    environ = _environ(settings)
    words = ("--port", str(chosen))
    try:
        _baton(("up", *words, "--detach", *options), environ, UP_S)
        yield Started(url=f"http://{LOOPBACK}:{chosen}", port=chosen)
    finally:
        with contextlib.suppress(UserError):  # `down` says when there is nothing; what went wrong before counts more
            _baton(("down", *words), environ, DOWN_S)


def baton(words: Sequence[str]) -> str:
    """What another command of `baton` prints. Raises UserError."""
    return _baton(words, _environ({}), DOWN_S)


def _baton(words: Sequence[str], environ: Mapping[str, str], limit_s: float) -> str:
    try:
        done = subprocess.run(
            (*BATON, *words), env=environ, cwd=ROOT, capture_output=True, text=True, check=False, timeout=limit_s
        )
    except subprocess.TimeoutExpired:
        raise UserError(f"baton {words[0]} took more than {limit_s:g} s") from None
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines()
        raise UserError(f"baton {words[0]} ended with {done.returncode}: {said[-1] if said else 'it said nothing'}")
    return done.stdout


def _environ(settings: Mapping[str, str]) -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if not key.startswith(PREFIX) or key in LAUNCHER_KEYS}
    return {**kept, **{PREFIX + key.upper(): value for key, value in settings.items()}}
