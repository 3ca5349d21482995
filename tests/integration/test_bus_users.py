"""NATS users: what each role may say and hear on a real server, and that a whole cluster needs no more."""

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from shared import subjects, wire
from shared.bus import Bus
from shared.bus_login import Account, inbox
from shared.bus_users import ROLES, authorization, from_environment
from shared.errors import SettingsError, Timeout
from tests.support.nats import nats_server

C = "users"
WAIT_S = 5.0
PASSWORDS = {f"NATS_{role.upper()}_PASSWORD": f"of-{role}" for role in (*ROLES, "operator")}


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder: Path = tmp_path_factory.mktemp("nats")
    with nats_server(folder, more=authorization(C, from_environment), environ=PASSWORDS) as started:
        yield started


async def join(url: str, role: str, password: str = "") -> Bus:
    return await Bus.connect(url, role, Account(user=role, password=password or f"of-{role}"))


class Heard:
    """Messages on a subject, as the operator hears them."""

    def __init__(self) -> None:
        self.messages: list[wire.AnyMessage] = []

    async def on(self, bus: Bus, subject: str) -> "Heard":
        await bus.listen(subject, self.messages.append)
        await bus.flush()
        return self


async def settled(*buses: Bus) -> None:
    """What was published, or refused, before is known by now: the server answers in order."""
    for bus in buses:
        await bus.flush()


@pytest.mark.parametrize("role", ["prefill", "decode", "kv"])
@pytest.mark.parametrize(
    "subject",
    [
        subjects.decode(C, "decode-1"),
        subjects.cancel(C, "decode-1"),
        subjects.beat(C, "gateway", "gateway-0"),
        subjects.metrics(C, "gateway-0"),
        inbox("gateway") + ".x.y",
        inbox("operator") + ".x.y",
        "other.decode.decode-1",
    ],
)
async def test_nobody_else_speaks_as_a_gateway(url: str, role: str, subject: str) -> None:
    operator, liar = await join(url, "operator"), await join(url, role)
    try:
        heard = await Heard().on(operator, subject)
        await liar.publish(subject, wire.Ping())
        await settled(liar, operator)
        assert heard.messages == []
        assert liar.refused == 1
        await operator.publish(subject, wire.Ping())
        await settled(operator)
        assert heard.messages == [wire.Ping()]
    finally:
        await operator.close()
        await liar.close()


@pytest.mark.parametrize(
    ("role", "subject"),
    [
        ("gateway", subjects.gateway(C, "gateway-1")),
        ("kv", subjects.gateway(C, "gateway-1")),
        ("kv", subjects.prefill(C, "prefill-1")),
        ("gateway", subjects.beat(C, "decode", "decode-0")),
        ("prefill", subjects.beat(C, "decode", "decode-0")),
        ("kv", subjects.beat(C, "decode", "decode-0")),
        ("decode", subjects.beat(C, "kv", "kv-0")),
    ],
)
async def test_tokens_come_from_workers_and_beats_from_ones_own_role(url: str, role: str, subject: str) -> None:
    operator, liar = await join(url, "operator"), await join(url, role)
    try:
        heard = await Heard().on(operator, subject)
        await liar.publish(subject, wire.Ping())
        await settled(liar, operator)
        assert heard.messages == []
        assert liar.refused == 1
    finally:
        await operator.close()
        await liar.close()


@pytest.mark.parametrize(
    ("role", "subject"),
    [
        ("decode", subjects.gateway(C, "*")),
        ("kv", subjects.gateway(C, "gateway-0")),
        ("kv", subjects.decode(C, "decode-0")),
        ("gateway", subjects.decode(C, "*")),
        ("decode", inbox("gateway") + ".>"),
        ("decode", "_INBOX.>"),
        ("kv", ">"),
    ],
)
async def test_nobody_hears_what_is_for_others(url: str, role: str, subject: str) -> None:
    operator, spy = await join(url, "operator"), await join(url, role)
    try:
        heard = await Heard().on(spy, subject)
        await operator.publish(subject.replace("*", "x").replace(">", "x"), wire.Ping())
        await settled(operator, spy)
        assert heard.messages == []
        assert spy.refused == 1
    finally:
        await operator.close()
        await spy.close()


async def test_a_worker_answers_who_asks_once(url: str) -> None:
    gateway, worker = await join(url, "gateway"), await join(url, "decode")
    try:

        async def accept(_: wire.AnyMessage, __: object) -> wire.Message:
            return wire.Done()

        await worker.serve(subjects.cancel(C, "decode-0"), accept)
        await worker.flush()
        subject = subjects.cancel(C, "decode-0")
        done = await gateway.request(subject, wire.Cancel(request="r", attempt=0), wire.Done, timeout_s=WAIT_S)
        assert done == wire.Done()
        assert worker.refused == 0
    finally:
        await gateway.close()
        await worker.close()


async def test_a_decode_worker_asks_for_a_prompt_on_a_gateways_behalf(url: str) -> None:
    gateway, decode, prefill = await join(url, "gateway"), await join(url, "decode"), await join(url, "prefill")
    try:
        answered: asyncio.Future[object] = asyncio.get_running_loop().create_future()
        done = wire.PrefillDone(request="r", attempt=0)

        async def compute(_: wire.AnyMessage, __: object) -> wire.Message:
            return done

        subject = subjects.prefill(C, "prefill-0")
        await prefill.serve(subject, compute)
        await prefill.flush()
        reply = gateway.reply_subject(gateway.expect(answered.set_result))
        await decode.publish(subject, wire.Ping(), reply=reply)
        async with asyncio.timeout(WAIT_S):
            assert await answered == done
        await settled(decode, prefill)
        assert decode.refused == prefill.refused == 0
    finally:
        for bus in (gateway, decode, prefill):
            await bus.close()


async def test_a_worker_that_asks_another_one_gets_no_answer(url: str) -> None:
    liar, worker = await join(url, "prefill"), await join(url, "decode")
    asked = asyncio.Event()
    try:

        async def accept(_: wire.AnyMessage, __: object) -> wire.Message:
            asked.set()
            return wire.Done()

        await worker.serve(subjects.decode(C, "decode-0"), accept)
        await worker.flush()
        with pytest.raises(Timeout):
            await liar.request(subjects.decode(C, "decode-0"), wire.Ping(), wire.Done, timeout_s=0.2)
        await settled(liar, worker)
        assert not asked.is_set()
    finally:
        await liar.close()
        await worker.close()


@pytest.mark.parametrize(("role", "password"), [("decode", "of-gateway"), ("nobody", "x")])
async def test_a_wrong_password_is_one_clear_line(
    url: str, role: str, password: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shared.bus.CONNECT_S", 0.5)
    with pytest.raises(SettingsError, match=r"setting 'nats_user': .* refuses this user, password or token") as refusal:
        await join(url, role, password)
    assert password not in str(refusal.value).replace(url, "")


async def test_without_a_user_nobody_joins(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shared.bus.CONNECT_S", 0.5)
    with pytest.raises(SettingsError, match="nats_user"):
        await Bus.connect(url, "nobody")
