"""Spans on their way to gateways: sampled ones at once, others when asked for, never more than may be."""

import pytest
from prometheus_client import CollectorRegistry

from shared import span_sender, spans, subjects, wire
from shared.errors import BusUnavailable
from shared.span_sender import SpanSender


class Wire:
    """What a bus does for a sender."""

    def __init__(self) -> None:
        self.sent: list[tuple[str, wire.Spans]] = []
        self.away = False

    async def publish(self, subject: str, message: wire.Spans) -> None:
        if self.away:
            raise BusUnavailable("away")
        self.sent.append((subject, message))


@pytest.fixture
def registry():
    return CollectorRegistry()


@pytest.fixture
def sender(registry):
    return SpanSender("decode", "decode-0", registry)


def ended(gateway: str = "gateway-0", *, sampled: bool = True) -> spans.Span:
    maker = spans.Recorder()
    root = maker.request("gateway.request", gateway, spans.parent_of("", ""), sampled=sampled)
    child = maker.start_span("decode.job", context=spans.in_context(root))
    child.end()
    return child


async def test_sampled_spans_go_to_their_gateways(sender):
    bus = Wire()
    one, two = ended("gateway-0"), ended("gateway-1")
    for span in (one, two):
        sender.take(span)
    await sender.flush(bus, "c")
    assert [subject for subject, _ in bus.sent] == [subjects.spans("c", "gateway-0"), subjects.spans("c", "gateway-1")]
    (record,) = bus.sent[0][1].spans
    assert (record.root, record.service, record.instance) == (one.root, "decode", "decode-0")


async def test_others_wait_until_they_are_asked_for(sender):
    bus = Wire()
    wanted, fresh, other = (ended(sampled=False) for _ in range(3))
    for span in (wanted, other):
        sender.take(span)
    await sender.flush(bus, "c")
    assert bus.sent == []
    sender.take(fresh)
    sender._wanted(wire.SpansWanted(gateway="gateway-0", roots=[wanted.root, fresh.root, "unknown"]))
    await sender.flush(bus, "c")
    ((_, message),) = bus.sent
    assert {record.root for record in message.spans} == {wanted.root, fresh.root}


async def test_too_many_are_dropped_counted_and_told(sender, registry, monkeypatch):
    monkeypatch.setattr(span_sender, "MAX_FRESH", 10)
    monkeypatch.setattr(span_sender, "MAX_BATCH", 4)
    bus = Wire()
    for _ in range(25):
        sender.take(ended())
    await sender.flush(bus, "c")
    assert [len(message.spans) for _, message in bus.sent] == [4, 4, 2]
    assert [message.dropped for _, message in bus.sent] == [15, 0, 0]
    assert registry.get_sample_value("baton_spans_dropped_total", {"reason": "too_many"}) == 15


async def test_held_ones_are_bounded_and_the_oldest_go(sender, registry, monkeypatch):
    monkeypatch.setattr(span_sender, "MAX_HELD", 5)
    bus, all_of_them = Wire(), [ended(sampled=False) for _ in range(9)]
    for span in all_of_them:
        sender.take(span)
    await sender.flush(bus, "c")
    assert registry.get_sample_value("baton_spans_held") == 5
    sender._wanted(wire.SpansWanted(gateway="gateway-0", roots=[span.root for span in all_of_them]))
    await sender.flush(bus, "c")
    assert {record.root for record in bus.sent[0][1].spans} == {span.root for span in all_of_them[4:]}


async def test_while_the_bus_is_away_they_are_lost_and_counted(sender, registry):
    bus = Wire()
    bus.away = True
    sender.take(ended())
    await sender.flush(bus, "c")
    assert registry.get_sample_value("baton_spans_dropped_total", {"reason": "bus"}) == 1
    bus.away = False
    sender.take(ended())
    await sender.flush(bus, "c")
    assert bus.sent[0][1].dropped == 1
