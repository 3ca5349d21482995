"""Split output equals unsplit vLLM, token for token, and the hand-off behind it is real.

The reference is vLLM's own offline engine with the same settings. The cluster is started as a user starts it, with
`--arrangement split`; every receipt says so. The model's output depends on every KV block (test_sensitivity.py).
"""

import asyncio
import json
import string
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.cluster import Cluster, running_cluster
from tests.support.disturbed import until
from tests.support.exact import (
    BLOCK,
    ENGINE,
    KEPT_S,
    MAX_LEN,
    MODEL,
    assert_idle,
    complete,
    engine_options,
    greedy,
    prompt_of,
    stream,
    token_ids,
    tokens_of,
)
from tests.support.reference import run_reference
from tests.support.sensitive_model import make_sensitive_model

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]

OUTPUT = 24
LENGTHS = [1, 2, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK, 1000, MAX_LEN - OUTPUT - 1]
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "size": {"type": "integer", "maximum": 99}},
    "required": ["name", "size"],
    "additionalProperties": False,
}


GREEDY = greedy(OUTPUT)
LETTERS = list(string.ascii_letters)
# name -> the parameters in OpenAI's (and vLLM's extra) names, and the same in vLLM's own
VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "seeded": (
        {"temperature": 0.9, "top_p": 0.95, "seed": 7, "max_tokens": OUTPUT},
        {"temperature": 0.9, "top_p": 0.95, "seed": 7, "max_tokens": OUTPUT},
    ),
    "penalties": (
        {**GREEDY, "presence_penalty": 0.8, "frequency_penalty": 0.5, "repetition_penalty": 1.2},
        {**GREEDY, "presence_penalty": 0.8, "frequency_penalty": 0.5, "repetition_penalty": 1.2},
    ),
    "min_tokens": (
        {"temperature": 0.0, "max_tokens": OUTPUT, "min_tokens": 12},
        {"temperature": 0.0, "max_tokens": OUTPUT, "min_tokens": 12},
    ),
    "logprobs": ({**GREEDY, "logprobs": 5}, {**GREEDY, "logprobs": 5}),
    "n": (
        {"temperature": 0.9, "seed": 11, "max_tokens": OUTPUT, "n": 3},
        {"temperature": 0.9, "seed": 11, "max_tokens": OUTPUT, "n": 3},
    ),
    "logit_bias": (
        {**GREEDY, "logit_bias": {"101": -100, "97": 3.5}},
        {**GREEDY, "logit_bias": {"101": -100, "97": 3.5}},
    ),
    "bad_words": ({**GREEDY, "bad_words": LETTERS}, {**GREEDY, "bad_words": LETTERS}),
    "stop_token_ids": (
        {**GREEDY, "stop_token_ids": list(range(0, 256, 2))},
        {**GREEDY, "stop_token_ids": list(range(0, 256, 2))},
    ),
    "top_k_min_p": (
        {"temperature": 1.1, "top_k": 12, "min_p": 0.02, "seed": 3, "max_tokens": OUTPUT},
        {"temperature": 1.1, "top_k": 12, "min_p": 0.02, "seed": 3, "max_tokens": OUTPUT},
    ),
}
VARIANT_LENGTHS = [5, BLOCK + 1, 300]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_sensitive_model(tmp_path_factory.mktemp("model") / "sensitive", max_model_len=MAX_LEN)


