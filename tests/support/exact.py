"""What the tests of exactness share: engine settings, prompts, and completions whose token ids come back."""

import contextlib
import json
import random
import time
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from tests.support.cluster import Cluster, running_cluster
from tests.support.sensitive_model import make_sensitive_model

BLOCK = 32
KEPT_S = 10.0
MAX_LEN = 2048
ENGINE: dict[str, Any] = {
    "dtype": "float32",
    "max_model_len": MAX_LEN,
    "block_size": BLOCK,
    "enforce_eager": True,
    "structured_outputs_config": {"backend": "xgrammar", "disable_any_whitespace": True},
}
MODEL = "sensitive"
# Of the completions call of the openai client; everything else goes into `extra_body`.
NAMED = {"temperature", "top_p", "max_tokens", "seed", "presence_penalty", "frequency_penalty", "logprobs", "n", "stop"}


def greedy(max_tokens: int) -> dict[str, Any]:
    return {"temperature": 0.0, "max_tokens": max_tokens, "ignore_eos": True}


def prompt_of(length: int, seed: int) -> str:
    """`length` tokens: one ASCII letter each."""
    rng = random.Random(f"{length}-{seed}")
    return "".join(rng.choices("abcdefghijklmnopqrstuvwxyz ", k=length))


def tokens_of(text: str) -> list[int]:
    return list(text.encode())


def engine_options(**more: Any) -> list[str]:
    """`baton up` options for these engine arguments."""
    return [f"--engine-arg={key}={json.dumps(value)}" for key, value in {**ENGINE, **more}.items()]


@contextlib.contextmanager
def exact_cluster(
    folders: pytest.TempPathFactory, *options: str, engine: dict[str, Any] | None = None, **env: str
) -> Iterator[Cluster]:
    """A split cluster that serves the sensitive model. `engine`: arguments beyond ENGINE; `env`: settings."""
    model = make_sensitive_model(folders.mktemp("model") / "sensitive", max_model_len=MAX_LEN)
    with running_cluster(
        folders.mktemp("home"),
        f"--model={model}",
        f"--served-model-name={MODEL}",
        "--arrangement=split",
        *options,
        *engine_options(**(engine or {})),
        **env,
    ) as cluster:
        yield cluster


def arguments(prompt: str, params: dict[str, Any]) -> dict[str, Any]:
    extra = {key: value for key, value in params.items() if key not in NAMED}
    return {
        "model": MODEL,
        "prompt": prompt,
        "extra_body": {**extra, "return_token_ids": True},
        **{key: value for key, value in params.items() if key in NAMED},
    }


def complete(cluster: Cluster, prompt: str, params: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """One completion, whole; returns the response and its receipt."""
    raw = cluster.client().completions.with_raw_response.create(**arguments(prompt, params))
    return raw.parse(), json.loads(raw.headers["x-baton-receipt"])


async def stream(client: openai.AsyncOpenAI, prompt: str, params: dict[str, Any]) -> list[int]:
    """One streamed completion; returns its token ids. Raises openai.APIError for an error event."""
    found: list[int] = []
    async for chunk in await client.completions.create(stream=True, **arguments(prompt, params)):
        for choice in chunk.choices:
            found += (choice.model_extra or {}).get("token_ids") or []
    return found


def token_ids(choice: Any) -> list[int]:
    return list(choice.model_extra["token_ids"])


def assert_idle(cluster: Cluster) -> None:
    """Nothing is held in the store once every request has ended, and what they leave has been kept."""
    deadline = time.monotonic() + KEPT_S
    while True:
        metrics = cluster.metrics("kv")
        held = {state: metrics[f'baton_kv_slots{{state="{state}"}}'] for state in ("reserved", "pinned", "revoked")}
        held["leases"] = metrics["baton_kv_leases"]
        if not any(held.values()):
            return
        assert time.monotonic() < deadline, held
