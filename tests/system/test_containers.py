"""The shipped images and docker-compose.yml in a real container engine, with the sim engine: built, served, scaled, broken.

Every text that comes out is compared with the oracle's. Base images that cannot be pulled are made by base_images.sh.
"""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Iterator

import httpx
import pytest
import yaml

from shared.worker.sim.oracle import Oracle
from tests.support.cluster import PATIENT, free_port
from tests.support.containers import PROJECT, REPOSITORY, Compose, container_engine, package_index, until
from tests.support.offered import Offered, offered

pytestmark = pytest.mark.timeout(900)

BACK_S = 120
AWAY_S = 3.0
SMALL_IMAGE_BYTES = 400_000_000
CRASH = ("sh", "-c", "kill -9 -1")  # everything but the container's init, which then ends, too
STORE = "kv-transfer"
ROLES = {"gateway": "gateway", "prefill-worker": "prefill", "decode-worker": "decode", STORE: "kv"}
# Whoever holds every request, or carries every message: while it is away, requests may fail, clearly.
HOLDERS = ("gateway", "nats")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Compose]:
    """Two workers of each kind, every request split."""
    folder = tmp_path_factory.mktemp("engine")
    with container_engine(folder) as engine:
        compose = Compose(
            {**engine, **package_index(folder)},
            free_port(),
            BATON_ENGINE="sim",
            BATON_ARENA_GIB="0.25",
            BATON_ARRANGEMENT="split",
            BATON_TARGETS=PATIENT,
            COMPOSE_PROFILES="",
        )
        compose.make_base_images()
        compose("build")
        try:
            compose("up", "--detach", "--wait", "--scale=prefill-worker=2", "--scale=decode-worker=2")
            yield compose
        finally:
            compose("down", "--volumes", "--timeout=10", check=False)


@pytest.fixture(scope="module")
def oracle(tmp_path_factory: pytest.TempPathFactory) -> Oracle:
    served = tmp_path_factory.mktemp("models") / "served"  # as docker-compose.yml mounts it
    served.symlink_to(REPOSITORY / "models" / "demo")
    return Oracle.load(str(served))


@contextlib.asynccontextmanager
async def load(cluster: Compose, oracle: Oracle, clients: int = 4) -> AsyncIterator[Offered]:
    """Afterwards no text was wrong, and nothing is held any more."""
    async with cluster.client() as client, offered(client, oracle, clients) as seen:
        yield seen
    assert not seen.wrong, seen.wrong[:3]
    assert seen.right, "nothing was served"


def assert_nothing_held(cluster: Compose) -> None:
    def held() -> dict[str, float]:
        samples = cluster.metrics(STORE)
        names = [
            "baton_kv_leases",
            *(f'baton_kv_slots{{state="{state}"}}' for state in ("reserved", "pinned", "revoked")),
        ]
        return {name: samples[name] for name in names if samples[name]}

    until(lambda: not held(), "no lease and no slot is held", BACK_S)


def test_images_are_small_and_hold_no_compiler_and_no_torch(cluster: Compose) -> None:
    for image in ("baton/gateway", "baton/kv-transfer"):
        facts = json.loads(cluster.docker("image", "inspect", image).stdout)[0]
        assert facts["Size"] < SMALL_IMAGE_BYTES
        assert facts["Config"]["User"] == "10001:10001"
        assert facts["Config"]["Healthcheck"]
    found = cluster.inside(
        "gateway", "sh", "-c", "command -v gcc cc g++ clang ld; ls /opt/venv/lib/python3.11/site-packages", check=False
    )
    assert "nats" in found.split()
    assert not {"torch", "vllm", "transformers", "pip"} & set(found.split())
    assert "/bin/" not in found


def test_containers_may_do_little(cluster: Compose) -> None:
    for service in ("gateway", "prefill-worker", "decode-worker", STORE, "nats", "redis"):
        touched = cluster.inside(
            service, "sh", "-c", "touch /touched 2>&1; id -u; grep CapEff /proc/self/status", check=False
        )
        assert "Read-only file system" in touched
        assert "10001" in touched.split()
        assert touched.split()[-1] == "0" * 16
    networks = cluster("config", "--format=json").stdout
    assert json.loads(networks)["networks"]["bus"]["internal"] is True
    (port,) = json.loads(networks)["services"]["gateway"]["ports"]
    assert port["host_ip"] == "127.0.0.1"


def test_every_role_has_its_own_password_and_no_other(cluster: Compose) -> None:
    files = {service: cluster.inside(service, "cat", "/run/secrets/baton/baton.yaml") for service in ROLES}
    passwords = {yaml.safe_load(text)["nats_password"] for text in files.values()}
    assert len(passwords) == len(ROLES)
    for service, role in ROLES.items():
        assert yaml.safe_load(files[service])["nats_user"] == role
        assert cluster.inside(service, "ls", "/run/secrets/baton").split() == ["baton.yaml"]
    assert "redis_url" not in files["prefill-worker"]


