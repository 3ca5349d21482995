"""A bus that stands still is not a fleet that has died."""

import asyncio
import signal

import psutil

from services.gateway.fleet import PING_S, SUSPECT_S
from tests.support.fake_workers import Script
from tests.support.gateway_cluster import Cluster
from tests.support.nats import nats_server
from tests.support.running_gateway import MODEL
from tests.support.tiny_tokenizer import make_folder

HELLO = [{"role": "user", "content": "hello"}]
STOPPED_S = SUSPECT_S + PING_S + 1.0  # long enough for the detector to lose everybody


async def test_workers_outlive_a_bus_that_was_stopped(tmp_path):
    folder = tmp_path / "nats"
    folder.mkdir()
    with nats_server(folder) as url:
        server = psutil.Process().children()[-1]
        assert server.name() == "nats-server"
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
            assert len(running.gateway.streams) == 1  # the one that began before goes on
            await stream.close()
        for worker in cluster.workers.values():
            await worker.die()
