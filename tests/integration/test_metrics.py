"""The merged page of a gateway, and that whatever is bounded shows how much of it is in use."""

import asyncio
import re
from pathlib import Path

import httpx
from prometheus_client.parser import text_string_to_metric_families

from services.gateway.access.figures import AccessFigures
from shared import subjects, wire
from shared.bus import Bus
from shared.settings import GatewaySettings, WorkerSettings
from shared.span_sender import SpanSender
from shared.worker.metrics import WorkerMetrics
from tests.support.running_store import running_store

ROOT = Path(__file__).parents[2]
LIMIT = re.compile(r"^((?:MAX|MOST)_[A-Z_]+) *=", re.MULTILINE)
OF_ONE = ""  # bounds what one request, message or field may be, not what is held for all
# Every limit in the code, and the gauge or counter that says how near it is.
LIMITS = {
    "MAX_TRACES": "baton_traces_kept",
    "MAX_REFUSED": "baton_traces_kept",
    "MAX_ALL_SPANS": "baton_trace_spans_kept",
    "MAX_WANTED": "baton_traces_total",
    "MAX_MEMBERS": "baton_workers",
    "MAX_LINGERING": "baton_connections",
    "MAX_PENDING": "baton_usage_pending",
    "MAX_BUCKETS": "baton_quota_buckets",
    "MAX_KEYS": "baton_api_keys",
    "MOST_TENANTS": "baton_queue_depth",
    "MAX_FRESH": "baton_spans_held",
    "MAX_HELD": "baton_spans_held",
    "MAX_SESSIONS": "baton_kv_sessions",
    "MAX_LOST": "baton_kv_sessions",
    "MAX_LEASES": "baton_kv_leases",
    "MAX_QUEUED": "baton_kv_waiting_reservations",
    "MAX_CONNECTIONS": "baton_kv_connections",
    "MAX_BACKLOG": "baton_kv_index_backlog",
    "MAX_PUSHES": "baton_kv_pushes",
    "MAX_TRANSFERS": "baton_kv_arrivals",
    "MAX_INCOMING": "baton_kv_peer_links",
    "MAX_VIEWERS": "baton_dashboard_viewers",
    **dict.fromkeys(("MAX_GONE", "MAX_SERVICES", "MAX_SOURCES"), "baton_dashboard_services"),
    **dict.fromkeys(
        [
            "MAX_SPANS",
            "MAX_EVENTS",
            "MAX_RESOURCES",
            "MAX_ATTEMPTS",
            "MAX_BUSY",
            "MAX_UNWRITTEN_BYTES",
            "MAX_UNSENT_BYTES",
            "MAX_LOGPROBS",
            "MAX_SALT",
            "MAX_STOPS",
            "MAX_BIASES",
            "MAX_WORDS",
            "MAX_INT",
            "MAX_ID_DIGITS",
            "MAX_HEAD_BYTES",
            "MAX_HEADERS",
            "MAX_PIPELINED",
            "MAX_FIELD_BYTES",
            "MAX_FIELDS",
            "MAX_BATCH",
            "MOST_RETRY_S",
            "MOST_RATIO",
            "MAX_NAME_CHARS",
            "MAX_WAIT_S",
            "MAX_NODES",
            "MAX_PAYLOAD_BYTES",
            "MAX_SECRET_CHARS",
            "MAX_FRAME_BYTES",
            "MOST_TEXT",
            "MAX_LABELS",
            "MAX_ITEMS",
            "MAX_REST_BYTES",
            "MOST_HOLDERS",
            "MAX_BLOCK_BYTES",
            "MAX_CONTROL_BYTES",
            "MAX_BYTES",
        ],
        OF_ONE,
    ),
}
SETTINGS = {
    "max_bodies_bytes": "baton_body_bytes",
    "max_requests": "baton_active_requests",
    "max_queued_tokens": "baton_queue_tokens",
    "max_connections": "baton_connections",
    "max_waiting": "baton_worker_jobs",
    **dict.fromkeys(("max_body_bytes", "max_n", "max_prompts"), OF_ONE),
}


def names(text: str) -> set[str]:
    return {sample.name for family in text_string_to_metric_families(text) for sample in family.samples}


def families(registry) -> set[str]:
    return {sample.name for metric in registry.collect() for sample in metric.samples}


async def test_whatever_is_bounded_has_a_gauge(cluster, tmp_path):
    folders = [ROOT / "shared", ROOT / "services" / "gateway", ROOT / "services" / "kv_transfer"]
    sources = [path for folder in folders for path in folder.rglob("*.py") if "sim" not in path.parts]
    found = {name for path in sources for name in LIMIT.findall(path.read_text())}
    assert found - LIMITS.keys() == set(), "a new limit: name the gauge that says how near it is"
    fields = {field for cls in (GatewaySettings, WorkerSettings) for field in cls.__struct_fields__}
    assert {field for field in fields if field.startswith("max_")} == SETTINGS.keys()
    worker = WorkerMetrics()
    SpanSender("decode", "decode-0", worker.registry)
    AccessFigures(worker.registry).live(keys=int, buckets=int, waiting=int, pending=int)  # a gateway's with keys
    async with cluster.gateway() as running, running_store(tmp_path) as store:
        await cluster.add(running, "decode-0")
        shown = families(running.deps.metrics.registry) | families(worker.registry)
        main = (ROOT / "services" / "kv_transfer" / "__main__.py").read_text()
        shown |= families(store.registry) | set(re.findall(r'gauge\(\s*"(baton_[a-z_]+)"', main))
    wanted = {name for name in [*LIMITS.values(), *SETTINGS.values()] if name != OF_ONE}
    assert wanted - shown == set()


async def test_the_page_has_everybody_and_leaves_out_who_does_not_answer(cluster, nats_url):
    async with cluster.gateway() as running:
        await cluster.add(running, "decode-0", "prefill-0")
        bus = await Bus.connect(nats_url, "decode-0")

        async def answer(*_: object) -> wire.Message:
            return wire.MetricsText(text='# HELP x y\n# TYPE x gauge\nx{service="decode"} 1.0\n')

        await bus.serve(subjects.metrics("test", "decode-0"), answer)
        await bus.flush()
        async with httpx.AsyncClient() as client:
            pages = await asyncio.gather(*(client.get(f"{running.url}/metrics") for _ in range(5)))
        await bus.close()
        assert {"x", "baton_queue_depth", "baton_wanted_replicas"} <= names(pages[0].text)
        assert 'baton_queue_depth{service="gateway",instance="gateway-0"} 0.0' in pages[0].text
        # Five that ask at a time ask the services once; fake workers have no metrics.
        assert running.sample("baton_metrics_unanswered_total", role="prefill") == 1
