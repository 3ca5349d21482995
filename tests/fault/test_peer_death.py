"""Two nodes, and one's store dies under load: texts stay right, blocks go from node to node again, nothing leaks."""

import asyncio
import itertools
from collections.abc import Iterator

import psutil
import pytest

from shared.worker.sim.oracle import Oracle
from tests.integration.test_sim_cluster import BLOCK, DEMO, SLOT_BYTES, ask_all, assert_right, mismatched, questions
from tests.support.cluster import Cluster, running_cluster
from tests.support.disturbed import until, whole_again
from tests.support.exact import assert_idle

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with running_cluster(
        tmp_path_factory.mktemp("home"),
        "--engine=sim",
        "--sim-speed=4",
        "--nodes=2",
        "--prefill=2",
        "--arrangement=split",
        "--arena-gib=0.25",
        "--kv-gib=0.25",
        "--engine-arg=max_model_len=2048",
        BATON_PEER_S="1",
        BATON_HANDOFF_S="600",
    ) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def oracle() -> Oracle:
    return Oracle.load(str(DEMO), engine_args={"max_model_len": 2048})


async def test_every_block_goes_from_node_to_node_once(cluster: Cluster, oracle: Oracle) -> None:
    asked = questions(40, seed=11)
    await ask_all(cluster, asked)
    assert_right(asked, oracle)
    stores = cluster.metrics("kv")
    expected = sum(-(-len(one.prompt) // BLOCK) for one in asked) * SLOT_BYTES
    assert stores['baton_kv_moved_bytes_total{path="peer"}'] == expected
    assert cluster.metrics("decode")["baton_kv_recomputed_tokens_total"] == 0
    assert stores["baton_kv_peer_links"] == 2  # one, seen from both ends
    status = {service["id"]: service["node"] for service in cluster.status()["services"]}
    assert status["prefill-0"] == status["prefill-1"] == status["kv-0"] == "node-0"
    assert status["decode-0"] == status["kv-1"] == "node-1"
    assert_idle(cluster)


@pytest.mark.parametrize("store", ["kv-0", "kv-1"])
async def test_killed_under_load(cluster: Cluster, oracle: Oracle, store: str) -> None:
    asked = questions(60, seed=20 + int(store[-1]))
    answers = itertools.count(1)
    victim = psutil.Process(cluster.pid(store))

    def answered() -> None:
        if next(answers) == 10:
            victim.kill()

    await ask_all(cluster, asked, on_answer=answered)
    assert not victim.is_running() or victim.status() == psutil.STATUS_ZOMBIE
    assert_right(asked, oracle)
    assert mismatched(cluster) == 0
    await asyncio.to_thread(until, lambda: whole_again(cluster), f"{store} did not come back")
    await asyncio.to_thread(until, lambda: hands_over(cluster), "blocks do not go from node to node again")
    assert_idle(cluster)


serial = itertools.count(1000)


def hands_over(cluster: Cluster) -> bool:
    """A fresh prompt's blocks arrive at the other node."""
    before = cluster.metrics("kv").get('baton_kv_moved_bytes_total{path="peer"}', 0.0)
    asyncio.run(ask_all(cluster, questions(1, seed=next(serial))))
    return cluster.metrics("kv")['baton_kv_moved_bytes_total{path="peer"}'] > before
