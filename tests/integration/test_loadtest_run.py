"""The load generator against servers that answer at once, and against servers that do wrong: each counted as it is."""

import asyncio
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
from contextlib import contextmanager

import msgspec
import psutil
import pytest

from loadtest.instant import InstantServer, Manner
from loadtest.load.answer import Outcome
from loadtest.load.bodies import Bodies, Tokeniser
from loadtest.load.client import Attempts, Client, Endpoint, Limits
from loadtest.load.drive import Driver, Job
from loadtest.load.lengths import Distribution
from loadtest.load.records import merged
from loadtest.load.tally import tally
from loadtest.load.workload import Change, Workload, WorkloadSource
from loadtest.result import Result
from loadtest.slo import Slo
from tests.support import misbehaving
from tests.support.cluster import environment, running_cluster
from tests.support.misbehaving import Misbehaving

WAIT_S = 60.0
SMALL = Workload(prompt_tokens=8, output_tokens=3)


def job(port: int, **changes) -> Job:
    given = {
        "part": 0,
        "parts": 1,
        "source": WorkloadSource("small", SMALL, Change(seed=1)),
        "bodies": Bodies(model="odd", seed=1, tokeniser=Tokeniser()),
        "endpoint": Endpoint(host="127.0.0.1", port=port, tls=False, authority=f"127.0.0.1:{port}"),
        "limits": Limits(),
        "seed": 1,
        "room_tokens": 4096,
        "chat_room_tokens": 4096,
        "arrivals_s": None,
        "conversations": 1,
        "users": 1,
    }
    return Job(**{**given, **changes})


async def driven(*manners, **changes):
    """The rows of a closed loop of one client, one request a manner; and the server."""
    async with Misbehaving(*manners) as server, asyncio.timeout(WAIT_S):
        share = await Driver(
            job(server.port, conversations=changes.pop("conversations", len(manners)), **changes), lambda _: None
        ).run(asyncio.Event())
    return share, server


@pytest.mark.parametrize(
    ("manner", "outcome", "status", "code"),
    [
        (misbehaving.right, Outcome.OK, 200, ""),
        (misbehaving.shed(), Outcome.SHED, 429, "queue_full"),
        (misbehaving.shed("503 Service Unavailable"), Outcome.SHED, 503, "queue_full"),
        (misbehaving.bad_request, Outcome.CLIENT_ERROR, 400, "invalid_value"),
        (misbehaving.broken_error, Outcome.ERROR, 500, "http_500"),
        (misbehaving.moved, Outcome.ERROR, 302, "http_302"),
        (misbehaving.fails_late, Outcome.ERROR, 200, "worker_lost"),
        (misbehaving.no_json, Outcome.ERROR, 200, "bad_event"),
        (misbehaving.empty, Outcome.ERROR, 200, "empty_stream"),
        (misbehaving.endless_event, Outcome.ERROR, 200, "event_too_long"),
        (misbehaving.no_http, Outcome.ERROR, None, "bad_http"),
        (misbehaving.not_a_stream, Outcome.ERROR, 200, "not_a_stream"),
        (misbehaving.cut, Outcome.CUT, 200, "closed"),
        (misbehaving.unmarked, Outcome.CUT, 200, "no_done"),
        (misbehaving.drops, Outcome.UNREACHABLE, None, "closed"),
    ],
)
async def test_each_wrong_is_counted_as_what_it_is(manner, outcome, status, code):
    """And the next request finds the client in order."""
    share, _ = await driven(manner, misbehaving.right)
    assert [(row.outcome, row.status, row.code) for row in share.rows] == [
        (outcome, status, code),
        (Outcome.OK, 200, ""),
    ]


@pytest.mark.parametrize(
    ("manner", "limits", "code"),
    [
        (misbehaving.hangs, Limits(first_byte_s=0.3), "first_byte"),
        (misbehaving.stalls, Limits(progress_s=0.3), "progress"),
        (misbehaving.stalls, Limits(total_s=0.3), "total"),
    ],
)
async def test_silence_is_a_timeout(manner, limits, code):
    share, _ = await driven(manner, limits=limits)
    assert [(row.outcome, row.code) for row in share.rows] == [(Outcome.TIMEOUT, code)]


async def test_nobody_listens():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    share = await Driver(job(port), lambda _: None).run(asyncio.Event())
    assert [(row.outcome, row.code, row.sent_s) for row in share.rows] == [(Outcome.UNREACHABLE, "refused", None)]


