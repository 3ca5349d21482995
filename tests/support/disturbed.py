"""Looking at a cluster that something happens to: its processes, and when it is whole again."""

import time
from collections.abc import Callable

import psutil

from tests.support.cluster import Cluster

RESTART_S = 120


def until(reached: Callable[[], bool], what: str, timeout_s: float = RESTART_S) -> None:
    """Look until it is so: there is no event to wait for across processes."""
    deadline = time.monotonic() + timeout_s
    while not reached():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)


def whole_again(cluster: Cluster) -> bool:
    return all(service["state"] == "ready" for service in cluster.status()["services"])


def engine_core(cluster: Cluster, worker: str) -> psutil.Process:
    """The process in which a worker's engine computes."""
    (found,) = [
        child
        for child in psutil.Process(cluster.pid(worker)).children(recursive=True)
        if "EngineCore" in child.name() or "EngineCore" in " ".join(child.cmdline())
    ]
    return found


def metrics_page(cluster: Cluster, service_id: str) -> str:
    return str(cluster.service(service_id)["metrics_url"])


def holds(cluster: Cluster) -> dict[str, float]:
    """What is still held for requests, anywhere; empty when nothing is."""
    kv, gateway = cluster.metrics("kv"), cluster.metrics("gateway")
    held = {name: kv[f'baton_kv_slots{{state="{name}"}}'] for name in ("reserved", "pinned", "revoked")}
    held["leases"] = kv["baton_kv_leases"]
    held["requests"] = sum(value for name, value in gateway.items() if name.startswith("baton_active_requests"))
    for role in ("prefill", "decode"):
        held[f"{role} jobs"] = cluster.metrics(role)["baton_worker_jobs"]
    return {name: value for name, value in held.items() if value}