async def test_requests_are_split_and_right(cluster: Compose, oracle: Oracle) -> None:
    before = cluster.metrics(STORE)['baton_kv_moved_bytes_total{path="local"}']
    async with load(cluster, oracle) as seen:
        await seen.see(20)
        await seen.see_workers([*cluster.ids("prefill-worker"), *cluster.ids("decode-worker")])
    assert not seen.failed
    assert cluster.metrics(STORE)['baton_kv_moved_bytes_total{path="local"}'] > before
    assert_nothing_held(cluster)


def test_prometheus_has_the_metrics_of_every_service_and_the_rules(cluster: Compose) -> None:
    url = f"http://127.0.0.1:{cluster.prometheus_port}/api/v1"

    def services() -> set[str]:
        with contextlib.suppress(httpx.HTTPError):  # it has not begun to answer yet
            answer = httpx.get(f"{url}/query", params={"query": "group by (service) (baton_tasks)"}).raise_for_status()
            return {one["metric"]["service"] for one in answer.json()["data"]["result"]}
        return set()

    cluster("--profile=observability", "up", "--detach", "--no-recreate", "--no-build", "prometheus")
    try:
        until(lambda: services() == {"gateway", "prefill", "decode", "kv"}, "a page with every service", BACK_S)
        assert httpx.get(f"{url}/rules").json()["data"]["groups"]
    finally:
        cluster("--profile=observability", "rm", "--stop", "--force", "prometheus")


async def test_each_tier_scales_under_load_and_prefill_to_none_without_a_failed_request(
    cluster: Compose, oracle: Oracle
) -> None:
    async with load(cluster, oracle) as seen:
        for counts in ({"prefill": 3, "decode": 2}, {"prefill": 3, "decode": 3}):
            await cluster.scale(**counts)
            for role, count in counts.items():
                workers = cluster.ids(f"{role}-worker")
                assert len(workers) == count
                await seen.see_workers(workers)
        for counts in ({"prefill": 1, "decode": 3}, {"prefill": 2, "decode": 2}):
            await cluster.scale(**counts)
            await seen.see(10)
        # None: decode workers compute the prompts meanwhile.
        await cluster.scale(prefill=0, decode=2)
        await seen.see(10)
        await cluster.scale(prefill=2, decode=2)
        await seen.see_workers(cluster.ids("prefill-worker"))
    assert not seen.failed
    assert_nothing_held(cluster)


@pytest.mark.parametrize(
    ("service", "variable", "says"),
    [
        ("gateway", "BATON_NO_SUCH=1", "unknown setting 'no_such'"),
        ("gateway", "BATON_PORT=high", "setting 'port'"),
        (STORE, "BATON_CONFIG=/run/secrets/baton/none.yaml", "BATON_CONFIG: cannot read /run/secrets/baton/none.yaml"),
        (STORE, "BATON_NATS_PASSWORD=wrong", "setting 'nats_user'"),
        ("prefill-worker", "BATON_MODEL=/models/none", "setting 'model'"),
        # Of another KV format than the tier beside it: its blocks would be noise there.
        ("decode-worker", 'BATON_ENGINE_ARGS={"kv_bytes_per_token": 1024}', "fingerprint"),
    ],
)
def test_a_bad_setting_ends_its_process_with_one_line(cluster: Compose, service: str, variable: str, says: str) -> None:
    done = cluster("run", "--rm", "--no-deps", "-T", "--env", variable, service, check=False)
    assert done.returncode in (1, 2)
    last = done.stderr.splitlines()[-1]
    assert says in last
    assert "Traceback" not in done.stderr
    assert cluster.everybody_is_healthy()


@contextlib.contextmanager
def broken(cluster: Compose, service: str, container: str, fault: str) -> Iterator[None]:
    """Within, it is; a container that crashed comes back by itself."""
    network = f"{PROJECT}_bus"
    if fault == "pause":
        cluster.docker("pause", container)
    elif fault == "cut":
        cluster.docker("network", "disconnect", network, container)
    else:
        before = cluster.restarts(container)
        cluster.docker("exec", container, *CRASH, check=False)
        until(lambda: cluster.restarts(container) > before, f"{service} is started again", BACK_S)
    try:
        yield
    finally:
        if fault == "pause":
            cluster.docker("unpause", container)
        elif fault == "cut":
            cluster.docker("network", "connect", "--alias", service, network, container)


@pytest.mark.parametrize("fault", ["pause", "crash", "cut"])
@pytest.mark.parametrize("service", ["prefill-worker", "decode-worker", STORE, "redis", "nats", "gateway"])
async def test_a_container_fails(cluster: Compose, oracle: Oracle, service: str, fault: str) -> None:
    (container, *_) = cluster.ids(service)
    async with load(cluster, oracle) as seen:
        await seen.see(3)
        with broken(cluster, service, container, fault):
            if service in HOLDERS:
                await asyncio.sleep(AWAY_S)  # nothing to see while nothing is served
            else:
                await seen.see(8)  # requests go on meanwhile
        await asyncio.to_thread(until, lambda: cluster.health(container) == "healthy", f"{service} is back", BACK_S)
        await seen.see(8)
    assert service in HOLDERS or not seen.failed, seen.failed[:5]
    assert_nothing_held(cluster)