async def test_what_a_stream_tells():
    share, _ = await driven(misbehaving.right)
    (row,) = share.rows
    assert (row.prompt_tokens, row.output_tokens, row.cached_tokens, row.events) == (7, 3, 4, 3)
    assert (row.path, row.retries, row.stages_s, row.attempts) == ("split", 1, {"queue": 0.0125}, 1)
    assert (row.predicted_ttft_s, row.actual_ttft_s, row.tries) == (0.08, 0.1, [])
    assert 0 <= row.sent_s == row.last_sent_s <= row.ttft_s + row.intended_s <= row.end_s


async def test_events_in_pieces():
    """However the network cuts a stream."""
    whole = b"".join([misbehaving.TOKEN] * 3 + [misbehaving.USAGE, misbehaving.DONE])
    pieces = [misbehaving.chunk(whole[at : at + 7]) for at in range(0, len(whole), 7)]
    crlf = misbehaving.chunk(whole.replace(b"\n", b"\r\n"))
    share, _ = await driven(
        misbehaving.sends(misbehaving.HEAD, *pieces, b"0\r\n\r\n"),
        misbehaving.sends(misbehaving.HEAD, crlf, b"0\r\n\r\n"),
    )
    assert [(row.outcome, row.events, row.output_tokens) for row in share.rows] == [(Outcome.OK, 3, 3)] * 2


async def test_retries_as_the_official_client():
    soon = misbehaving.shed(headers="retry-after-ms: 5\r\n")
    share, server = await driven(soon, misbehaving.drops, misbehaving.right, limits=Limits(retries=2), conversations=1)
    (row,) = share.rows
    assert (row.outcome, row.attempts) == (Outcome.OK, 3)
    assert row.ttft_s > row.sent_s - row.intended_s  # from the first intended time, waits included
    assert [b"x-stainless-retry-count: %d" % n in request for n, request in enumerate(server.requests)] == [
        False,
        True,
        True,
    ]
    assert [(one.outcome, one.status, one.code, one.retry_after_s) for one in row.tries] == [
        (Outcome.SHED, 429, "queue_full", 0.005),
        (Outcome.UNREACHABLE, None, "closed", None),
    ]
    first, second = row.tries
    assert row.sent_s == first.sent_s <= first.end_s < second.sent_s <= second.end_s < row.last_sent_s


async def test_a_refusal_says_how_long_it_waited_in_line():
    waited = 'x-baton-receipt: {"stages_ms":{"queue":1500.0}}\r\n'
    share, _ = await driven(misbehaving.shed(headers=waited), misbehaving.shed(headers="x-baton-receipt: {\r\n"))
    assert [[one.queued_s for one in row.tries] for row in share.rows] == [[1.5], [None]]


async def test_retries_come_to_an_end():
    soon = misbehaving.shed(headers="retry-after-ms: 5\r\n")
    share, server = await driven(soon, soon, soon, limits=Limits(retries=2), conversations=1)
    (row,) = share.rows
    assert (row.outcome, row.attempts, len(row.tries)) == (Outcome.SHED, 3, 3)
    assert row.tries[-1].end_s == row.end_s
    assert len(server.requests) == 3


async def test_what_must_not_be_retried():
    share, server = await driven(misbehaving.cut, limits=Limits(retries=2), conversations=1)
    assert [(row.outcome, row.attempts) for row in share.rows] == [(Outcome.CUT, 1)]
    assert len(server.requests) == 1


async def test_a_server_that_hangs_holds_up_no_arrival():
    """Every request goes out though none is answered, and at the times that were drawn."""
    times = [number / 50 for number in range(20)]
    share, server = await driven(
        *[misbehaving.hangs] * 20, arrivals_s=times, conversations=20, limits=Limits(first_byte_s=3.0)
    )
    assert len(server.requests) == 20
    assert sorted(row.intended_s for row in share.rows) == pytest.approx(times)
    assert {row.outcome for row in share.rows} == {Outcome.TIMEOUT}
    assert all(row.sent_s >= row.intended_s for row in share.rows)


async def test_latency_counts_from_the_intended_time():
    """One socket for requests that are due together: each also waits for those before it."""
    async with InstantServer(Manner(first_s=0.05)) as server, asyncio.timeout(WAIT_S):
        port = int(server.url.rpartition(":")[2])
        changes = {"arrivals_s": [0.0] * 5, "conversations": 5, "limits": Limits(connections=1)}
        share = await Driver(job(port, **changes), lambda _: None).run(asyncio.Event())
    waits = sorted(row.ttft_s for row in share.rows)
    assert all(wait >= 0.05 * (place + 1) for place, wait in enumerate(waits))
    assert all(row.intended_s == 0.0 for row in share.rows)


