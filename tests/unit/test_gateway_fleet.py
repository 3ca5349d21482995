"""The failure detector and the charges, with time as an argument."""

import pytest

from services.gateway.scheduling.fleet import BEAT_S, DEAF_S, SUSPECT_S, Fleet
from shared import wire


def beat(id="w", incarnation="1", role="decode", **values) -> wire.Heartbeat:  # noqa: A002
    return wire.Heartbeat(role=role, id=id, incarnation=incarnation, takes=values.pop("takes", [role]), **values)


@pytest.fixture
def fleet():
    return Fleet("m")


@pytest.fixture
def told(fleet):
    """Who was lost."""
    fleet.hear(beat(), 0.0)
    losses: list[str] = []
    fleet.on_loss(losses.append)
    return losses


def ids(fleet):
    return [one.id for one in fleet.pools()]


def worker(fleet):
    return next(iter(fleet.pools()))


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


def test_stores_tell_how_fast_the_way_between_nodes_is(fleet):
    assert fleet.pools().link_token_s == 0.0
    for node, bytes_per_s in (("a", 0.0), ("b", 1e6), ("c", 4e6)):
        values = {"node": node, "block_size": 16, "block_bytes": 16_000, "peer_bytes_per_s": bytes_per_s}
        fleet.hear(beat(f"kv-{node}", role="kv", **values), 1.0)
    assert fleet.pools().link_token_s == pytest.approx(1000 / 4e6)


def test_a_new_incarnation_means_that_the_old_one_died(fleet, told):
    fleet.hear(beat(incarnation="2"), 0.1)
    assert told == ["w"]
    assert ids(fleet) == ["w"]


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
    speed = {"prefill_tokens_per_s": 100.0, "prefill_prompt_s": 0.5}
    fleet.hear(beat(**speed), 0.0)
    charge = fleet.charge("w", jobs=1, tokens=100, now=0.1)
    for now in (0.2, 0.4, 0.6):
        fleet.hear(beat(**speed), now)
    assert worker(fleet).begins_at == pytest.approx(0.6 + 1.5)  # not sent yet
    charge.sent_at = 0.79
    fleet.hear(beat(backlog=wire.Backlog(queued_tokens=5), **speed), 0.8)
    assert worker(fleet).begins_at == pytest.approx(0.8 + 0.05 + 1.5)
    fleet.hear(beat(backlog=wire.Backlog(queued_tokens=100, queued_prompts=1), **speed), 1.0)
    assert worker(fleet).begins_at == pytest.approx(1.0 + 1.5)
    fleet.settle(charge)
    assert worker(fleet).begins_at == pytest.approx(1.0 + 1.5)


def test_prompts_under_way_are_done_when_they_should_be():
    """Not when the worker's answer has come all the way back: else the way there would count as work."""
    fleet, speed = Fleet("m"), {"prefill_tokens_per_s": 1000.0}
    fleet.hear(beat(**speed), 0.0)
    for sent_at in (0.10, 0.11, 0.16):
        fleet.charge("w", jobs=1, tokens=20, now=sent_at).sent_at = sent_at
    assert worker(fleet).tokens_until == pytest.approx(0.18)  # the first two were done at 0.14
    assert worker(fleet).prompts == 3


def test_prompts_sent_together_share_what_their_step_costs():
    fleet = Fleet("m")
    fleet.hear(beat(prefill_tokens_per_s=1000.0, prefill_prompt_s=0.03), 0.0)
    for sent_at in (0.1, 0.102):
        fleet.charge("w", jobs=1, tokens=20, now=sent_at).sent_at = sent_at
    assert worker(fleet).bound_at == 0.102
    assert worker(fleet).done_at == pytest.approx(0.1 + 0.03 + 0.04)
    fleet.charge("w", jobs=1, tokens=10, now=0.12).sent_at = 0.12  # for the next step
    assert worker(fleet).done_at == pytest.approx(0.17 + 0.03 + 0.01)


def test_a_worker_s_word_holds_what_was_sent_long_before_it():
    fleet, speed = Fleet("m"), {"prefill_tokens_per_s": 1000.0, "max_running": 8}
    fleet.hear(beat(**speed), 0.0)
    for sent_at in (0.10, 0.19):
        fleet.charge("w", jobs=1, tokens=20, now=sent_at).sent_at = sent_at
    assert worker(fleet).load == 2 / 8
    fleet.report("w", wire.Backlog(running=1, queued_prompts=1, queued_tokens=15), 0.2)
    assert worker(fleet).tokens_until == pytest.approx(0.2 + 0.015 + 0.02)  # the second may have crossed it
    assert (worker(fleet).prompts, worker(fleet).load) == (2, 2 / 8)


