"""What a stranger meets: `baton up` with the demo model, chat, the OpenAI client, one unbroken trace."""

import secrets
from collections.abc import Iterator

import httpx
import pytest

from loadtest.cluster.otlp import Receiver, Span
from tests.support.cluster import Cluster, running_cluster
from tests.support.disturbed import until
from tests.support.exact import KEPT_S

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(400)]

MODEL = "baton-demo"
PAGE = 128  # tokens in a block of vLLM's own choice
QUESTION = [{"role": "user", "content": "What is Baton?"}]
# span -> (the service that makes it, its parent)
TREE = {
    "gateway.request": ("gateway", None),
    "gateway.admission": ("gateway", "gateway.request"),
    "gateway.queue": ("gateway", "gateway.request"),
    "decode.job": ("decode", "gateway.request"),
    "prefill.job": ("prefill", "gateway.request"),
    "kv.push": ("kv", "prefill.job"),
    "kv.load": ("kv", "decode.job"),
    "decode.first_token": ("decode", "decode.job"),
}
ENGINE = "llm_request"  # vLLM's own span, one in each job


@pytest.fixture(scope="module")
def receiver() -> Iterator[Receiver]:
    with Receiver() as receiver:
        yield receiver


@pytest.fixture(scope="module")
def cluster(receiver: Receiver, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with running_cluster(
        tmp_path_factory.mktemp("home"),
        "--arrangement=split",
        OTEL_EXPORTER_OTLP_ENDPOINT=receiver.url,
        OTEL_BSP_SCHEDULE_DELAY="100",
    ) as cluster:
        yield cluster


def is_true_sentence(text: str) -> bool:
    return text.strip().endswith(".") and "prefill" in text.lower() and "decode" in text.lower()


def test_chat_command_answers(cluster: Cluster) -> None:
    done = cluster.command("chat", "What is Baton?")
    assert done.returncode == 0, done.stderr
    assert is_true_sentence(done.stdout), done.stdout


def test_openai_client_whole(cluster: Cluster) -> None:
    answer = cluster.client().chat.completions.create(model=MODEL, messages=QUESTION, temperature=0)
    assert is_true_sentence(answer.choices[0].message.content or "")
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_openai_client_streamed(cluster: Cluster) -> None:
    whole = cluster.client().chat.completions.create(model=MODEL, messages=QUESTION, temperature=0)
    stream = cluster.client().chat.completions.create(
        model=MODEL, messages=QUESTION, temperature=0, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-1].usage == whole.usage.model_copy(
        update={"prompt_tokens_details": chunks[-1].usage.prompt_tokens_details}
    )
    assert len(chunks) > 5, "it came in one piece"


def test_the_next_turn_of_a_chat_computes_only_what_is_new(cluster: Cluster) -> None:
    """The words of an answer, sent back as a message, are the tokens that were generated."""
    client, kept = cluster.client(), cluster.meter("kv", "baton_kv_kept_blocks_total")
    # The first answer ends the block that the question has begun.
    messages = [{"role": "user", "content": "What is Baton?" + " so" * (PAGE - 10)}]
    before = kept()
    first = client.chat.completions.create(model=MODEL, messages=messages, temperature=0)
    assert first.usage is not None
    assert PAGE - 8 < first.usage.prompt_tokens < PAGE < first.usage.total_tokens
    until(lambda: kept() > before, "the turn is kept", KEPT_S)
    messages += [
        {"role": "assistant", "content": first.choices[0].message.content},
        {"role": "user", "content": "What is a KV block?"},
    ]
    second = client.chat.completions.create(model=MODEL, messages=messages, temperature=0)
    assert second.usage is not None
    assert second.usage.prompt_tokens_details is not None
    assert second.usage.prompt_tokens_details.cached_tokens == PAGE


def test_status(cluster: Cluster) -> None:
    status = cluster.status()
    assert status["ready"]
    assert {service["role"] for service in status["services"]} == {
        "nats",
        "redis",
        "kv",
        "prefill",
        "decode",
        "gateway",
    }
    assert {service["state"] for service in status["services"]} == {"ready"}
    assert "requests: 0 active, 0 of them waiting; ended: " in cluster.command("status").stdout


def test_the_engines_own_metrics_are_passed_through(cluster: Cluster) -> None:
    page = httpx.get(f"{cluster.url}/metrics", timeout=10).text
    for worker in ("prefill", "decode"):
        assert f'vllm:prompt_tokens_total{{service="{worker}",instance="{worker}-0",' in page
    assert cluster.metrics("decode")['vllm:generation_tokens_total{engine="0",model_name="baton-demo"}'] > 0


def test_one_unbroken_trace(cluster: Cluster, receiver: Receiver) -> None:
    trace_id, span_id = secrets.token_hex(16), secrets.token_hex(8)
    cluster.client().chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": f"Something that nobody has asked before: {trace_id}"}],
        max_tokens=4,
        extra_headers={"traceparent": f"00-{trace_id}-{span_id}-01"},
    )
    found = receiver.wait_for(trace_id, {*TREE, ENGINE})
    engines, spans = ([span for span in found if (span.name == ENGINE) is wanted] for wanted in (True, False))
    by_name: dict[str, Span] = {span.name: span for span in spans}
    assert set(by_name) == set(TREE)
    assert len(spans) == len(TREE), "a span came twice"
    for name, (service, parent) in TREE.items():
        assert by_name[name].service == service, name
        assert by_name[name].parent_id == (by_name[parent].span_id if parent else span_id), name
    assert {span.parent_id for span in engines} == {by_name[job].span_id for job in ("prefill.job", "decode.job")}
    push, load = by_name["kv.push"], by_name["kv.load"]
    assert push.end_ns <= load.start_ns
    # The block that holds the last token may hold nothing else; then it is written and not read.
    assert (
        0
        <= push.attributes["bytes"] - load.attributes["bytes"]
        <= push.attributes["bytes"] // push.attributes["blocks"]
    )