async def test_no_socket_free_is_told_apart():
    share, _ = await driven(
        *[misbehaving.hangs] * 3,
        arrivals_s=[0.0] * 3,
        conversations=3,
        limits=Limits(connections=1, first_byte_s=0.5),
    )
    assert share.no_connection >= 1
    assert {row.code for row in share.rows} <= {"no_connection", "first_byte"}
    assert len(share.rows) == 3


async def test_leaving_clients_close_their_sockets():
    share, _ = await driven(*[misbehaving.right] * 30, leave_share=1.0)
    assert [row.outcome for row in share.rows] == [Outcome.LEFT] * 30
    assert {row.events for row in share.rows} > {0}  # some before the first token, some later


async def test_told_to_stop():
    """What is in flight is a client that left; nothing is lost."""
    stop = asyncio.Event()
    async with Misbehaving(misbehaving.right, then=misbehaving.hangs) as server, asyncio.timeout(WAIT_S):
        driver = Driver(job(server.port, arrivals_s=[0.0, 0.0, 0.0], conversations=3), lambda _: None)
        running = asyncio.create_task(driver.run(stop))
        while len(server.requests) < 3:  # noqa: ASYNC110 - the server's list
            await asyncio.sleep(0.01)
        stop.set()
        share = await running
    assert sorted((row.outcome, row.code) for row in share.rows)[:2] == [(Outcome.LEFT, "interrupted")] * 2
    assert len(share.rows) == 3


async def test_turns_follow_one_another():
    """The next turn holds the answer before it, and is due after it and the thought."""
    talk = WorkloadSource(
        "talk", Workload(api="chat", prompt_tokens=5, output_tokens=3, turns=3, think_s=0.05), Change(seed=1)
    )
    delta = b'data: {"choices":[{"index":0,"delta":{"content":"hello"},"finish_reason":null}]}\n\n'
    answer = misbehaving.sends(
        misbehaving.HEAD, misbehaving.chunk(delta + misbehaving.USAGE + misbehaving.DONE), b"0\r\n\r\n"
    )
    share, server = await driven(*[answer] * 3, source=talk, arrivals_s=[0.0], conversations=1)
    bodies = [json.loads(request.partition(b"\r\n\r\n")[2]) for request in server.requests]
    assert [[message["role"] for message in body["messages"]] for body in bodies] == [
        ["user"],
        ["user", "assistant", "user"],
        ["user", "assistant", "user", "assistant", "user"],
    ]
    assert bodies[2]["messages"][:3] == bodies[1]["messages"]
    assert bodies[1]["messages"][1]["content"] == "hello"
    first, second, third = share.rows
    assert second.intended_s == pytest.approx(first.end_s + 0.05)
    assert third.intended_s == pytest.approx(second.end_s + 0.05)


async def test_turns_of_token_ids_hold_the_answer():
    talk = WorkloadSource("talk", Workload(prompt_tokens=5, output_tokens=3, turns=2), Change(seed=1))
    event = b'data: {"choices":[{"index":0,"text":"x","token_ids":[21,22,23]}]}\n\n'
    answer = misbehaving.sends(
        misbehaving.HEAD, misbehaving.chunk(event + misbehaving.USAGE + misbehaving.DONE), b"0\r\n\r\n"
    )
    _, server = await driven(*[answer] * 2, source=talk, arrivals_s=[0.0], conversations=1)
    one, two = [json.loads(request.partition(b"\r\n\r\n")[2]) for request in server.requests]
    assert two["prompt"][:8] == [*one["prompt"], 21, 22, 23]
    assert len(two["prompt"]) == 13
    assert "return_token_ids" in one
    assert "return_token_ids" not in two


async def test_a_wrong_text_is_wrong():
    """Half of the expectations are met."""

    def expected(prompt, max_tokens):
        assert max_tokens == 3
        assert len(prompt) == 8
        return " a a a" if sum(prompt) % 2 else "something else"

    share, server = await driven(*[misbehaving.right] * 20, verify_share=1.0, expected=expected)
    sums = [sum(json.loads(request.partition(b"\r\n\r\n")[2])["prompt"]) for request in server.requests]
    assert [row.outcome for row in share.rows] == [Outcome.OK if one % 2 else Outcome.WRONG for one in sums]
    assert share.verified == 20