def test_a_word_from_before_a_prompt_came_does_not_make_it_done():
    """The way was longer than it should be."""
    fleet, speed = Fleet("m"), {"prefill_tokens_per_s": 1000.0}
    fleet.hear(beat(**speed), 0.0)
    fleet.charge("w", jobs=1, tokens=200, now=0.1).sent_at = 0.1
    fleet.report("w", wire.Backlog(running=1), 0.15)
    assert worker(fleet).tokens_until == pytest.approx(0.3)


def test_a_settled_charge_is_given_back_once(fleet):
    fleet.hear(beat(), 0.0)
    one, other = (fleet.charge("w", jobs=1, tokens=0, now=0.0) for _ in range(2))
    fleet.settle(one)
    fleet.settle(one)
    assert worker(fleet).load == 1
    fleet.lose("w")
    fleet.settle(other)


def test_a_reply_is_fresher_than_the_last_beat(fleet):
    fleet.hear(beat(backlog=wire.Backlog(running=1)), 0.0)
    fleet.report("w", wire.Backlog(running=7), 0.1)
    assert worker(fleet).load == 7


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


# ---- what the whole cluster does -------------------------------------------------------------------------------

PREFILL = {"prefill_tokens_per_s": 1000.0, "prefill_prompt_s": 0.01, "max_running": 4}
DECODE = {"decode_step_s": 0.02, "decode_sequence_s": 0.001, "max_running": 32, "load_s": 0.005}


def cluster(arrangement="split", **backlog):
    fleet = Fleet("m", gateway="g0", arrangement=arrangement)
    fleet.expected_output = 100.0
    for name in ("p0", "p1"):
        fleet.hear(beat(name, role="prefill", backlog=wire.Backlog(**backlog), **PREFILL), 10.0)
    fleet.hear(beat("d0", **DECODE), 10.0)
    return fleet


def test_speeds_add_up():
    speeds = cluster(queued_tokens=500, queued_prompts=1, waiting=1).speeds(10.0, 0.1)
    assert speeds.prefill_tokens_per_s == 2000
    assert speeds.backlog_s == pytest.approx(0.51)
    assert speeds.prefillers == 2
    assert speeds.load_s == 0.005
    assert not speeds.idle
    assert speeds.sequences == 32
    # 32 at once, each for 100 steps of 51 ms
    assert speeds.requests_per_s == pytest.approx(32 / (100 * 0.051))


def test_the_gap_s_target_bounds_what_runs_at_once():
    assert cluster().speeds(10.0, 0.03).sequences == pytest.approx(11)


def test_without_prefill_workers_decode_computes_prompts():
    fleet = cluster(arrangement="unsplit")
    assert fleet.speeds(10.0, 0.1).prefill_tokens_per_s == 0
    fleet.hear(beat("d0", **DECODE, prefill_tokens_per_s=50.0), 10.2)
    speeds = fleet.speeds(10.2, 0.1)
    assert (speeds.prefill_tokens_per_s, speeds.load_s) == (50, 0)


def test_speeds_are_worked_out_again_only_after_a_while():
    fleet = cluster()
    before = fleet.speeds(10.0, 0.1)
    fleet.lose("p0")
    assert fleet.speeds(10.05, 0.1) is before
    assert fleet.speeds(10.2, 0.1).prefillers == 1


def test_a_decode_worker_that_is_full_has_a_sequence_later():
    fleet = cluster()
    fleet.hear(beat("d0", **DECODE | {"max_running": 2, "max_waiting": 4}, backlog=wire.Backlog(running=2)), 10.2)
    one = fleet.pools().get("d0")
    assert one.has_room
    assert one.step_s == pytest.approx(0.021)
    assert one.sequence_s == pytest.approx(100 * 0.021 / 2)  # the first of two to end
    fleet.report("d0", wire.Backlog(running=2, waiting=4), 10.3)
    assert not fleet.pools().get("d0").has_room


def test_memory_that_is_promised_is_not_free():
    fleet = cluster()
    fleet.hear(beat("d0", **DECODE, kv_tokens=1000, kv_usage=0.5, kv_promised=200), 10.2)
    assert fleet.pools().get("d0").kv_free == 300


def test_lines_of_other_gateways():
    fleet = cluster()
    fleet.hear(beat("g0", role="gateway", backlog=wire.Backlog(queued_prompts=9, queued_tokens=9)), 10.0)  # own
    fleet.hear(beat("g1", role="gateway", backlog=wire.Backlog(queued_prompts=2, queued_tokens=30)), 10.0)
    fleet.hear(beat("g2", role="gateway", backlog=wire.Backlog(queued_prompts=1, queued_tokens=10)), 10.9)
    assert fleet.lines_elsewhere(10.9) == (3, 40)
    assert fleet.lines_elsewhere(11.5) == (1, 10)
