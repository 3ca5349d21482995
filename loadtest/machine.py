"""Where a result was made: the program's revision and the machine."""

import os
import platform
import subprocess
from pathlib import Path

import psutil

from loadtest.result import Git, Machine

ROOT = Path(__file__).parent.parent
GIT_S = 10.0


def git() -> Git:
    revision = _git("rev-parse", "HEAD")
    if not revision:
        return Git(revision=None, dirty=None)
    return Git(revision=revision, dirty=bool(_git("status", "--porcelain")))


def machine() -> Machine:
    return Machine(
        cpu=_cpu(),
        cores=len(os.sched_getaffinity(0)),
        memory_gib=round(psutil.virtual_memory().total / 2**30, 1),
        platform=platform.platform(),
        python=platform.python_version(),
    )


def _git(*arguments: str) -> str:
    try:
        done = subprocess.run(
            ("/usr/bin/env", "git", "-C", str(ROOT), *arguments),
            capture_output=True,
            text=True,
            timeout=GIT_S,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")