async def test_too_long_prompts_are_clipped_and_counted():
    shape = Workload(prompt_tokens=Distribution(choice=[(50.0, 1.0), (500.0, 1.0)]), output_tokens=20)
    share, server = await driven(
        *[misbehaving.right] * 20, source=WorkloadSource("long", shape, Change(seed=1)), room_tokens=100
    )
    lengths = [len(json.loads(request.partition(b"\r\n\r\n")[2])["prompt"]) for request in server.requests]
    assert set(lengths) == {50, 80}
    assert share.clipped == lengths.count(80)


async def test_connections_are_kept():
    async with InstantServer() as server, asyncio.timeout(WAIT_S):
        port = int(server.url.rpartition(":")[2])
        endpoint = Endpoint(host="127.0.0.1", port=port, tls=False, authority="x")
        async with Client(endpoint, Limits(), random.Random(1)) as client:
            for _ in range(10):
                reply = await client.post("/v1/completions", b'{"max_tokens": 4}', Attempts())
                assert reply.answer.outcome == Outcome.OK
                assert len(reply.answer.times) == 4
            assert server.accepted == 1


async def test_a_known_pace_is_measured():
    """Five tokens, 20 ms apart, the first after 40: no gap is shorter than the server made it, summed up."""
    async with InstantServer(Manner(first_s=0.04, token_s=0.02)) as server, asyncio.timeout(WAIT_S):
        shape = Workload(prompt_tokens=8, output_tokens=5)
        port = int(server.url.rpartition(":")[2])
        source = WorkloadSource("paced", shape, Change(seed=1))
        share = await Driver(job(port, source=source, conversations=3), lambda _: None).run(asyncio.Event())
    found = tally(merged([share]), Slo(), 1.0)
    assert all(ttft >= 0.04 for ttft in found.requests.ttft_s)
    assert all(row.end_s - row.intended_s >= 0.04 + 4 * 0.02 for row in share.rows)
    assert [len(merged([share]).gap_s)] == [12]


# The command line, end to end.


@contextmanager
def serving(server):
    """The server in a thread with a loop of its own; gives its port."""
    ready, done = threading.Event(), threading.Event()
    found = []

    async def serve():
        async with server:
            found.append(getattr(server, "port", 0) or int(server.url.rpartition(":")[2]))
            ready.set()
            while not done.is_set():  # noqa: ASYNC110 - set by another thread
                await asyncio.sleep(0.02)

    thread = threading.Thread(target=lambda: asyncio.run(serve()), daemon=True)
    thread.start()
    assert ready.wait(WAIT_S)
    try:
        yield found[0]
    finally:
        done.set()
        thread.join(WAIT_S)


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "loadtest", "run", *arguments]


