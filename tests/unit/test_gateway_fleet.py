"""The failure detector and the charges, with time as an argument."""

import pytest

from services.gateway.fleet import BEAT_S, DEAF_S, SUSPECT_S, Fleet
from shared import wire


def beat(id="w", incarnation="1", role="decode", **values) -> wire.Heartbeat:  # noqa: A002
    return wire.Heartbeat(role=role, id=id, incarnation=incarnation, takes=values.pop("takes", [role]), **values)


@pytest.fixture
def fleet():
    return Fleet("m")


@pytest.fixture
def told(fleet):
    """How often the watcher of `w` has been told of its loss."""
    fleet.hear(beat(), 0.0)
    losses: list[str] = []
    with fleet.watching("w", lambda: losses.append("w")):
        yield losses


def ids(fleet):
    return [one.id for one in fleet.candidates()]


def test_three_missed_beats_stop_placement_and_a_beat_brings_it_back(fleet, told):
    assert fleet.check(2 * BEAT_S) == []
    assert fleet.check(SUSPECT_S + 0.01) == ["w"]
    assert ids(fleet) == []
    assert told == []
    fleet.hear(beat(), 1.0)
    assert ids(fleet) == ["w"]


def test_loss_is_told_once(fleet, told):
    fleet.lose("w")
    fleet.lose("w")
    assert told == ["w"]
    assert ids(fleet) == []


def test_a_store_reports_a_closed_socket(fleet, told):
    fleet.hear(beat("kv-0", role="kv", lost=["w", "unknown"]), 1.0)
    assert told == ["w"]
    fleet.hear(beat(), 1.0 + DEAF_S / 2)  # was under way
    assert ids(fleet) == []
    fleet.hear(beat(), 1.0 + DEAF_S * 1.1)
    assert ids(fleet) == ["w"]


def test_a_new_incarnation_means_that_the_old_one_died(fleet, told):
    fleet.hear(beat(incarnation="2"), 0.1)
    assert told == ["w"]
    assert ids(fleet) == ["w"]


def test_watching_somebody_who_is_gone(fleet):
    losses: list[str] = []
    with fleet.watching("nobody", lambda: losses.append("x")):
        assert losses == ["x"]


def test_our_own_silence_condemns_nobody(fleet, told):
    fleet.excuse(100.0)
    assert fleet.check(100.1) == []


@pytest.mark.parametrize("state", ["starting", "draining"])
def test_only_the_ready_are_given_work(fleet, state):
    fleet.hear(beat(state=state), 0.0)
    assert ids(fleet) == []
    assert fleet.states() == {("decode", state): 1}


def test_another_model_is_not_ours(fleet):
    fleet.hear(beat(model="other"), 0.0)
    assert fleet.states() == {}


def test_roles_are_soft(fleet):
    fleet.hear(beat(role="prefill", takes=["prefill", "decode"]), 0.0)
    assert fleet.has("decode")
    assert not fleet.has("decode", besides={"w"})


def test_charges_count_until_the_second_beat_after_sending(fleet):
    fleet.hear(beat(), 0.0)
    charge = fleet.charge("w", jobs=1, tokens=100)
    fleet.hear(beat(), 0.2)
    fleet.hear(beat(), 0.4)
    fleet.hear(beat(), 0.6)
    assert fleet.candidates()[0].queued_tokens == 100  # not sent yet
    charge.sent = True
    fleet.hear(beat(backlog=wire.Backlog(queued_tokens=5)), 0.8)
    assert fleet.candidates()[0].queued_tokens == 105
    fleet.hear(beat(backlog=wire.Backlog(queued_tokens=100)), 1.0)
    assert fleet.candidates()[0].queued_tokens == 100
    fleet.settle(charge)
    assert fleet.candidates()[0].queued_tokens == 100


def test_a_settled_charge_is_given_back_once(fleet):
    fleet.hear(beat(), 0.0)
    one, other = (fleet.charge("w", jobs=1, tokens=0) for _ in range(2))
    fleet.settle(one)
    fleet.settle(one)
    assert fleet.candidates()[0].jobs == 1
    fleet.lose("w")
    fleet.settle(other)


def test_a_reply_is_fresher_than_the_last_beat(fleet):
    fleet.hear(beat(backlog=wire.Backlog(running=1)), 0.0)
    fleet.report("w", wire.Backlog(running=7))
    assert fleet.candidates()[0].jobs == 7


def test_listeners_hear_of_changes(fleet):
    changes: list[int] = []
    fleet.on_change(lambda: changes.append(1))
    fleet.hear(beat(), 0.0)
    fleet.lose("w")
    assert len(changes) == 2


def test_the_context_is_the_smallest_that_was_announced(fleet):
    fleet.hear(beat(max_model_len=100), 0.0)
    fleet.hear(beat("v", max_model_len=50), 0.0)
    assert fleet.max_model_len == 50


def test_a_suspect_gets_nothing_new_and_still_counts(fleet):
    fleet.hear(beat(role="decode"), 0.0)
    assert fleet.check(SUSPECT_S + 0.01) == ["w"]
    assert ids(fleet) == []
    assert fleet.has("decode")
    fleet.lose("w")
    assert not fleet.has("decode")
