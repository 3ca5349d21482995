"""The usual stack around a live cluster: Prometheus scrapes it, promtool accepts rules and pages, OTLP gets whole traces.

Needs prometheus and promtool (Debian: prometheus). One sim cluster for all.
"""

import json
import re
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from loadtest.cluster.otlp import Receiver
from tests.support.cluster import Cluster, free_port, read_metrics, running_cluster

pytestmark = pytest.mark.timeout(300)

OBSERVABILITY = Path(__file__).parents[2] / "k8s" / "observability"
PROMETHEUS = OBSERVABILITY / "prometheus"
DASHBOARDS = sorted((OBSERVABILITY / "grafana").glob("*.json"))
NAME = re.compile(r"\b((?:baton|process|gen_ai|vllm)_[a-z0-9_]+)\b")
RANGE = "10s"  # for Grafana's $__rate_interval
WAIT_S = 60.0
SPLIT = {"gateway.request", "gateway.admission", "gateway.queue", "decode.job", "prefill.job", "kv.push", "kv.load"}


@pytest.fixture(scope="module")
def otlp() -> Iterator[Receiver]:
    with Receiver() as receiver:
        yield receiver


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory, otlp: Receiver) -> Iterator[Cluster]:
    options = ("--engine=sim", "--sim-speed=inf", "--arrangement=split", "--arena-gib=0.1", "--kv-gib=0.1")
    env = {"OTEL_EXPORTER_OTLP_ENDPOINT": otlp.url, "OTEL_BSP_SCHEDULE_DELAY": "200"}
    with running_cluster(tmp_path_factory.mktemp("home"), *options, "--gateways=2", **env) as cluster:
        for number in range(20):
            ask(cluster, f"warm-{number}")
        yield cluster


def ask(cluster: Cluster, request: str, **headers: str) -> httpx.Response:
    body = {"model": "baton-demo", "prompt": f"{request}: " + "some words " * 60, "max_tokens": 8, "ignore_eos": True}
    url = f"{cluster.url}/v1/completions"
    return httpx.post(url, json=body, headers={"x-request-id": request, **headers}, timeout=60).raise_for_status()


def until(reached: Callable[[], Any], what: str) -> Any:
    deadline = time.monotonic() + WAIT_S
    while not (found := reached()):
        assert time.monotonic() < deadline, what
        time.sleep(0.2)  # another program can only be asked again
    return found


def promtool(*args: str, **more: Any) -> None:
    done = subprocess.run(["promtool", *args], capture_output=True, text=True, check=False, timeout=60, **more)
    assert done.returncode == 0, done.stdout + done.stderr


# ---- what is in the repository -------------------------------------------------------------------------------


def test_promtool_accepts_the_rules_and_they_fire_when_they_should():
    promtool("check", "rules", str(PROMETHEUS / "rules.yaml"))
    promtool("test", "rules", "alerts_test.yaml", cwd=PROMETHEUS)


def test_every_alert_is_tested():
    rules = yaml.safe_load((PROMETHEUS / "rules.yaml").read_text())
    alerts = {rule["alert"] for group in rules["groups"] for rule in group["rules"] if "alert" in rule}
    tests = yaml.safe_load((PROMETHEUS / "alerts_test.yaml").read_text())["tests"]
    assert alerts == {one["alertname"] for test in tests for one in test.get("alert_rule_test", [])}


def test_promtool_accepts_the_scrape_settings(tmp_path):
    """Debian's Prometheus is built without Kubernetes: its discovery is replaced, the rest is checked as it is."""
    settings = yaml.safe_load((PROMETHEUS / "scrape.yaml").read_text())
    for job in settings["scrape_configs"]:
        assert job.pop("kubernetes_sd_configs")
        job["static_configs"] = [{"targets": ["127.0.0.1:1"]}]
    settings["rule_files"] = [str(PROMETHEUS / name) for name in settings["rule_files"]]
    (tmp_path / "scrape.yaml").write_text(yaml.safe_dump(settings))
    promtool("check", "config", str(tmp_path / "scrape.yaml"))


# ---- a live cluster ------------------------------------------------------------------------------------------


def page(cluster: Cluster) -> str:
    return httpx.get(f"{cluster.url}/metrics", timeout=10).raise_for_status().text


def known(text: str) -> set[str]:
    """Names that Prometheus would have: of samples, and of families that have none yet."""
    families = {line.split()[2] for line in text.splitlines() if line.startswith("# TYPE ")}
    return families | {
        re.split(r"[{ ]", line, maxsplit=1)[0] for line in text.splitlines() if line[:1] not in ("", "#")
    }


def test_every_service_measures_its_loop_and_its_way_to_the_bus(cluster):
    pages = {one["id"]: one["metrics_url"] for one in cluster.status()["services"] if one["metrics_url"]}
    assert {"gateway-0", "gateway-1", "prefill-0", "decode-0", "kv-0"} <= set(pages)
    for service, page in pages.items():
        for name in ("baton_event_loop_lag_seconds_count", "baton_bus_round_trip_seconds_count"):
            until(lambda page=page, name=name: read_metrics(page).get(name), f"{service}: {name}")


def test_promtool_accepts_every_page(cluster):
    for text in (page(cluster), *(httpx.get(one["metrics_url"]).text for one in scraped(cluster))):
        promtool("check", "metrics", input=text)