@pytest.fixture(scope="module")
def reference(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """name -> choices, by unsplit vLLM; greedy ones alone, the rest in one batch."""
    engine = {**ENGINE, "model": str(model), "kv_cache_memory_bytes": 1 << 28}
    names: list[list[str]] = [[f"greedy-{n}"] for n in LENGTHS]
    batches = [[{"tokens": tokens_of(prompt_of(n, 0)), "params": GREEDY}] for n in LENGTHS]
    names.append([f"crowd-{i}" for i in range(16)])
    batches.append([{"tokens": tokens_of(prompt_of(n, i)), "params": GREEDY} for i, n in enumerate(crowd_lengths())])
    for name, (_, params) in VARIANTS.items():
        names.append([f"{name}-{n}" for n in VARIANT_LENGTHS])
        batches.append([{"tokens": tokens_of(prompt_of(n, 1)), "params": params} for n in VARIANT_LENGTHS])
    names.append([f"json-{n}" for n in VARIANT_LENGTHS])
    batches.append(
        [
            {"tokens": tokens_of(prompt_of(n, 2)), "params": {"temperature": 0.0, "max_tokens": 64}, "json": SCHEMA}
            for n in VARIANT_LENGTHS
        ]
    )
    results = run_reference(tmp_path_factory.mktemp("reference"), engine, batches)
    return {
        name: result
        for row, answers in zip(names, results, strict=True)
        for name, result in zip(row, answers, strict=True)
    }


def crowd_lengths() -> list[int]:
    return [*LENGTHS[:-1], 700, 3, 40, 500, 96, 95, 97, 1200, 128]


@pytest.fixture(scope="module")
def cluster(model: Path, reference: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with running_cluster(
        tmp_path_factory.mktemp("home"),
        f"--model={model}",
        f"--served-model-name={MODEL}",
        "--arrangement=split",
        "--kv-gib=0.25",
        "--arena-gib=0.5",
        *engine_options(),
    ) as cluster:
        yield cluster


@pytest.mark.parametrize("length", LENGTHS)
def test_greedy_alone(cluster: Cluster, reference: dict[str, Any], length: int) -> None:
    response, receipt = complete(cluster, prompt_of(length, 0), GREEDY)
    (expected,) = reference[f"greedy-{length}"]
    assert receipt["path"] == "split"
    assert token_ids(response.choices[0]) == expected["token_ids"]
    assert response.choices[0].text == expected["text"]
    assert response.choices[0].finish_reason == "length"
    assert response.usage.prompt_tokens == length
    assert response.usage.completion_tokens == OUTPUT


async def test_greedy_sixteen_at_once(cluster: Cluster, reference: dict[str, Any]) -> None:
    client = cluster.async_client()
    lengths = enumerate(crowd_lengths())
    got = await asyncio.gather(*(stream(client, prompt_of(n, i), GREEDY) for i, n in lengths))
    for index, tokens in enumerate(got):
        assert tokens == reference[f"crowd-{index}"][0]["token_ids"], f"request {index}"


@pytest.mark.parametrize("length", VARIANT_LENGTHS)
@pytest.mark.parametrize("name", VARIANTS)
def test_sampling_variants(cluster: Cluster, reference: dict[str, Any], name: str, length: int) -> None:
    response, receipt = complete(cluster, prompt_of(length, 1), VARIANTS[name][0])
    expected = reference[f"{name}-{length}"]
    assert receipt["path"] == "split"
    assert [token_ids(choice) for choice in response.choices] == [choice["token_ids"] for choice in expected]
    assert [choice.finish_reason for choice in response.choices] == [choice["finish_reason"] for choice in expected]
    if name in ("logit_bias", "bad_words", "stop_token_ids"):
        assert changed(name, length, reference), "the parameter did nothing: this test proves nothing"
    if name == "stop_token_ids":
        assert [choice.model_extra.get("stop_reason") for choice in response.choices] == [
            choice["stop_reason"] for choice in expected
        ]
    if name == "logprobs":
        compare_logprobs(response.choices[0], expected[0])


def changed(name: str, length: int, reference: dict[str, Any]) -> bool:
    """The seed of these prompts is that of the plain greedy `logprobs` variant."""
    return bool(reference[f"{name}-{length}"][0]["token_ids"] != reference[f"logprobs-{length}"][0]["token_ids"])


def compare_logprobs(choice: Any, expected: dict[str, Any]) -> None:
    assert len(choice.logprobs.token_logprobs) == len(expected["token_ids"])
    for got, token, position in zip(
        choice.logprobs.token_logprobs, expected["token_ids"], expected["logprobs"], strict=True
    ):
        assert got == pytest.approx(position[str(token)], abs=1e-4)
    for got_top, position in zip(choice.logprobs.top_logprobs, expected["logprobs"], strict=True):
        assert sorted(got_top.values()) == pytest.approx(sorted(position.values())[-len(got_top) :], abs=1e-4)


@pytest.mark.parametrize("length", VARIANT_LENGTHS)
def test_json_schema(cluster: Cluster, reference: dict[str, Any], length: int) -> None:
    response, receipt = complete(
        cluster,
        prompt_of(length, 2),
        {
            "temperature": 0.0,
            "max_tokens": 64,
            "response_format": {"type": "json_schema", "json_schema": {"name": "thing", "schema": SCHEMA}},
        },
    )
    (expected,) = reference[f"json-{length}"]
    assert receipt["path"] == "split"
    assert token_ids(response.choices[0]) == expected["token_ids"]
    if expected["finish_reason"] == "stop":
        assert set(json.loads(response.choices[0].text)) == {"name", "size"}


@pytest.mark.parametrize("length", VARIANT_LENGTHS)
def test_stop_string(cluster: Cluster, reference: dict[str, Any], length: int) -> None:
    """A stop string taken from the middle of the greedy text, across two tokens."""
    whole, _ = complete(cluster, prompt_of(length, 3), GREEDY)
    text = whole.choices[0].text
    stop = text[9:11]
    response, receipt = complete(cluster, prompt_of(length, 3), {**GREEDY, "stop": [stop]})
    assert receipt["path"] == "split"
    assert response.choices[0].text == text[: text.index(stop)]
    assert response.choices[0].finish_reason == "stop"


def test_the_hand_off_is_real(cluster: Cluster) -> None:
    """Decode computes one prompt token a request, reads exactly the prompts' blocks, and nothing is recomputed."""
    lengths = [17, BLOCK, 333, 1500]
    before, store_before = cluster.metrics("decode"), cluster.metrics("kv")
    for length in lengths:
        _, receipt = complete(cluster, prompt_of(length, 99), GREEDY)
        assert receipt["path"] == "split"
    after, store_after = cluster.metrics("decode"), cluster.metrics("kv")

    def grown(name: str, new: dict[str, float], old: dict[str, float]) -> float:
        return new[name] - old.get(name, 0.0)

    # The steps that decode's scheduler planned: the last prompt token of each request, and nothing else.
    assert grown('baton_prefix_tokens_total{source="computed"}', after, before) == len(lengths)
    assert grown("baton_engine_computed_prompt_tokens", after, before) <= len(lengths)  # vLLM's own counter
    assert after["baton_kv_recomputed_tokens_total"] == 0
    slot_bytes = 4 * 2 * 2 * 64 * BLOCK * 4  # layers, K and V, KV heads, head size, tokens, float32
    blocks = sum(-(-(length - 1) // BLOCK) for length in lengths)  # the last token is computed
    assert grown('baton_kv_moved_bytes_total{path="local"}', store_after, store_before) == blocks * slot_bytes


def test_three_turns(cluster: Cluster) -> None:
    """Each turn begins with the ids of all before it: every full block of those is there, and the text is the same."""
    client, kept = cluster.client(), cluster.meter("kv", "baton_kv_kept_blocks_total")

    def say(tokens: list[int], **more: Any) -> tuple[list[int], int]:
        answer = client.completions.create(
            model=MODEL, prompt=tokens, temperature=0, max_tokens=100, extra_body={"return_token_ids": True, **more}
        )
        assert answer.usage is not None
        assert answer.usage.prompt_tokens_details is not None
        return token_ids(answer.choices[0]), answer.usage.prompt_tokens_details.cached_tokens or 0

    tokens, held = tokens_of(prompt_of(70, 7)), 0
    for turn in range(3):
        before = kept()
        said, cached = say(tokens)
        assert cached == held * BLOCK
        tokens, held = tokens + said, (len(tokens) + len(said) - 1) // BLOCK  # the last one's KV was never computed
        new = held - (len(tokens) - len(said)) // BLOCK
        until(lambda least=before + new: kept() >= least, f"turn {turn} is kept", KEPT_S)
        assert kept() == before + new
        tokens += tokens_of(prompt_of(45, 8 + turn))
    said, cached = say(tokens)
    assert (len(said), cached) == (100, held * BLOCK)
    # Asked for its log probabilities too, the whole prompt is computed.
    assert say(tokens, prompt_logprobs=0) == (said, 0)


def test_nothing_is_held_when_idle(cluster: Cluster) -> None:
    assert_idle(cluster)
