import io
import os

import msgpack
import pytest

from services.launcher.commands.tap import line
from services.launcher.progress import Progress
from services.launcher.restarts import Restarts
from services.launcher.state import ClusterFolder, ClusterRecord, ServiceRecord, born, lives


@pytest.mark.parametrize(
    ("lifetimes_s", "delays_s"),
    [
        ([1, 1, 1, 1, 1], [1, 2, 4, 8, None]),
        ([1, 1, 400, 1, 1], [1, 2, 1, 2, 4]),  # it ran long enough to begin anew
        ([400] * 6, [1] * 6),
    ],
)
def test_backoff_doubles_and_gives_up(lifetimes_s: list[float], delays_s: list[float | None]) -> None:
    backoff = Restarts()
    assert [backoff.after_death(lifetime_s) for lifetime_s in lifetimes_s] == delays_s


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_progress_says_who_still_starts_and_for_how_long() -> None:
    out, clock = io.StringIO(), Clock()
    progress = Progress(out, clock)
    progress.begin("kv-0", "starting")
    progress.begin("prefill-0", "starting")
    clock.now = 1.5
    progress.tick()
    progress.done("kv-0", "ready")
    assert out.getvalue() == ""  # quick things are not worth a line
    progress.begin("prefill-0", "loading the engine")
    clock.now = 3
    progress.tick()
    clock.now = 4
    progress.tick()
    clock.now = 7
    progress.tick()
    clock.now = 8
    progress.done("prefill-0", "ready")
    assert out.getvalue().splitlines() == [
        "  prefill-0 loading the engine … 3 s",
        "  prefill-0 loading the engine … 7 s",
        "  prefill-0 ready after 8 s",
    ]


def test_a_terminal_gets_one_line_that_is_rewritten() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    out, clock = Terminal(), Clock()
    progress = Progress(out, clock)
    progress.begin("decode-0", "starting")
    clock.now = 5
    progress.tick()
    progress.line("ready")
    assert out.getvalue() == "  decode-0 starting … 5 s\r\x1b[Kready\n"


def test_tap_shows_messages_without_their_bytes() -> None:
    data = msgpack.packb({"type": "PrefillJob", "tokens": b"1234", "texts": ["a", "b" * 300], "n": 1})
    shown = line("c.prefill.prefill-0", data, 0.25)
    assert ".250 c.prefill.prefill-0 " in shown
    assert '"tokens": "<4 bytes>"' in shown
    assert "b" * 200 + "…" in shown
    assert line("c.x", b"", 0).endswith("(empty)")
    assert line("c.x", b"\xc1", 0).endswith("<1 bytes that are not MessagePack>")


def test_a_process_is_known_by_pid_and_start() -> None:
    me = os.getpid()
    assert lives(me, born(me))
    assert not lives(me, born(1))  # a parent may have started in the same tick of the clock
    assert not lives(me, "")
    assert not lives(0, born(me))


def test_a_cluster_is_remembered_where_only_its_user_reads(tmp_path) -> None:
    folder = ClusterFolder(tmp_path, 8000)
    assert folder.read() is None
    folder.create()
    record = ClusterRecord(
        cluster="baton-8000",
        address="http://127.0.0.1:8000",
        model="m",
        model_path="/m",
        arrangement="auto",
        pid=1,
        born="b",
        run_folder="/r",
        shm_dir="/s",
        nats_url="nats://token@127.0.0.1:1",
        services=[ServiceRecord(role="kv", id="kv-0")],
    )
    folder.write(record)
    assert folder.read() == record
    assert (tmp_path / "8000" / "cluster.json").stat().st_mode & 0o077 == 0
    assert (tmp_path / "8000").stat().st_mode & 0o077 == 0
    folder.forget()
    assert folder.read() is None


def test_a_port_has_one_launcher(tmp_path) -> None:
    folder, other = ClusterFolder(tmp_path, 8000), ClusterFolder(tmp_path, 8000)
    folder.create()
    assert folder.take()
    assert not other.take()
