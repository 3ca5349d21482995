"""Which gateways a worker takes for dead."""

from shared import wire
from shared.worker.gateways import DEAF_S, LOST_S, Gateways


def beat(gateway: str, incarnation: str = "a") -> wire.Heartbeat:
    return wire.Heartbeat(role="gateway", id=gateway, incarnation=incarnation)


def own() -> wire.Heartbeat:
    return wire.Heartbeat(role="decode", id="decode-0", incarnation="w")


def listening(now: float) -> Gateways:
    gateways = Gateways("decode-0")
    gateways.hear(own(), now)
    return gateways


def test_silence_is_death_after_its_time_and_told_once():
    gateways = listening(0.0)
    gateways.hear(beat("g"), 0.0)
    gateways.hear(own(), LOST_S)
    assert gateways.check(LOST_S) == []
    assert gateways.check(LOST_S + 0.1) == ["g"]
    assert gateways.check(LOST_S + 0.2) == []


def test_a_new_incarnation_says_that_the_old_one_died():
    gateways = listening(0.0)
    assert not gateways.hear(beat("g", "a"), 0.0)
    assert not gateways.hear(beat("g", "a"), 1.0)
    assert gateways.hear(beat("g", "b"), 2.0)
    assert not gateways.hear(beat("g", "b"), 3.0)


def test_nobody_is_judged_while_the_bus_is_away_and_all_have_their_full_time_after_it():
    gateways = listening(0.0)
    gateways.hear(beat("g"), 0.0)
    assert gateways.check(50.0) == []  # own beats are missing, too
    gateways.hear(own(), 51.0)
    assert gateways.check(51.0) == []
    gateways.hear(own(), 50.0 + LOST_S)
    assert gateways.check(50.0 + LOST_S) == []
    assert gateways.check(50.0 + LOST_S + DEAF_S / 2) == ["g"]


def test_other_workers_and_strangers_say_nothing():
    gateways = Gateways("decode-0")
    gateways.hear(wire.Heartbeat(role="decode", id="decode-1", incarnation="x"), 0.0)
    gateways.hear(beat("g"), 0.0)
    assert gateways.check(LOST_S + 1) == []  # its own beats were never heard
