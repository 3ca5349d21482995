"""The micro-benchmarks from end to end, as short as they go: every figure is there, and nothing is left behind."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import psutil
import pytest

from loadtest.instant import InstantServer
from loadtest.machine import ROOT
from loadtest.micro.closed_loop import Course, Seen, drive

LIMIT_S = 240


def run(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "loadtest", *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )


def test_the_kv_plane_is_measured(tmp_path):
    out = tmp_path / "kv.json"
    done = run("kv", "--rounds", "1", "--sizes-mib", "1", "--slots-kib", "64", "--arena-gib", "0.25", "--out", str(out))
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(out.read_text())
    assert found["schema"] == 1
    assert found["machine"]["cores"] >= 1
    (point,) = found["handoff"]
    assert point["stages"]["total"]["p50_ms"] > point["stages"]["copy_in"]["p50_ms"] > 0
    assert point["of_two_memcpys"]["median"] > 0
    assert found["protocol"].keys() == {"reserve", "commit", "wait", "release"}
    assert [row["at once"] for row in found["concurrency"]] == [1, 4, 8]
    assert found["store"]["put"]["median"] > 0
    assert "Hand-off" in done.stdout


def test_the_token_path_is_measured(tmp_path):
    out = tmp_path / "gateway.json"
    words = ("--rounds", "1", "--seconds", "0.5", "--concurrency", "2", "--streams", "3", "--output-tokens", "8")
    done = run("gateway", *words, "--out", str(out))
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(out.read_text())
    assert found["schema"] == 1
    assert found["errors"] == {}
    assert [(row["api"], row["concurrency"]) for row in found["free"]] == [("chat", 2), ("completions", 2)]
    for row in (*found["free"], *found["limits"], *found["paced"]):
        assert row["tokens_per_s"]["median"] > 0
    assert {row["server"] for row in found["paced"]} == {"gateway", "instant"}
    assert "us/token" in done.stdout


def test_a_model_without_a_tokenizer_is_one_line(tmp_path):
    done = run("gateway", "--model", str(tmp_path))
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "--model" in done.stderr


@pytest.mark.parametrize(("command", "number"), [("kv", signal.SIGINT), ("gateway", signal.SIGTERM)])
def test_an_interrupted_measurement_leaves_nothing(command, number):
    with tempfile.TemporaryDirectory(prefix="t") as folder:  # a short name: sockets lie in it
        interrupt(command, number, folder)
        assert not list(Path(folder).iterdir())


def interrupt(command: str, number: signal.Signals, folder: str) -> None:
    """In the middle of its first round; all its processes must be gone then."""
    started = subprocess.Popen(
        [sys.executable, "-m", "loadtest", command, "--rounds", "100"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "TMPDIR": folder},
    )
    watchdog = threading.Timer(LIMIT_S, started.kill)
    watchdog.start()
    try:
        for line in started.stdout:
            if "round 1" in line:
                break
        children = psutil.Process(started.pid).children(recursive=True)
        started.send_signal(number)
        rest = started.stdout.read()
        assert started.wait() == 130, rest
    finally:
        watchdog.cancel()
    assert children
    assert not [child for child in children if child.is_running() and child.status() != psutil.STATUS_ZOMBIE]


def request(tokens: int) -> bytes:
    body = json.dumps({"max_tokens": tokens}).encode()
    return b"POST /v1/completions HTTP/1.1\r\ncontent-length: %d\r\n\r\n%s" % (len(body), body)


async def driven(port: int, *, tokens: int, asked: int, seconds: float = 0.3) -> Seen:
    course = Course(
        address=("127.0.0.1", port),
        requests=[request(asked)],
        tokens=tokens,
        concurrency=3,
        warm_s=0.05,
        measured_s=seconds,
        processes={"driver": psutil.Process()},
    )
    return await asyncio.to_thread(drive, course)


async def test_every_token_is_counted_and_nothing_else():
    async with InstantServer() as server:
        seen = await driven(int(server.url.rpartition(":")[2]), tokens=5, asked=5)
    assert seen.answers > 0
    assert seen.tokens > 0
    assert not seen.errors


async def test_answers_of_another_length_are_errors():
    async with InstantServer() as server:
        seen = await driven(int(server.url.rpartition(":")[2]), tokens=6, asked=5)
    assert seen.answers == 0
    assert set(seen.errors) == {"5 tokens instead of 6"}


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (b"HTTP/1.1 503 Service Unavailable\r\ncontent-length: 0\r\n\r\n", "status 503"),
        (b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n", "closed after status 200"),
        (b"", "closed after status -"),
    ],
)
async def test_a_server_that_fails_is_counted(answer, error):
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(4096)
        writer.write(answer)
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        seen = await driven(server.sockets[0].getsockname()[1], tokens=5, asked=5)
    assert seen.answers == 0
    assert seen.errors[error] > 0


async def test_nobody_listening_is_an_error():
    with pytest.raises(OSError):
        await driven(1, tokens=1, asked=1)
