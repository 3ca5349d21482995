"""One `python -m loadtest run` inside a larger measurement: a process of its own, its result read back."""

import contextlib
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec

from loadtest.cluster.launch import Started
from loadtest.machine import ROOT
from loadtest.micro.bench import Failed
from loadtest.result import FILE, Result
from loadtest.slo import Slo

LOG = "run.log"
NOTHING = 1  # how a run ends in which nothing was completed: that is a result, too
SPARE_S = 120.0  # for start, calibration and writing


class Load(msgspec.Struct, frozen=True, kw_only=True):
    """What is offered, whatever the rate. `key`: of the client, where the cluster wants one."""

    workload: str
    length_scale: float
    slo: Slo
    retries: int
    tail_s: float
    seed: int = 0
    key: str = ""

    def words(self) -> list[str]:
        slo = self.slo
        key = ["--header", f"authorization: Bearer {self.key}"] if self.key else []
        return [
            *(self.workload, "--length-scale", f"{self.length_scale:g}", "--seed", str(self.seed)),
            *("--slo-ttft", f"{slo.ttft_s:g}", "--slo-itl", f"{slo.itl_s:g}", "--slo-itl-share", f"{slo.itl_share:g}"),
            *("--retries", str(self.retries), "--tail", f"{self.tail_s:g}", *key),
        ]


def closed(cluster: Started, load: Load, *, clients: int, seconds: float, out: Path) -> Result:
    """So many clients, each waits for its answer. Raises Failed."""
    with running(cluster, load, ("--concurrency", str(clients)), seconds=seconds, out=out) as process:
        return _ended(process, out, seconds + load.tail_s)


def bursts(cluster: Started, load: Load, *, rate: float, cv: float, seconds: float, out: Path) -> Result:
    """Arrivals with gamma-distributed gaps. Raises Failed."""
    shape = ("--rate", f"{rate:g}", "--arrivals", "gamma", "--cv", f"{cv:g}")
    with running(cluster, load, shape, seconds=seconds, out=out) as process:
        return _ended(process, out, seconds + load.tail_s)


@contextlib.contextmanager
def running(
    cluster: Started, load: Load, shape: Sequence[str], *, seconds: float, out: Path
) -> Iterator["subprocess.Popen[bytes]"]:
    """The run beside what happens inside, told to end when that is left; its lines go to a file beside the result."""
    out.mkdir(parents=True, exist_ok=True)
    words = (*load.words(), "--url", cluster.url, "--seconds", f"{seconds:g}", *shape, "--out", str(out))
    with (out / LOG).open("wb") as log:
        process = subprocess.Popen(
            (sys.executable, "-m", "loadtest", "run", *words), cwd=ROOT, stdout=log, stderr=subprocess.STDOUT
        )
        try:
            yield process
        finally:
            if process.poll() is None:
                process.terminate()
                _wait(process, SPARE_S)


def read(out: Path) -> Result:
    """Raises Failed."""
    try:
        return msgspec.json.decode((out / FILE).read_bytes(), type=Result)
    except (OSError, msgspec.DecodeError) as error:
        raise Failed(f"{out / FILE} cannot be read: {error}; see {out / LOG}") from None


def _ended(process: "subprocess.Popen[bytes]", out: Path, limit_s: float) -> Result:
    code = _wait(process, limit_s + SPARE_S)
    if code not in (0, NOTHING):
        raise Failed(f"a run ended with {code}: see {out / LOG}")
    return read(out)


def _wait(process: "subprocess.Popen[bytes]", limit_s: float) -> int:
    try:
        return process.wait(limit_s)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        raise Failed(f"a run took more than {limit_s:g} s") from None
