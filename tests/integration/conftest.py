"""What the tests with fake workers share: one NATS and one tokenizer a module, a gateway's surroundings a test."""

import pytest

from tests.support.gateway_cluster import Cluster
from tests.support.nats import nats_server
from tests.support.redis import RedisServer
from tests.support.running_gateway import MODEL
from tests.support.tiny_tokenizer import make_folder


@pytest.fixture(scope="module")
def nats_url(tmp_path_factory):
    with nats_server(tmp_path_factory.mktemp("nats")) as url:
        yield url


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("models") / MODEL)


@pytest.fixture
def redis_server(tmp_path):
    server = RedisServer(tmp_path)
    server.start()
    yield server
    server.stop()


@pytest.fixture
async def cluster(nats_url, tiny_model):
    """Workers are added by the test; they end with it."""
    cluster = Cluster(nats_url, str(tiny_model))
    yield cluster
    for worker in cluster.workers.values():
        await worker.die()