def run(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(command(*arguments), capture_output=True, text=True, timeout=WAIT_S * 2, check=False)


def result(folder) -> Result:
    return msgspec.json.decode((folder / "result.json").read_bytes(), type=Result, strict=True)


def test_a_run_writes_its_result(tmp_path):
    with serving(InstantServer()) as port:
        done = run(
            "code-completion", "--url", f"http://127.0.0.1:{port}", "--out", str(tmp_path), "--rate", "100",
            "--seconds", "3", "--processes", "2", "--header", "authorization: Bearer hush",
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "sent" in done.stdout
    found = result(tmp_path)
    assert found.schema == 1
    assert found.name == "code-completion"
    assert found.summary.offered == found.summary.completed == len(found.requests.intended_s) > 200
    assert found.client.processes == 2
    assert found.requests.intended_s == sorted(found.requests.intended_s)
    assert sum(found.timeline.offered) == found.summary.offered
    assert sum(found.timeline.tokens) == found.summary.output_tokens
    columns = msgspec.structs.asdict(found.requests)
    assert {len(column) for column in columns.values() if isinstance(column, list)} == {found.summary.offered}
    assert found.requests.predicted_ttft_s is None  # this server gives no receipt
    assert found.target.engine == "unknown"
    assert found.settings["interrupted"] is False
    assert "hush" not in (tmp_path / "result.json").read_text()


def test_what_is_late_is_given_up(tmp_path):
    with serving(Misbehaving(then=misbehaving.hangs)) as port:
        done = run(
            "code-completion", "--url", f"http://127.0.0.1:{port}", "--out", str(tmp_path), "--rate", "20",
            "--seconds", "0.5", "--tail", "0.2",
        )  # fmt: skip
    assert done.returncode == 1, done.stderr  # nothing was completed
    found = result(tmp_path)
    assert set(found.requests.code) == {"interrupted"}
    assert None not in found.requests.last_sent_s
    assert found.settings["interrupted"] is False  # it ended as it was told


def test_a_trace_replays_its_own_arrivals(tmp_path):
    with serving(InstantServer()) as port:
        done = run(
            "azure-code", "--url", f"http://127.0.0.1:{port}", "--out", str(tmp_path), "--minutes", "1",
            "--time-scale", "30", "--length-scale", "0.1",
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = result(tmp_path)
    assert found.summary.completed == found.settings["source"]["requests"] > 20
    assert max(found.requests.intended_s) < 2.0


def test_nothing_completed_is_exit_1(tmp_path):
    with serving(Misbehaving(then=misbehaving.shed())) as port:
        done = run(
            "summarise", "--url", f"127.0.0.1:{port}", "--out", str(tmp_path), "--rate", "20", "--requests", "10"
        )
    assert done.returncode == 1, done.stderr
    found = result(tmp_path)
    assert found.summary.outcomes == {"shed": 10}
    assert found.summary.shed == {"queue_full": 10}
    assert found.summary.good_share == 0.0


@contextmanager
def long_run(port: int, folder):
    """A run of ten minutes with two drivers, and the drivers' processes."""
    process = subprocess.Popen(
        command(
            "code-completion", "--url", f"127.0.0.1:{port}", "--out", str(folder),
            "--rate", "20", "--seconds", "600", "--processes", "2",
        ),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        while "in flight" not in process.stdout.readline():  # it runs
            assert process.poll() is None
        drivers = psutil.Process(process.pid).children(recursive=True)
        assert len(drivers) == 2
        yield process, drivers
    finally:
        process.kill()
        process.communicate(timeout=WAIT_S)


def test_interrupted_runs_write_what_they_have(tmp_path):
    with (
        serving(InstantServer(Manner(first_s=0.01, token_s=0.5))) as port,
        long_run(port, tmp_path) as (process, _),
    ):
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does
        said, _ = process.communicate(timeout=WAIT_S)
    assert process.returncode == 130, said
    found = result(tmp_path)
    assert found.settings["interrupted"] is True
    assert found.summary.offered > 0
    assert "left" in found.summary.outcomes


def test_a_driver_that_dies_costs_its_own_requests_only(tmp_path):
    with serving(InstantServer()) as port, long_run(port, tmp_path) as (process, drivers):
        drivers[0].kill()
        drivers[0].wait(WAIT_S)
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=WAIT_S)
    assert process.returncode == 130
    assert "its requests are missing" in said
    found = result(tmp_path)
    assert len(found.settings["lost_drivers"]) == 1
    assert found.summary.completed > 0


def test_drivers_end_with_their_parent(tmp_path):
    with serving(InstantServer()) as port, long_run(port, tmp_path) as (process, drivers):
        process.kill()
        _, alive = psutil.wait_procs(drivers, timeout=WAIT_S)
        assert not alive


def test_an_unreachable_gateway_is_one_line(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    done = run("chat", "--url", f"http://127.0.0.1:{port}", "--out", str(tmp_path), "--rate", "1")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert f"http://127.0.0.1:{port} does not answer" in done.stderr
    assert not (tmp_path / "result.json").exists()


def test_a_server_of_another_kind_is_one_line(tmp_path):
    with serving(Misbehaving()) as port:
        done = run("chat", "--url", f"http://127.0.0.1:{port}/other", "--out", str(tmp_path), "--rate", "1")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "lists no model (HTTP 404)" in done.stderr


def test_a_cluster_is_recognised_and_its_texts_verified(tmp_path):
    """Engine, arrangement, levels and receipts of a real cluster with the sim engine; every text is the expected one."""
    home, out = tmp_path / "home", tmp_path / "out"
    with running_cluster(home, "--engine", "sim", "--sim-speed", "inf", "--arrangement", "split") as cluster:
        done = subprocess.run(
            command(
                "mooncake-conversation", "--url", cluster.url, "--out", str(out), "--minutes", "1",
                "--time-scale", "15", "--length-scale", "0.02", "--verify", "1",
            ),
            capture_output=True, text=True, timeout=WAIT_S * 2, check=False, env=environment(home),
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = result(out)
    assert found.target.engine == "sim"
    assert found.target.profile == "llama2-70b-h100"
    assert found.target.arrangement == "split"
    assert found.target.workers == {"prefill": 1, "decode": 1}
    assert found.summary.outcomes == {"ok": found.summary.offered}
    assert found.settings["verified"] == found.summary.offered > 100
    assert set(found.requests.path) <= {"split", "whole"}
    assert found.summary.cached_tokens > 0  # blocks that prompts of the trace share
    assert {"queue_depth", "kv_slots.free", "running.decode-0"} <= found.levels.series.keys()
    assert "queue" in found.requests.stages
