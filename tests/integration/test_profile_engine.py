"""The step log inside a real vLLM engine says what each step did; a profile made of it loads."""

import asyncio
import random
from itertools import pairwise
from pathlib import Path

import pytest

from loadtest.__main__ import main
from loadtest.profiling.engine_bench import BenchSettings, running_engine
from loadtest.profiling.scenarios import Scenario
from loadtest.profiling.steps import EngineFacts, Step
from shared.worker.sim.profile import load_profile
from tests.support.sensitive_model import HEAD_SIZE, KV_HEADS, LAYERS, make_sensitive_model

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(400)]

MAX_LEN = 1024
BUDGET = 256
ENGINE_ARGS = {"dtype": "float32", "max_num_batched_tokens": BUDGET, "max_num_seqs": 16}
FLAGS = [word for key, value in ENGINE_ARGS.items() for word in ("--engine-arg", f"{key}={value}")]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_sensitive_model(tmp_path_factory.mktemp("model"), max_model_len=MAX_LEN)


def test_the_log_says_what_each_step_did(model: Path) -> None:
    settings = BenchSettings(model=str(model), engine_args=dict(ENGINE_ARGS), kv_bytes=1 << 28, cores=frozenset())

    async def play() -> tuple[EngineFacts, list[Step], list[Step], list[Step]]:
        async with running_engine(settings, random.Random(1)) as bench:
            chunks = await bench.play([Scenario(arrivals=((600,),))])
            decodes = await bench.play([Scenario(decodes=(40, 41, 42), steps=6)])
            mixed = await bench.play([Scenario(decodes=(50,), steps=3, arrivals=((100,), (30,)))])
            return bench.facts, chunks, decodes, mixed

    facts, chunks, decodes, mixed = asyncio.run(play())
    assert (facts.max_model_len, facts.token_budget, facts.max_running) == (MAX_LEN, BUDGET, 16)
    assert facts.kv_bytes_per_token == 2 * LAYERS * KV_HEADS * HEAD_SIZE * 4
    assert facts.kv_tokens > 10 * MAX_LEN
    assert [step.prefill for step in chunks[:3]] == [[(256, 0)], [(256, 256)], [(88, 512)]]
    assert sum(step.prefill_tokens for step in decodes if step.sequences == 0 or step.prefill) == 40 + 41 + 42
    assert max(step.sequences for step in decodes) == 3
    together = [step for step in decodes if step.sequences == 3]
    assert all(later.context == earlier.context + 3 for earlier, later in pairwise(together))
    assert [step.prefill for step in mixed if step.kind == "mixed"] == [[(100, 0)], [(30, 0)]]
    assert all(step.seconds > 0 and step.waited_s >= 0 for step in chunks + decodes + mixed)


def test_the_command_measures_and_writes_a_profile(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "tiny.json"
    options = ["--kv-gib", "0.25", "--repeats", "1", "--held-out", "6", "--seconds", "100"]
    monkeypatch.setattr("sys.argv", ["loadtest", "profile", "--model", str(model), "--out", str(out), *options, *FLAGS])
    assert main() == 0
    profile = load_profile(str(out))
    assert profile.token_budget == BUDGET
    assert profile.validation is not None
    assert profile.validation.steps > 0
    assert "| decode |" in capsys.readouterr().out
