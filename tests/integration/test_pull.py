"""Two nodes: a prefill worker gets what the other node holds instead of computing it, and is never the wrong for it."""

import random
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from shared.worker.sim.oracle import Oracle
from tests.support.cluster import Cluster, read_metrics, running_cluster
from tests.support.disturbed import until, whole_again
from tests.support.exact import BLOCK, KEPT_S, assert_idle

pytestmark = pytest.mark.timeout(300)

DEMO = Path(__file__).parents[2] / "models" / "demo"
OUTPUT = 3 * BLOCK
# A profile where every token costs: a hit that saves nothing is not asked for.
ENGINE = {"profile": "cpu-demo", "max_model_len": 4096, "block_size": BLOCK}
PEER, COMPUTED = (f'baton_prefix_tokens_total{{source="{source}"}}' for source in ("peer", "computed"))


class Two:
    """Prefill on one node, decode on the other; steps take as long as a large model's."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self.oracle = Oracle.load(str(DEMO), engine_args=ENGINE)
        self._client = cluster.client()
        self._stores = [service["metrics_url"] for service in cluster.services("kv")]
        (self._prefill,) = [service["metrics_url"] for service in cluster.services("prefill")]

    def say(self, tokens: list[int]) -> tuple[list[int], int]:
        """The tokens of the answer, which is the right one, and what was cached of the prompt."""
        new = (len(tokens) + OUTPUT - 1) // BLOCK - len(tokens) // BLOCK
        kept = self._kept() + new
        answer = self._client.completions.create(
            model="baton-demo",
            prompt=tokens,
            max_tokens=OUTPUT,
            temperature=0,
            extra_body={"return_token_ids": True},
        )
        assert answer.choices[0].text == self.oracle.expected_text(tokens, OUTPUT)
        assert answer.usage is not None
        assert answer.usage.prompt_tokens_details is not None
        until(lambda: self._kept() >= kept and self._is_told(), "what was said is kept, and the index knows", KEPT_S)
        said = (answer.choices[0].model_extra or {})["token_ids"]
        return list(said), answer.usage.prompt_tokens_details.cached_tokens or 0

    def prefill(self, name: str) -> float:
        return read_metrics(self._prefill).get(name, 0.0)

    def _kept(self) -> float:
        return sum(read_metrics(url)["baton_kv_kept_blocks_total"] for url in self._stores)

    def _is_told(self) -> bool:
        pages = [read_metrics(url) for url in self._stores]
        return all(page["baton_kv_leases"] == 0 == page["baton_kv_index_backlog"] for page in pages)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Two]:
    with running_cluster(
        tmp_path_factory.mktemp("home"),
        "--nodes=2",
        "--engine=sim",
        *(f"--engine-arg={name}={value}" for name, value in ENGINE.items()),
        "--sim-speed=4",
        "--arrangement=split",
        "--arena-gib=0.1",
        "--engine-arg=enable_prefix_caching=false",  # what is found is the stores'
        BATON_PULL="always",  # whichever is faster on this machine
        BATON_INDEX_S="5",
    ) as cluster:
        two = Two(cluster)
        for length in (200, 400, 600, 800):  # the index is asked only once it is known what a prompt costs
            two.say(prompt_of(length, seed=100))
        yield two


def prompt_of(length: int, seed: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(8, 1500) for _ in range(length)]


def test_three_turns_over_two_nodes(two: Two) -> None:
    """What was generated is on decode's node: prefill's gets it from there, and computes only what is new."""
    tokens, held = prompt_of(400, seed=1), 0
    for turn in range(3):
        peer, computed = two.prefill(PEER), two.prefill(COMPUTED)
        prompt = len(tokens)
        said, cached = two.say(tokens)
        assert cached == held * BLOCK, f"turn {turn}"
        assert two.prefill(COMPUTED) - computed == prompt - held * BLOCK
        if turn:
            assert two.prefill(PEER) - peer >= OUTPUT - BLOCK
        tokens += said
        held = (len(tokens) - 1) // BLOCK
        tokens += prompt_of(70, seed=10 + turn)
    assert_idle(two.cluster)


def test_a_node_that_has_lost_everything_gets_it_back(two: Two) -> None:
    """Prefill's store has died; of 2,000 shared tokens nothing is computed again."""
    shared = prompt_of(2000 // BLOCK * BLOCK, seed=2)
    two.say(shared + prompt_of(40, seed=3))
    node = two.cluster.services("prefill")[0]["node"]
    (store,) = [service["pid"] for service in two.cluster.services("kv") if service["node"] == node]
    psutil.Process(store).kill()
    until(lambda: store not in {service["pid"] for service in two.cluster.services("kv")}, "it is started again")
    until(lambda: whole_again(two.cluster), "the worker is attached again")
    fresh = Two(two.cluster)
    fresh.say(prompt_of(300, seed=4))  # the stores have found each other
    peer = fresh.prefill(PEER)
    _, cached = fresh.say(shared + prompt_of(40, seed=5))
    assert cached == len(shared)
    assert fresh.prefill(PEER) - peer >= len(shared) - BLOCK
