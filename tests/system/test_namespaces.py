"""Two nodes as two network namespaces, with a wire between them that can be pulled. Needs root and iproute2."""

import asyncio
import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from services.launcher.brokers import find_nats
from tests.support.two_stores import WAIT_S, arrived, hand_over, keys_of, two_stores, until_known

NATS_PORT = 4222  # of a namespace of its own


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


class Wire:
    """A pair of interfaces, one in each namespace."""

    def __init__(self) -> None:
        self.names = (f"baton-a-{os.getpid()}", f"baton-b-{os.getpid()}")
        self.addresses = ("10.213.7.1", "10.213.7.2")

    def lay(self) -> None:
        for name in self.names:
            ip("netns", "add", name)
        ip("-n", self.names[0], "link", "add", "wire", "type", "veth", "peer", "name", "wire", "netns", self.names[1])
        for name, address in zip(self.names, self.addresses, strict=True):
            ip("-n", name, "address", "add", f"{address}/24", "dev", "wire")
            ip("-n", name, "link", "set", "wire", "up")
            ip("-n", name, "link", "set", "lo", "up")

    def pull(self) -> None:
        ip("-n", self.names[1], "link", "set", "wire", "down")

    def plug(self) -> None:
        ip("-n", self.names[1], "link", "set", "wire", "up")

    def remove(self) -> None:
        for name in self.names:
            with contextlib.suppress(subprocess.CalledProcessError):
                ip("netns", "delete", name)

    def within(self, number: int) -> tuple[str, ...]:
        return ("ip", "netns", "exec", self.names[number])


@pytest.fixture
def wire() -> Iterator[Wire]:
    made = Wire()
    try:
        made.lay()
        yield made
    finally:
        made.remove()


@pytest.fixture
def nats_url(wire: Wire) -> Iterator[str]:
    """In the first namespace; the other one reaches it through the wire."""
    with subprocess.Popen(
        [*wire.within(0), find_nats(), "-a", wire.addresses[0], "-p", str(NATS_PORT)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if "Server is ready" in line:
                break
        yield f"nats://{wire.addresses[0]}:{NATS_PORT}"
        process.kill()


def settings_of(wire: Wire) -> tuple[dict[str, object], dict[str, object]]:
    """Each listens on all addresses of its namespace, and says which of them is its own."""
    first, second = ({"peer_host": "0.0.0.0", "peer_address": address} for address in wire.addresses)
    return first, second


async def test_blocks_go_from_namespace_to_namespace(tmp_path: Path, wire: Wire, nats_url: str) -> None:
    within = (wire.within(0), wire.within(1))
    async with two_stores(tmp_path, nats_url, within=within, settings=settings_of(wire)) as (p, d):
        await hand_over(p, d, "there", 40)
        await hand_over(d, p, "back", 40)


async def test_a_pulled_wire_is_an_error_within_the_deadline_and_a_plugged_one_works_again(
    tmp_path: Path, wire: Wire, nats_url: str
) -> None:
    within = (wire.within(0), wire.within(1))
    async with two_stores(tmp_path, nats_url, within=within, settings=settings_of(wire)) as (p, d):
        keys = keys_of("cut", 4)
        await d.want("d", keys)
        waiting = asyncio.create_task(d.host.wait("d", WAIT_S))
        slots = await until_known(p, d, "p", keys, "d")
        await p.write("p", slots, keys, 0)
        await arrived(d, keys[0])
        wire.pull()
        await p.write("p", slots, keys, 1, 2, 3)
        assert (await waiting).committed == [True, False, False, False]
        wire.plug()
        await p.host.release("p")
        await d.host.release("d")
        await hand_over(p, d, "again")
