"""Three NATS servers: services find them all in one setting, and the loss of any one is a moment's pause."""

import asyncio
import contextlib
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from services.launcher.machine import free_ports
from shared import subjects, wire
from shared.bus import Bus
from shared.bus_login import Account
from shared.bus_users import ROLES
from shared.errors import BatonError
from shared.tls import Tls
from tests.support.certificates import Authority
from tests.support.nats import binary

C = "baton"
SHIPPED = Path(__file__).parents[2] / "k8s" / "base" / "nats"
HERE = "127.0.0.1"
WAIT_S = 20.0
PASSWORDS = {f"NATS_{role.upper()}_PASSWORD": f"of-{role}" for role in (*ROLES, "operator", "routes")}


class Servers:
    """The configuration that k8s/base/nats ships; with ports of the test's own, and TLS for clients."""

    def __init__(self, folder: Path, authority: Authority) -> None:
        pair = authority.sign(HERE)
        ports = free_ports(9)
        self.ports, routes, monitors = ports[:3], ports[3:6], ports[6:]
        self._running: dict[int, subprocess.Popen[bytes]] = {}
        config = folder / "nats.conf"
        tls = f'tls {{ cert_file: "{pair.cert}", key_file: "{pair.key}", ca_file: "{authority.ca}" }}\n'
        config.write_bytes((SHIPPED / "nats.conf").read_bytes())
        (folder / "tls.conf").write_text(tls)
        (folder / "users.conf").write_bytes((SHIPPED / "users.conf").read_bytes())
        password = PASSWORDS["NATS_ROUTES_PASSWORD"]
        known = ",".join(f"nats://routes:{password}@{HERE}:{route}" for route in routes)
        for port, route, monitor in zip(self.ports, routes, monitors, strict=True):
            words = ("--config", str(config), "--addr", HERE, "--port", str(port), "--http_port", str(monitor))
            more = (
                "--cluster",
                f"nats://routes:{password}@{HERE}:{route}",
                "--routes",
                known,
                "--pid",
                str(folder / f"{port}.pid"),
            )
            self._running[port] = subprocess.Popen(
                [binary(), *words, *more],
                env={**PASSWORDS, "SERVER_NAME": f"nats-{port}"},
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )

    @property
    def urls(self) -> str:
        return ",".join(f"tls://{HERE}:{port}" for port in self.ports)

    def kill(self, port: int) -> None:
        server = self._running.pop(port)
        server.send_signal(signal.SIGKILL)
        server.wait()

    def end(self) -> None:
        for port in list(self._running):
            self.kill(port)


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path / "authority")


@pytest.fixture
def servers(tmp_path: Path, authority: Authority) -> Iterator[Servers]:
    started = Servers(tmp_path, authority)
    yield started
    started.end()


async def join(urls: str, authority: Authority, role: str) -> Bus:
    return await Bus.connect(urls, role, Account(user=role, password=f"of-{role}", tls=Tls(ca=authority.ca)))


def port_of(bus: Bus) -> int:
    return int(bus._client.connected_url.port)


async def answered(bus: Bus) -> None:
    """Until the worker is heard again; what is in between is an error that a gateway tries anew."""
    async with asyncio.timeout(WAIT_S):
        while True:
            with contextlib.suppress(BatonError):
                await bus.request(subjects.ping(C, "decode-0"), wire.Ping(), wire.Pong, timeout_s=0.5)
                return


async def test_the_loss_of_any_server_is_survived(servers: Servers, authority: Authority) -> None:
    # Each knows one of its own first; all know all.
    gateway = await join(servers.urls, authority, "gateway")
    worker = await join(servers.urls, authority, "decode")
    try:

        async def pong(_: wire.AnyMessage, __: object) -> wire.Message:
            return wire.Pong(id="decode-0")

        await worker.serve(subjects.ping(C, "decode-0"), pong)
        await worker.flush()
        await answered(gateway)
        for loser in (gateway, worker):
            before = loser.reconnects
            lost = port_of(loser)
            servers.kill(lost)
            await answered(gateway)
            async with asyncio.timeout(WAIT_S):
                while loser.reconnects == before:
                    await answered(gateway)
            assert port_of(loser) != lost
    finally:
        await gateway.close()
        await worker.close()


async def test_servers_find_each_other_and_pass_on(servers: Servers, authority: Authority) -> None:
    first, second, _ = servers.urls.split(",")
    gateway, worker = await join(first, authority, "gateway"), await join(second, authority, "decode")
    try:

        async def pong(_: wire.AnyMessage, __: object) -> wire.Message:
            return wire.Pong(id="decode-0")

        await worker.serve(subjects.ping(C, "decode-0"), pong)
        await worker.flush()
        await answered(gateway)
        assert port_of(gateway) != port_of(worker)
    finally:
        await gateway.close()
        await worker.close()
