"""Prompts as lists, echo, prompt log probabilities, usage and broken characters: real vLLM, `--arrangement auto`.

Short prompts are served whole there and long ones split, so one cluster shows both. The measure is vLLM by itself.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tests.support.cluster import Cluster, running_cluster
from tests.support.exact import (
    BLOCK,
    ENGINE,
    MAX_LEN,
    MODEL,
    arguments,
    assert_idle,
    complete,
    engine_options,
    greedy,
    prompt_of,
    token_ids,
    tokens_of,
)
from tests.support.reference import run_reference
from tests.support.sensitive_model import make_sensitive_model

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]

GREEDY = greedy(8)
SHORT, LONG = 70, 300  # `auto` splits from 256 tokens on
SCORED = [1, 2, SHORT, LONG, 1500]
TEXTS = ["日本語", "👩‍👩‍👧 café 😀", "naïve — ¿qué? Ωμέγα"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_sensitive_model(tmp_path_factory.mktemp("model") / "sensitive", max_model_len=MAX_LEN)


@pytest.fixture(scope="module")
def reference(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """name -> choices, by unsplit vLLM."""
    engine = {**ENGINE, "model": str(model), "kv_cache_memory_bytes": 1 << 28}
    requests: dict[str, dict[str, Any]] = {}
    for length in SCORED:
        prompt = tokens_of(prompt_of(length, 5))
        requests[f"scored-{length}"] = {"tokens": prompt, "params": {**GREEDY, "logprobs": 2, "prompt_logprobs": 2}}
    for index, length in enumerate((SHORT, LONG, 5)):
        requests[f"many-{index}"] = {"tokens": tokens_of(prompt_of(length, 6)), "params": GREEDY}
    batches = [[request] for request in requests.values()]
    results = run_reference(tmp_path_factory.mktemp("reference"), engine, batches)
    return {name: result for name, (result,) in zip(requests, results, strict=True)}


@pytest.fixture(scope="module")
def cluster(model: Path, reference: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with running_cluster(
        tmp_path_factory.mktemp("home"),
        f"--model={model}",
        f"--served-model-name={MODEL}",
        "--arrangement=auto",
        "--kv-gib=0.25",
        "--arena-gib=0.5",
        *engine_options(),
    ) as cluster:
        yield cluster


def same_positions(got: list[Any], expected: list[Any]) -> None:
    assert len(got) == len(expected)
    for ours, theirs in zip(got, expected, strict=True):
        if theirs is None:
            assert ours is None
            continue
        assert list(ours) == list(theirs)
        for token, entry in theirs.items():
            assert (ours[token]["rank"], ours[token]["decoded_token"]) == (entry["rank"], entry["decoded_token"])
            assert ours[token]["logprob"] == pytest.approx(entry["logprob"], abs=1e-4)


@pytest.mark.parametrize("length", SCORED)
def test_prompt_logprobs(cluster: Cluster, reference: dict[str, Any], length: int) -> None:
    """Twice: what the first has left in the caches must not keep the second from computing its prompt."""
    (expected,) = reference[f"scored-{length}"]
    for _ in range(2):
        response, receipt = complete(cluster, prompt_of(length, 5), {**GREEDY, "prompt_logprobs": 2})
        assert (receipt["path"], receipt["reason"]) == ("whole", "prompt_logprobs")
        assert token_ids(response.choices[0]) == expected["token_ids"]
        same_positions(response.choices[0].model_extra["prompt_logprobs"], expected["prompt_logprobs"])
        assert response.usage.prompt_tokens_details.cached_tokens == 0


@pytest.mark.parametrize("length", [SHORT, LONG])
def test_echo_with_logprobs(cluster: Cluster, reference: dict[str, Any], length: int) -> None:
    prompt = prompt_of(length, 5)
    (expected,) = reference[f"scored-{length}"]
    response, receipt = complete(cluster, prompt, {**GREEDY, "echo": True, "logprobs": 2})
    (choice,) = response.choices
    assert receipt["reason"] == "prompt_logprobs"
    assert choice.text == prompt + expected["text"]
    assert choice.logprobs.tokens[:length] == list(prompt)
    assert choice.logprobs.token_logprobs[0] is choice.logprobs.top_logprobs[0] is None
    scores = [
        position[str(token)]["logprob"]
        for token, position in zip(tokens_of(prompt)[1:], expected["prompt_logprobs"][1:], strict=True)
    ] + [position[str(token)] for token, position in zip(expected["token_ids"], expected["logprobs"], strict=True)]
    assert choice.logprobs.token_logprobs[1:] == pytest.approx(scores, abs=1e-4)


def test_scoring_without_an_answer(cluster: Cluster) -> None:
    """What evaluation harnesses send."""
    response, _ = complete(
        cluster, prompt_of(SHORT, 5), {"temperature": 0.0, "max_tokens": 0, "echo": True, "logprobs": 1}
    )
    (choice,) = response.choices
    assert choice.text == prompt_of(SHORT, 5)
    assert len(choice.logprobs.token_logprobs) == SHORT
    assert (choice.finish_reason, response.usage.completion_tokens) == ("length", 0)


@pytest.mark.parametrize("ids", [False, True], ids=["texts", "token ids"])
def test_many_prompts(cluster: Cluster, reference: dict[str, Any], ids: bool) -> None:
    texts = [prompt_of(length, 6) for length in (SHORT, LONG, 5)]
    prompts: Any = [tokens_of(text) for text in texts] if ids else texts
    response, _ = complete(cluster, prompts, GREEDY)
    expected = [reference[f"many-{index}"][0] for index in range(3)]
    assert [choice.index for choice in response.choices] == [0, 1, 2]
    assert [token_ids(choice) for choice in response.choices] == [one["token_ids"] for one in expected]
    assert response.usage.prompt_tokens == SHORT + LONG + 5
    assert response.usage.completion_tokens == 3 * 8
    streamed = ["", "", ""]
    for chunk in cluster.client().completions.create(stream=True, **arguments(prompts, GREEDY)):
        streamed[chunk.choices[0].index] += chunk.choices[0].text
    assert streamed == [one["text"] for one in expected]


def cached(cluster: Cluster, prompt: str, params: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    response, receipt = complete(cluster, prompt, params)
    assert receipt["cached_tokens"] == response.usage.prompt_tokens_details.cached_tokens
    assert response.usage.prompt_tokens == len(prompt)
    return receipt["cached_tokens"], receipt


def test_usage_says_what_was_cached(cluster: Cluster) -> None:
    """On the split path, on the whole path, and where the decode node holds all of it."""
    split, whole = prompt_of(LONG, 7), prompt_of(SHORT, 7)
    assert cached(cluster, split, GREEDY)[0] == 0
    again, receipt = cached(cluster, split, GREEDY)
    assert (again, receipt["path"], receipt["reason"]) == (LONG - 1, "split", "cached")
    longer, receipt = cached(cluster, split[: 5 * BLOCK] + prompt_of(LONG, 8), GREEDY)
    assert (longer, receipt["path"], receipt["reason"]) == (5 * BLOCK, "split", "auto")
    assert cached(cluster, whole, GREEDY)[0] == 0
    again, receipt = cached(cluster, whole, GREEDY)
    assert (receipt["path"], receipt["reason"]) == ("whole", "short_prompt")
    assert again >= SHORT // BLOCK * BLOCK


@pytest.mark.parametrize("length", [SHORT, LONG])
def test_choices_do_not_find_each_others_prompt(cluster: Cluster, length: int) -> None:
    """The second choice of a cold prompt finds what the first has just computed: nobody had cached it."""
    assert cached(cluster, prompt_of(length, 9), {"seed": 1, "max_tokens": 4, "n": 3})[0] == 0


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("length", [SHORT, LONG])
def test_characters_of_many_tokens_stay_whole(cluster: Cluster, text: str, length: int) -> None:
    """A token of this model is one byte, so every one of these characters is cut; the grammar admits one answer."""
    schema = {"type": "json_schema", "json_schema": {"name": "word", "schema": {"const": text}}}
    body = {
        "model": MODEL,
        "prompt": prompt_of(length, 10),
        "max_tokens": 200,
        "temperature": 0,
        "stream": True,
        "response_format": schema,
        "return_token_ids": True,
    }
    answer = httpx.post(f"{cluster.url}/v1/completions", json=body, timeout=60)
    lines = answer.content.decode("utf-8", errors="strict").splitlines()
    events = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    pieces = [choice["text"] for event in events for choice in event["choices"]]
    assert "".join(pieces) == json.dumps(text, ensure_ascii=False)
    assert not any("�" in piece for piece in pieces)
    tokens = [token for event in events for choice in event["choices"] for token in choice["token_ids"]]
    assert len([piece for piece in pieces if piece]) < len(tokens)  # bytes were held back until they were a character


@pytest.mark.parametrize(
    "change",
    [
        {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "string", "pattern": "["}}}},
        {"response_format": {"type": "json_schema", "json_schema": {"schema": {"$ref": "#/nowhere"}}}},
        {"bad_words": ["\u200b" * 3, "\x00"]},
        {"stop": ["x" * 10_000]},
        {"repetition_penalty": 1e-300},
        {"repetition_penalty": 1e300, "logprobs": 2},
        {"temperature": 1e-4, "seed": -(2**63)},
        {"logit_bias": {"5": -100, "0007": 100}, "top_k": 2**31 - 1},
        {"min_tokens": 8, "stop_token_ids": [0, 1, 2]},
    ],
)
def test_what_only_the_engine_can_judge(cluster: Cluster, change: dict[str, Any]) -> None:
    """An answer or a 400, never a 500; and the engine lives on."""
    body = {"model": MODEL, "prompt": "abc", "max_tokens": 8, **change}
    answer = httpx.post(f"{cluster.url}/v1/completions", json=body, timeout=60)
    assert answer.status_code == 200 or answer.json()["error"]["code"] == "invalid_value", answer.text
    assert answer.status_code in (200, 400)
    complete(cluster, "abc", GREEDY)


def test_an_engines_refusal_of_one_prompt_ends_the_request_with_one_error(cluster: Cluster) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        complete(cluster, ["a", "b" * MAX_LEN], GREEDY)  # type: ignore[arg-type]
    assert (refused.value.code, refused.value.param) == ("context_length_exceeded", "prompt[1]")


def test_nothing_is_held_when_idle(cluster: Cluster) -> None:
    assert_idle(cluster)
