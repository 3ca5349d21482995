"""Two tenants with the same prompt share nothing: not a slot, not a page of an engine, not a millisecond of work."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from shared.access import key_file
from shared.access.key import Key, digest, new_secret
from tests.support.cluster import Cluster, running_cluster
from tests.support.disturbed import until
from tests.support.exact import BLOCK, KEPT_S

pytestmark = pytest.mark.timeout(200)

PROMPT = [8 + number % 1000 for number in range(10 * BLOCK + 5)]
BLOCKS = 11
CACHED = 'baton_kv_slots{state="cached"}'
COMPUTED = 'baton_prefix_tokens_total{source="computed"}'
FROM_ENGINE = 'baton_prefix_tokens_total{source="engine"}'


@dataclass
class Asked:
    cached: int  # as the client is told
    slots: float  # more in the store
    engine: float  # prompt tokens out of engines' own caches
    prefilled: float  # prompt tokens that prefill did not find in the store


class Tenants:
    def __init__(self, cluster: Cluster, secrets: dict[str, str]) -> None:
        self._client = cluster.client()
        self._secrets = secrets
        self._held = cluster.meter("kv", "baton_kv_leases")
        self._cached = cluster.meter("kv", CACHED)
        self._engines = [cluster.meter(role, FROM_ENGINE) for role in ("prefill", "decode")]
        self._computed = cluster.meter("prefill", COMPUTED)

    def ask(self, tenant: str, tokens: list[int]) -> Asked:
        before = self._look()
        answer = self._client.with_options(api_key=self._secrets[tenant]).completions.create(
            model="baton-demo", prompt=tokens, max_tokens=2, temperature=0
        )
        assert answer.usage is not None
        assert answer.usage.prompt_tokens_details is not None
        until(lambda: not self._held(), "nothing is held", KEPT_S)
        slots, engine, computed = (now - then for now, then in zip(self._look(), before, strict=True))
        return Asked(answer.usage.prompt_tokens_details.cached_tokens or 0, slots, engine, computed)

    def _look(self) -> tuple[float, float, float]:
        return self._cached(), sum(read() for read in self._engines), self._computed()


@pytest.fixture(scope="module")
def tenants(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tenants]:
    path, secrets = tmp_path_factory.mktemp("keys") / "keys.yaml", {}
    made = []
    for tenant in ("one", "other"):
        secrets[tenant] = new_secret()
        made.append(Key(id=tenant, tenant=tenant, hash=digest(secrets[tenant])))
    _write(path, made)
    with running_cluster(
        tmp_path_factory.mktemp("home"),
        "--engine=sim",
        "--sim-speed=inf",
        "--arrangement=split",
        f"--keys={path}",
        f"--engine-arg=block_size={BLOCK}",
        "--arena-gib=0.25",
    ) as cluster:
        yield Tenants(cluster, secrets)


def _write(path: Path, keys: list[Key]) -> None:
    key_file.change(path, lambda _: keys)


def test_the_same_prompt_of_another_tenant_is_another_prompt(tenants: Tenants) -> None:
    first = tenants.ask("one", PROMPT)
    second = tenants.ask("other", PROMPT)
    assert first == second == Asked(cached=0, slots=BLOCKS, engine=0, prefilled=len(PROMPT))


def test_the_same_tenant_finds_it(tenants: Tenants) -> None:
    longer = PROMPT[: 10 * BLOCK] + [7] * BLOCK
    for tenant in ("one", "other"):
        known = 10 * BLOCK
        # In the store, and in the pages of decode's engine; then also in those of prefill's.
        assert tenants.ask(tenant, PROMPT) == Asked(cached=len(PROMPT) - 1, slots=0, engine=known, prefilled=0)
        assert tenants.ask(tenant, longer) == Asked(cached=known, slots=1, engine=2 * known, prefilled=BLOCK)
