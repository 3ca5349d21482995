"""Who is on the page: alive, silent, lost, stopped, back; and for how long."""

from services.gateway.observe.dashboard import attendance as page
from services.gateway.observe.dashboard.attendance import KEEP_S, MAX_GONE, MAX_SERVICES, Attendance
from shared import wire

MODEL = "m"


class Told:
    """A attendance and a failure detector that says what the test says."""

    def __init__(self) -> None:
        self.lost: set[str] = set()
        self.attendance = Attendance(MODEL, lambda worker: worker not in self.lost)

    def beat(self, id_: str, now: float, **more) -> None:
        role = more.pop("role", id_.split("-", maxsplit=1)[0])
        beat = wire.Heartbeat(role=role, id=id_, **{"incarnation": "1", "model": MODEL, **more})
        self.attendance.hear(beat, now)

    def row(self, id_: str, now: float) -> dict:
        self.attendance.look(now)
        (found,) = [row for row in self.attendance.rows(now) if row["id"] == id_]
        return found

    def ids(self, now: float) -> list[str]:
        self.attendance.look(now)
        return [row["id"] for row in self.attendance.rows(now)]


def test_a_row_says_what_the_beat_said():
    told = Told()
    told.beat(
        "decode-0",
        1.0,
        node="node-0",
        engine="sim",
        takes=["decode"],
        max_running=8,
        kv_usage=0.51239,
        decode_step_s=0.0301,
        backlog=wire.Backlog(running=3, waiting=1),
    )
    assert told.row("decode-0", 1.1) == {
        "id": "decode-0",
        "role": "decode",
        "state": "ready",
        "node": "node-0",
        "running": 3,
        "waiting": 1,
        "max_running": 8,
        "takes": ["decode"],
        "engine": "sim",
        "kv": 0.512,
        "step_ms": 30.1,
    }


def test_silence_is_not_loss_until_the_failure_detector_says_so():
    told = Told()
    told.beat("decode-0", 1.0)
    assert told.row("decode-0", 1.6)["state"] == "ready"
    assert told.row("decode-0", 1.8)["state"] == "silent"
    told.lost.add("decode-0")
    assert told.row("decode-0", 3.0) | {"state": "lost", "quiet_s": 2.0} == told.row("decode-0", 3.0)


def test_one_that_drained_has_stopped_and_is_not_lost():
    told = Told()
    told.beat("prefill-0", 1.0, state="draining")
    told.lost.add("prefill-0")
    assert told.row("prefill-0", 4.0)["state"] == "stopped"


def test_the_lost_stay_for_a_while():
    told = Told()
    told.beat("decode-0", 1.0)
    told.lost.add("decode-0")
    told.row("decode-0", 2.0)
    assert told.ids(1.9 + KEEP_S) == ["decode-0"]
    assert told.ids(2.1 + KEEP_S) == []
    assert len(told.attendance) == 0


def test_one_that_came_back_is_marked_from_when_it_was_lost():
    told = Told()
    told.beat("decode-0", 1.0)
    told.lost.add("decode-0")
    assert told.row("decode-0", 2.0)["state"] == "lost"
    told.lost.clear()
    told.beat("decode-0", 5.0, incarnation="2", state="starting")
    assert (told.row("decode-0", 5.0)["state"], told.row("decode-0", 5.0)["gone_s"]) == ("starting", 3)
    told.beat("decode-0", 7.0, incarnation="2")
    assert (told.row("decode-0", 7.0)["state"], told.row("decode-0", 7.0)["gone_s"]) == ("ready", 5)
    told.beat("decode-0", 8.0 + KEEP_S, incarnation="2")
    assert "gone_s" not in told.row("decode-0", 8.0 + KEEP_S)


def test_one_that_was_replaced_before_it_was_missed_is_marked_too():
    told = Told()
    told.beat("decode-0", 1.0)
    told.beat("decode-0", 1.2, incarnation="2")
    assert told.row("decode-0", 1.3)["gone_s"] == 0


def test_gateways_and_stores_are_lost_after_a_silence():
    told = Told()
    told.beat("gateway-0", 1.0)
    told.beat("kv-0", 1.0, model="", slots={"free": 3})
    assert told.row("kv-0", 1.5)["slots"] == {"free": 3}
    assert told.row("gateway-0", 4.5)["state"] == "lost"
    assert [one.id for one in told.attendance.alive("kv", 1.5)] == ["kv-0"]
    assert told.attendance.alive("kv", 4.5) == []


def test_order_is_by_role_and_number_and_strangers_are_left_out():
    told = Told()
    for id_ in ("kv-0", "decode-10", "decode-2", "gateway-0", "prefill-0"):
        told.beat(id_, 1.0)
    told.beat("decode-9", 1.0, model="another")
    told.beat("x", 1.0, role="nats")
    assert told.ids(1.1) == ["gateway-0", "prefill-0", "decode-2", "decode-10", "kv-0"]


def test_it_is_bounded(monkeypatch):
    told = Told()
    for at in range(MAX_SERVICES + 5):
        told.beat(f"decode-{at}", 1.0)
    assert len(told.attendance) == MAX_SERVICES
    told.lost |= {f"decode-{at}" for at in range(MAX_SERVICES)}
    assert len(told.ids(2.0)) == MAX_GONE
    assert page.GONE_S > page.SUSPECT_S