@pytest.mark.parametrize("board", DASHBOARDS, ids=lambda path: path.stem)
def test_dashboards_ask_for_metrics_that_a_cluster_has(cluster, board):
    names = known(page(cluster))
    asked = {name for query in queries(board) for name in NAME.findall(query)}
    assert asked
    assert {name for name in asked if not name.startswith("baton_gpu_")} - names == set()


def test_rules_ask_for_metrics_that_a_cluster_has(cluster):
    rules = yaml.safe_load((PROMETHEUS / "rules.yaml").read_text())
    text = page(cluster)
    exprs = [rule["expr"] for group in rules["groups"] for rule in group["rules"]]
    asked = {name for expr in exprs for name in NAME.findall(expr)}
    assert {name for name in asked if not name.startswith("baton_gpu_")} - known(text) == set()
    for bound in ('baton_time_to_first_token_seconds_bucket{service="gateway",instance="gateway-0",le="2.0"}',):
        assert bound in text, "the rules count what is within a bucket: it must be there"
    assert re.search(r'baton_inter_token_latency_seconds_bucket\{.*le="0.1"\}', text)


def queries(board: Path) -> list[str]:
    panels = json.loads(board.read_text())["panels"]
    found = [target["expr"] for panel in panels for target in panel["targets"]]
    return [expr.replace("$__rate_interval", RANGE) for expr in found]


def scraped(cluster: Cluster) -> list[dict[str, Any]]:
    return [service for service in cluster.status()["services"] if service["metrics_url"]]


@pytest.fixture(scope="module")
def prometheus(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    folder, port = tmp_path_factory.mktemp("prometheus"), free_port()
    each = [one["metrics_url"].removeprefix("http://").removesuffix("/metrics") for one in scraped(cluster)]
    settings = {
        "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
        "rule_files": [str(PROMETHEUS / "rules.yaml")],
        "scrape_configs": [
            {"job_name": "merged", "honor_labels": True, "static_configs": [{"targets": [cluster.url.split("//")[1]]}]},
            {"job_name": "each", "static_configs": [{"targets": each}]},
        ],
    }
    (folder / "prometheus.yml").write_text(yaml.safe_dump(settings))
    command = ["prometheus", f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/data"]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            [*command, f"--web.listen-address=127.0.0.1:{port}"], stdout=log, stderr=subprocess.STDOUT
        )
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=10) as client:
            yield client
    finally:
        process.terminate()
        process.wait(timeout=20)


def asked(prometheus: httpx.Client, query: str) -> list[dict[str, Any]]:
    try:
        answer = prometheus.get("/api/v1/query", params={"query": query})
    except httpx.TransportError:
        return []  # it has not begun to listen
    assert answer.status_code == 200, f"{query}: {answer.text}"
    return list(answer.json()["data"]["result"])


def test_prometheus_scrapes_every_service_and_answers_every_dashboard(cluster, prometheus):
    services = {one["id"] for one in scraped(cluster)}
    assert {"gateway-0", "gateway-1", "kv-0", "prefill-0", "decode-0"} == services
    until(lambda: len(asked(prometheus, "up == 1")) == len(services) + 1, "not everything is scraped")
    until(lambda: asked(prometheus, 'count_over_time(up{job="merged"}[30s]) > 5'), "too few scrapes")
    merged = asked(prometheus, 'count by (service, instance) (process_open_fds{job="merged"})')
    assert {one["metric"]["instance"] for one in merged} == services
    assert {one["metric"]["service"] for one in merged} == {"gateway", "kv", "prefill", "decode"}
    empty = [query for board in DASHBOARDS for query in queries(board) if not asked(prometheus, query)]
    # Nothing was refused, tried again or dropped here, and there is no GPU.
    quiet = ("baton_gpu_", "baton_shed_total", "baton_metrics_unanswered_total")
    assert [query for query in empty if not any(name in query for name in quiet)] == []
    firing = asked(prometheus, 'ALERTS{alertstate="firing"}')
    assert [one["metric"]["alertname"] for one in firing] == []


def test_a_collector_gets_whole_traces(cluster, otlp):
    trace_id = "4bf92f3577b34da6a3ce929d0e0e4736"
    ask(cluster, "exported", traceparent=f"00-{trace_id}-00f067aa0ba902b7-01")
    spans = {span.name: span for span in otlp.wait_for(trace_id, SPLIT | {"decode.first_token"})}
    assert SPLIT | {"decode.first_token"} == spans.keys()
    assert spans["gateway.request"].parent_id == "00f067aa0ba902b7"
    for name in ("gateway.admission", "gateway.queue", "decode.job", "prefill.job"):
        assert spans[name].parent_id == spans["gateway.request"].span_id, name
    assert spans["kv.push"].parent_id == spans["prefill.job"].span_id
    assert spans["kv.load"].parent_id == spans["decode.job"].span_id
    services = {name: span.service for name, span in spans.items()}
    assert services["decode.job"] == "decode"
    assert services["kv.push"] == "kv"
    assert spans["gateway.request"].attributes["gen_ai.usage.output_tokens"] == 8
    shown = httpx.get(f"{cluster.url}/dashboard/traces/exported").json()
    assert shown["trace_id"] == trace_id
    assert {span["name"] for span in shown["spans"]} == spans.keys()
