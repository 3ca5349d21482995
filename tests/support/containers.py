"""The shipped docker-compose.yml in a real engine: this machine's own, or one that is started for the tests and stopped."""

import asyncio
import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx

from tests.support.cluster import free_port

REPOSITORY = Path(__file__).parents[2]
SCRIPTS = REPOSITORY / "tests" / "system"
ENGINE_S = 60
COMMAND_S = 400
PROJECT = "baton-test"


def compose_config(*args: str, **env: str) -> dict[str, Any]:
    """The shipped file as compose understands it; needs no engine."""
    done = subprocess.run(
        ["docker", "compose", *args, "config", "--format", "json"],
        cwd=REPOSITORY,
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


@contextlib.contextmanager
def container_engine(folder: Path) -> Iterator[dict[str, str]]:
    """The environment in which `docker` finds an engine. Everything of one that was started here goes with it."""
    if _answers({}):
        yield {}
        return
    program = shutil.which("dockerd", path=f"{os.environ['PATH']}:/usr/sbin")
    assert program, "no container engine: .ci/run installs what make test-system needs"
    env = {"DOCKER_HOST": f"unix://{folder}/docker.sock"}
    config = folder / "daemon.json"
    config.write_text(
        json.dumps(
            {
                "data-root": f"{folder}/data",
                "exec-root": f"{folder}/exec",
                "pidfile": f"{folder}/docker.pid",
                "hosts": [env["DOCKER_HOST"]],
            }
        )
    )
    log = folder / "dockerd.log"
    with _forwarding_as_it_was():
        with log.open("w") as out:
            daemon = subprocess.Popen([program, "--config-file", config], stdout=out, stderr=out)
        try:
            until(lambda: _answers(env) or daemon.poll() is not None, "the container engine answers", ENGINE_S)
            assert daemon.poll() is None, log.read_text()[-2000:]
            yield env
        finally:
            daemon.terminate()
            daemon.wait(ENGINE_S)
            shutil.rmtree(folder / "data")


@contextlib.contextmanager
def _forwarding_as_it_was() -> Iterator[None]:
    """An engine turns forwarding on and, with it, refuses what is not its own; it leaves both, and its bridge."""
    switch = Path("/proc/sys/net/ipv4/ip_forward")
    policy = subprocess.run(["iptables", "-S", "FORWARD"], capture_output=True, text=True, timeout=60, check=True)
    before = switch.read_text()
    try:
        yield
    finally:
        subprocess.run(["iptables", *policy.stdout.splitlines()[0].split()], timeout=60, check=True)
        switch.write_text(before)
        subprocess.run(["ip", "link", "delete", "docker0"], capture_output=True, timeout=60, check=False)


def package_index(folder: Path) -> dict[str, str]:
    """Where this machine's pip has its packages from, if not from where pip has them by itself, for builds as well."""
    listed = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, timeout=60, check=True
    )
    lines = []
    for key, text in (line.split("=", 1) for line in listed.stdout.splitlines() if "=" in line):
        name, value = key.rpartition(".")[2], text.strip("'")
        reachable = [part for part in value.split() if name == "trusted-host" or part.startswith("http")]
        if name in ("index-url", "extra-index-url", "find-links", "trusted-host") and reachable:
            lines.append(f"{name} = {' '.join(reachable)}")
    if not lines:
        return {}
    config = folder / "pip.conf"
    config.write_text("\n".join(["[global]", *lines, ""]))
    return {"PIP_CONFIG_FILE": str(config)}


class Compose:
    """One project of the shipped file, with settings as a user gives them: in the environment."""

    def __init__(self, engine: dict[str, str], port: int, **settings: str) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self.prometheus_port = free_port()
        ports = {"BATON_PORT": str(port), "PROMETHEUS_PORT": str(self.prometheus_port)}
        self._env = {**os.environ, **engine, **settings, **ports}

    def __call__(self, *args: str, check: bool = True) -> "subprocess.CompletedProcess[str]":
        """`docker compose ARGS`."""
        return self.docker("compose", "--project-name", PROJECT, *args, check=check)

    def docker(self, *args: str, check: bool = True) -> "subprocess.CompletedProcess[str]":
        return self._run(["docker", *args], check=check)

    def make_base_images(self) -> None:
        self._run([str(SCRIPTS / "base_images.sh")], check=True)

    async def scale(self, **counts: int) -> None:
        """`prefill=2` and `decode=3` workers; what runs already is left alone."""
        scales = [f"--scale={role}-worker={count}" for role, count in counts.items()]
        await asyncio.to_thread(self, "up", "--detach", "--wait", "--no-recreate", "--no-build", *scales)

    def ids(self, service: str) -> list[str]:
        """Containers' short ids, which are also the ids of workers on the bus."""
        return [line[:12] for line in self("ps", "--quiet", service).stdout.split()]

    def inside(self, service: str, *command: str, check: bool = True) -> str:
        return self("exec", "-T", service, *command, check=check).stdout

    def health(self, container: str) -> str:
        return self.docker("inspect", "--format", "{{.State.Health.Status}}", container, check=False).stdout.strip()

    def restarts(self, container: str) -> int:
        return int(self.docker("inspect", "--format", "{{.RestartCount}}", container).stdout)

    def everybody_is_healthy(self) -> bool:
        return {self.health(container) for container in self("ps", "--quiet").stdout.split()} == {"healthy"}

    def metrics(self, service: str) -> dict[str, float]:
        """Samples of a service's first container: `name{a="b"}` -> value."""
        page = "import urllib.request as r; print(r.urlopen('http://127.0.0.1:9100/metrics').read().decode())"
        lines = [line for line in self.inside(service, "python", "-c", page).splitlines() if line and line[0] != "#"]
        return {line.rsplit(" ", 1)[0]: float(line.rsplit(" ", 1)[1]) for line in lines}

    def client(self) -> httpx.AsyncClient:
        return httpx.AsyncClient(base_url=f"{self.url}/v1", timeout=120, trust_env=False)

    def _run(self, command: list[str], *, check: bool) -> "subprocess.CompletedProcess[str]":
        done = subprocess.run(
            command, cwd=REPOSITORY, env=self._env, capture_output=True, text=True, timeout=COMMAND_S, check=False
        )
        assert not check or done.returncode == 0, f"{' '.join(command)}: {done.stdout[-2000:]}{done.stderr[-4000:]}"
        return done


def until(reached: Callable[[], bool], what: str, timeout_s: float) -> None:
    """Look until it is so: nothing announces it."""
    deadline = time.monotonic() + timeout_s
    while not reached():
        assert time.monotonic() < deadline, f"not within {timeout_s:g} s: {what}"
        time.sleep(0.1)


def _answers(env: dict[str, str]) -> bool:
    if shutil.which("docker") is None:
        return False
    asked = subprocess.run(
        ["docker", "info"], env={**os.environ, **env}, capture_output=True, timeout=ENGINE_S, check=False
    )
    return asked.returncode == 0
