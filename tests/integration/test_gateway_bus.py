"""A bus that stands still is not a fleet that has died."""

import asyncio
import signal
from urllib.parse import urlsplit

import psutil

from services.gateway.scheduling.fleet import PING_S, SUSPECT_S
from tests.support.fake_workers import Script
from tests.support.gateway_cluster import Cluster
from tests.support.nats import nats_server
from tests.support.running_gateway import MODEL
from tests.support.tiny_tokenizer import make_folder

HELLO = [{"role": "user", "content": "hello"}]
STOPPED_S = SUSPECT_S + PING_S + 1.0  # long enough for the detector to lose everybody


def running_server() -> psutil.Process:
    (server,) = [child for child in psutil.Process().children() if child.name() == "nats-server"]
    return server


async def test_a_reservation_lost_with_the_bus_is_made_again(tmp_path):
    """A server that goes takes questions and answers with it, and nobody says so: it must not cost the full wait."""
    with nats_server(tmp_path / "first") as url:
        cluster = Cluster(url, str(make_folder(tmp_path / MODEL)))
        cluster.settings = {"queue_s": 600.0}
        async with cluster.gateway() as running:
            _, decode = await cluster.add(running, "prefill-0", "decode-0")
            decode.script = Script(hang=True)
            asking = asyncio.create_task(
                running.client.chat.completions.with_raw_response.create(model=MODEL, messages=HELLO, max_tokens=2)
            )
            await decode.until(lambda w: w.jobs)
            running_server().kill()
            decode.script = Script()
            with nats_server(tmp_path / "second", urlsplit(url).port):
                answer = await asking
                assert answer.parse().choices[0].message.content == " 0 1"
                assert [job.attempt for job in decode.jobs] == [0, 1]
                for worker in cluster.workers.values():
                    await worker.die()


async def test_workers_outlive_a_bus_that_was_stopped(tmp_path):
    with nats_server(tmp_path / "nats") as url:
        server = running_server()
        cluster = Cluster(url, str(make_folder(tmp_path / MODEL)))
        cluster.settings = {"progress_s": 60.0}
        async with cluster.gateway() as running:
            _, decode = await cluster.add(running, "prefill-0", "decode-0")
            decode.script = Script(stall_after=1)
            stream = await running.client.chat.completions.create(
                model=MODEL, messages=HELLO, max_tokens=9, stream=True
            )
            await anext(stream)
            server.send_signal(signal.SIGSTOP)
            await asyncio.sleep(STOPPED_S)  # the length of the stop is what is tested
            server.send_signal(signal.SIGCONT)
            decode.script = Script()
            answer = await running.client.chat.completions.create(model=MODEL, messages=HELLO, max_tokens=3)
            assert answer.choices[0].message.content == " 0 1 2"
            assert len(running.deps.streams) == 1  # the one that began before goes on
            await stream.close()
        for worker in cluster.workers.values():
            await worker.die()
