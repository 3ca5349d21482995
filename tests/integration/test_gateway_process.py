"""`python -m services.gateway`: how it starts, refuses to start, and ends."""

import asyncio
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from tests.support.fake_workers import FakeWorker, Handoffs, Script
from tests.support.tiny_tokenizer import make_folder

ROOT = Path(__file__).parents[2]
START_S = 30.0


@pytest.fixture
def environ(tmp_path, nats_url):
    own = {key: value for key, value in os.environ.items() if not key.startswith(("BATON_", "OTEL_"))}
    return own | {
        "BATON_ID": "gateway-0",
        "BATON_CLUSTER": "process",
        "BATON_NATS_URL": nats_url,
        "BATON_MODEL": str(make_folder(tmp_path / "tiny")),
        "BATON_PORT": "0",
    }


def command() -> list[str]:
    return [sys.executable, "-m", "services.gateway"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"BATON_HOST": "0.0.0.0"}, "not loopback"),
        ({"BATON_MODEL": "/nowhere"}, "there is no folder /nowhere"),
        ({"BATON_MODLE": "x"}, "modle"),
        ({"BATON_PORT": "many"}, "'port'"),
        ({"BATON_KEYS": "/nowhere", "BATON_HOST": "0.0.0.0"}, "setting 'keys': /nowhere: No such file"),
    ],
)
def test_bad_settings_are_one_line_and_exit_2(environ, change, words):
    done = subprocess.run(
        command(), env=environ | change, cwd=ROOT, capture_output=True, text=True, timeout=START_S, check=False
    )
    assert done.returncode == 2
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("gateway: ")
    assert words in last
    assert "Traceback" not in done.stderr


def test_a_taken_port(environ):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        done = subprocess.run(
            command(),
            env=environ | {"BATON_PORT": port},
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=START_S,
            check=False,
        )
    assert done.returncode == 2
    assert f"cannot listen on 127.0.0.1:{port}" in done.stderr.strip().splitlines()[-1]


class Process:
    """A running gateway and what it has logged."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self.log = ""

    async def until(self, words: str) -> str:
        """The line that has these words."""
        assert self.process.stderr is not None
        async with asyncio.timeout(START_S):
            while line := (await self.process.stderr.readline()).decode():
                self.log += line
                if words in line:
                    return line
        raise AssertionError(f"ended without {words!r}:\n{self.log}")


async def start(environ) -> tuple[Process, str]:
    process = Process(
        await asyncio.create_subprocess_exec(*command(), env=environ, cwd=ROOT, stderr=asyncio.subprocess.PIPE)
    )
    line = await process.until("listening on")
    return process, line.split("listening on ")[1].split(",")[0]


async def test_sigterm_drains_and_exits_0(environ, nats_url):
    process, url = await start(environ | {"BATON_DRAIN_S": "0.5", "BATON_ARRANGEMENT": "unsplit"})
    worker = await FakeWorker(nats_url, Handoffs(), worker="decode-0", role="decode", cluster="process").start()
    worker.script = Script(stall_after=1)
    body = {"model": "tiny", "prompt": "hi", "max_tokens": 9, "stream": True}
    try:
        async with httpx.AsyncClient(base_url=url, timeout=START_S) as client:
            async with asyncio.timeout(START_S):
                while (await client.get("/ready")).status_code != 200:  # noqa: ASYNC110, RUF100 - readiness is polled
                    await asyncio.sleep(0.02)
            async with client.stream("POST", "/v1/completions", json=body) as response:
                lines = response.aiter_lines()
                assert (await anext(lines)).startswith("data: ")
                process.process.send_signal(signal.SIGTERM)
                rest = [line async for line in lines if line]
        assert len(rest) == 1
        assert '"code":"draining"' in rest[0]
        await worker.until(lambda w: w.cancels)
        async with asyncio.timeout(START_S):
            assert await process.process.wait() == 0
    finally:
        await worker.die()
        if process.process.returncode is None:
            process.process.kill()
            await process.process.wait()


async def test_a_log_that_nobody_reads_stops_nobody(environ):
    """A pipe takes 64 KiB; each request is a line."""
    requests, lines = 1000, 0
    pipe, end = os.pipe()
    process = await asyncio.create_subprocess_exec(*command(), env=environ, cwd=ROOT, stderr=end)
    os.close(end)
    reader = os.fdopen(pipe, "rb", buffering=0)
    try:
        seen = b""
        while b"listening on " not in seen:
            seen += await asyncio.to_thread(reader.read, 65536)
        url = seen.decode().split("listening on ")[1].split(",")[0]
        async with httpx.AsyncClient(base_url=url, timeout=START_S) as client:
            for _ in range(requests):
                answer = await client.post("/v1/completions", json={"model": "other", "prompt": "x"})
                assert answer.status_code == 404
        process.send_signal(signal.SIGTERM)
        while data := await asyncio.to_thread(reader.read, 65536):
            lines += data.count(b"outcome=client_error")
        async with asyncio.timeout(START_S):
            assert await process.wait() == 0
        assert lines == requests  # once somebody reads, nothing was lost
    finally:
        reader.close()
        if process.returncode is None:
            process.kill()
            await process.wait()


async def test_small_writes_leave_at_once(environ):
    """Without TCP_NODELAY a first token waits 44 ms: uvloop sets it, and this would notice if that changed."""
    import uvloop

    def check() -> int:
        async def nodelay() -> int:
            found: asyncio.Future[int] = asyncio.get_running_loop().create_future()

            def on_client(_, writer) -> None:
                raw = writer.get_extra_info("socket")
                found.set_result(raw.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
                writer.close()

            server = await asyncio.start_server(on_client, "127.0.0.1", 0)
            _, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
            value = await found
            writer.close()
            server.close()
            return value

        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(nodelay())

    assert await asyncio.to_thread(check)
