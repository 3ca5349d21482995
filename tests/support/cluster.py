"""A whole cluster as a user starts it: `baton up` in a process, an OpenAI client to talk to it, and its pids."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import psutil

from shared.worker.vllm_engine import START_METHOD

LAUNCHER = "services.launcher"
BATON = [sys.executable, "-m", LAUNCHER]
SHM = Path("/dev/shm")
START_S = 240
STOP_S = 60


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Cluster:
    """Built by `running_cluster`."""

    def __init__(self, port: int, home: Path, process: "subprocess.Popen[str]") -> None:
        self.port = port
        self.home = home
        self.process = process
        self.url = f"http://127.0.0.1:{port}"

    def client(self, **options: Any) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=120, **options)

    def async_client(self) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=120)

    def status(self) -> dict[str, Any]:
        done = self.command("status", "--json")
        return dict(json.loads(done.stdout))

    def command(self, *args: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            [*BATON, *args, "--port", str(self.port)],
            capture_output=True,
            text=True,
            timeout=60,
            env=environment(self.home),
            check=False,
        )

    def services(self, role: str) -> list[dict[str, Any]]:
        return [service for service in self.status()["services"] if service["role"] == role]

    def service(self, service_id: str) -> dict[str, Any]:
        (found,) = [service for service in self.status()["services"] if service["id"] == service_id]
        return dict(found)

    def pid(self, service_id: str) -> int:
        return int(self.service(service_id)["pid"])

    def metrics(self, role: str) -> dict[str, float]:
        """Samples of all services of a role, summed by name with labels: `name{a="b"}` -> value."""
        total: dict[str, float] = {}
        for service in self.services(role):
            for name, value in read_metrics(service["metrics_url"]).items():
                total[name] = total.get(name, 0.0) + value
        return total

    def meter(self, role: str, name: str) -> Callable[[], float]:
        """Reads one sample of a role's only service, fast enough to catch a moment."""
        (service,) = self.services(role)
        return lambda: read_metrics(service["metrics_url"])[name]

    def said(self) -> str:
        """What the launcher has printed since this was asked last."""
        assert self.process.stdout is not None
        pipe, parts = self.process.stdout.fileno(), []
        os.set_blocking(pipe, False)
        with contextlib.suppress(BlockingIOError):
            while part := os.read(pipe, 1 << 16):
                parts.append(part)
        return b"".join(parts).decode()

    def log(self, service_id: str) -> str:
        path = self.home / str(self.port) / "logs" / f"{service_id}.log"
        return path.read_text() if path.exists() else ""


# A gateway's page has everybody's: what others say is left out, and whose the rest is.
WHOSE = re.compile(r'.*service="(?!gateway)[a-z]+".*|service="gateway",instance="[^"]*",?')


def read_metrics(url: str, instance: str = "") -> dict[str, float]:
    """Of one service. `instance`: of several gateways, whose pages have them all; without it, their sum."""
    url = url if url.endswith("/metrics") else f"{url}/metrics"
    with urllib.request.urlopen(url, timeout=10) as answer:
        lines = answer.read().decode().splitlines()
    samples: dict[str, float] = {}
    for line in lines:
        if instance and 'service="gateway"' in line and f'instance="{instance}"' not in line:
            continue
        if line and line[0] != "#" and (own := WHOSE.sub("", line)):
            name, _, value = own.replace("{}", "").rpartition(" ")
            samples[name] = samples.get(name, 0.0) + float(value)
    return samples


# A busy machine is slow, and no test is to be refused for that.
PATIENT = '{"priority": {"ttft_s": 120, "itl_s": 60}, "default": {"ttft_s": 120, "itl_s": 60}}'


def environment(home: Path, **extra: str) -> dict[str, str]:
    # vLLM writes how its processes start into the environment of whoever makes an engine, a test among them.
    own = {key: value for key, value in os.environ.items() if key != START_METHOD}
    return {**own, "BATON_HOME": str(home), "BATON_TARGETS": PATIENT, **extra}


@contextlib.contextmanager
def running_cluster(
    home: Path, *options: str, port: int | None = None, launcher: str = LAUNCHER, **env: str
) -> Iterator[Cluster]:
    """`baton up` with these options; at the end SIGINT, and nothing of it may be left. `launcher`: a module."""
    port = port or free_port()
    process = subprocess.Popen(
        [sys.executable, "-m", launcher, "up", "--port", str(port), *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment(home, **env),
        start_new_session=True,
    )
    cluster = Cluster(port, home, process)
    try:
        _wait_until_ready(cluster)
        everyone = psutil.Process(process.pid).children(recursive=True)
        semaphores = mapped_semaphores(everyone)
        run_folder = Path(json.loads((home / str(port) / "cluster.json").read_text())["run_folder"])
        yield cluster
        semaphores |= mapped_semaphores(psutil.Process(process.pid).children(recursive=True))
        process.send_signal(signal.SIGINT)
        output = process.communicate(timeout=STOP_S)[0]
        assert process.returncode == 0, output[-2000:]
        _, alive = psutil.wait_procs(everyone, timeout=10)
        assert not alive, f"left running: {[p.cmdline() for p in alive if p.is_running()]}"
        assert not shared_memory(port), "shared memory left behind"
        assert not run_folder.exists(), "sockets left behind"
        left = [name for name in semaphores if (SHM / name).exists()]
        assert not left, f"semaphores left behind: {left}"
        for log in (home / str(port) / "logs").glob("*.log"):
            assert "Permissions Violation" not in log.read_text(), f"{log.stem} did what shared/bus_users.py forbids"
    finally:
        if process.poll() is None:
            for child in psutil.Process(process.pid).children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    child.kill()
            process.kill()
            process.communicate(timeout=30)
        subprocess.run([*BATON, "down", "--port", str(port)], env=environment(home), capture_output=True, check=False)


def shared_memory(port: int) -> list[str]:
    return [path.name for path in SHM.glob(f"baton-*{port}*")]


def mapped_semaphores(processes: list[psutil.Process]) -> set[str]:
    """Names of those of Python that these processes use, as far as they are alive."""
    found: set[str] = set()
    for process in processes:
        with contextlib.suppress(OSError):
            maps = Path(f"/proc/{process.pid}/maps").read_text()
            found.update(re.findall(r"/dev/shm/(sem\.mp-\S+)", maps))
    return found


def _wait_until_ready(cluster: Cluster) -> None:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        if cluster.process.poll() is not None:
            raise AssertionError(f"baton up ended: {cluster.process.communicate()[0][-3000:]}")
        try:
            with urllib.request.urlopen(f"{cluster.url}/ready", timeout=2) as answer:
                if answer.status == 200:
                    return
        except OSError:
            pass
        time.sleep(0.2)  # a poll with a deadline: there is no event to wait for across processes
    cluster.process.send_signal(signal.SIGTERM)
    raise AssertionError(f"not ready after {START_S} s: {cluster.process.communicate(timeout=60)[0][-3000:]}")
