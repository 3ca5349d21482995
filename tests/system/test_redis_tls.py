"""Redis as k8s/tls starts it: the shipped command and readiness probe, run by a Redis that was built with TLS."""

import asyncio
import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from services.launcher.machine import free_ports
from shared.access.connection import AWAY, open_redis
from shared.errors import SettingsError
from shared.redis_login import check_login
from shared.tls import Tls
from tests.support.certificates import Authority
from tests.support.manifests import pods

START_S = 20.0


@dataclass
class Served:
    url: str
    tls: Tls
    probe: list[str]
    environ: dict[str, str]


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    authority = Authority(tmp_path / "authority")
    pair = authority.sign("127.0.0.1", "redis")
    secrets = tmp_path / "secrets"
    secrets.mkdir()
    for name, path in (("ca.crt", authority.ca), ("tls.crt", pair.cert), ("tls.key", pair.key)):
        shutil.copy(path, secrets / name)
    (tmp_path / "data").mkdir()
    port = free_ports(1)[0]
    container = pods("k8s/overlays/gpu")["redis"]["spec"]["containers"][0]

    def here(words: list[str]) -> list[str]:
        """With this test's folders and port."""
        changes = {"/run/secrets/tls": str(secrets), "/tmp/redis.conf": f"{tmp_path}/redis.conf", "6379": str(port)}
        changes |= {"--dir /data": f"--dir {tmp_path}/data", "redis-cli": f"redis-cli -p {port}"}
        for old, new in changes.items():
            words = [word.replace(old, new) for word in words]
        return words

    # Debian's redis-tools has the one program for both; its name says what it is to do. No daemon comes with it.
    program = shutil.which("redis-check-rdb")
    assert program, "redis-tools is not installed"
    (tmp_path / "redis-server").symlink_to(program)
    environ = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "REDIS_PASSWORD": "secret"}
    process = subprocess.Popen(here(container["command"]), env=environ, stdout=subprocess.DEVNULL)
    try:
        asyncio.run(_until_it_listens(port))
        tls = Tls(ca=authority.ca, cert=pair.cert, key=pair.key)
        yield Served(
            f"rediss://:secret@127.0.0.1:{port}/0", tls, here(container["readinessProbe"]["exec"]["command"]), environ
        )
        assert process.poll() is None
    finally:
        process.kill()
        process.wait()


async def _until_it_listens(port: int) -> None:
    async with asyncio.timeout(START_S):
        while True:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    return
            await asyncio.sleep(0.02)  # nothing announces it


async def test_the_shipped_redis_takes_its_own_and_nobody_else(served: Served, tmp_path: Path) -> None:
    async with open_redis(served.url, tls=served.tls) as redis:
        await check_login(redis)
        assert "volatile-ttl" in str(await redis.config_get("maxmemory-policy"))
    stranger = Authority(tmp_path / "stranger")
    async with open_redis(served.url, tls=Tls(ca=stranger.ca)) as redis:
        with pytest.raises(SettingsError, match="no TLS with Redis"):
            await check_login(redis)
    async with open_redis(served.url, tls=Tls(ca=served.tls.ca)) as redis:  # shows no certificate
        with pytest.raises(AWAY):
            await redis.ping()
    async with open_redis(served.url.replace("rediss://", "redis://")) as redis:
        with pytest.raises(AWAY):
            await redis.ping()


def test_the_shipped_probe_tells_a_password_from_another(served: Served) -> None:
    def asked(environ: dict[str, str]) -> int:
        return subprocess.run(served.probe, env=environ, capture_output=True, timeout=START_S, check=False).returncode

    assert asked(served.environ) == 0
    assert asked({**served.environ, "REDIS_PASSWORD": "wrong"}) != 0
