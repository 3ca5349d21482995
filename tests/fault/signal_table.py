"""What clients see when a process of a real cluster gets a signal: `python -m tests.fault.signal_table`, by hand.

For each process, idle and under load, each of SIGKILL, SIGSTOP for 5 s and SIGTERM. Under load one stream runs and one
long prompt is in the middle of its hand-off. A next request follows the signal at once, and again until it succeeds.
Every answer is compared with unsplit vLLM's greedy tokens. The output is a Markdown table and, under it, what is a
defect: wrong text, no end within a minute, something still held afterwards. Exit code 1 when there is one.
"""

import argparse
import asyncio
import dataclasses
import os
import signal
import sys
import tempfile
import time
from pathlib import Path

import httpx
import openai

from tests.support.cluster import Cluster, running_cluster
from tests.support.disturbed import holds, until, whole_again
from tests.support.exact import ENGINE, MAX_LEN, MODEL, arguments, engine_options, greedy, prompt_of, tokens_of
from tests.support.reference import run_reference
from tests.support.sensitive_model import make_sensitive_model

PROCESSES = ("gateway-0", "prefill-0", "decode-0", "kv-0", "nats-0", "redis-0")
SIGNALS = ("SIGKILL", "SIGSTOP 5 s", "SIGTERM")
STOPPED_S = 5.0
HANG_S = 60.0
BACK_S = 120.0
RETRY_S = 0.1
SMALL_STEPS = {"max_num_batched_tokens": 64}  # a prompt takes thirty steps: there is a middle
HEADER = "| process | when | signal | running stream | prompt in hand-off | next request | served again | clean |"


@dataclasses.dataclass(frozen=True)
class Ask:
    """A request and, once known, the greedy tokens that it must give."""

    length: int
    seed: int
    tokens: int

    @property
    def prompt(self) -> str:
        return prompt_of(self.length, self.seed)


STREAM = Ask(100, 0, 600)


@dataclasses.dataclass(frozen=True)
class Case:
    process: str
    under_load: bool
    signal: str
    number: int

    @property
    def hand_off(self) -> Ask:
        return Ask(1900, 1000 + self.number, 8)

    @property
    def following(self) -> Ask:
        return Ask(80, 2000 + self.number, 8)


@dataclasses.dataclass
class Seen:
    """By one client."""

    outcome: str = "hang"
    took_s: float = 0.0
    longest_gap_s: float = 0.0
    ended_at: float = 0.0

    def __str__(self) -> str:
        pause = f", longest pause {self.longest_gap_s:.1f} s" if self.longest_gap_s > 1 else ""
        return f"{self.outcome} after {self.took_s:.1f} s{pause}"

    @property
    def is_defect(self) -> bool:
        return self.outcome in ("WRONG", "HANG")


class Client:
    """Streams requests and says what became of them."""

    def __init__(self, cluster: Cluster, expected: dict[Ask, list[int]]) -> None:
        self._openai = cluster.async_client()
        self._expected = expected

    async def send(self, ask: Ask, begun: asyncio.Event | None = None) -> Seen:
        """`begun` is set with the fifth token. The gaps are counted from there."""
        seen, started, tokens = Seen(), time.monotonic(), []
        last = started
        try:
            async with asyncio.timeout(HANG_S):
                parameters = arguments(ask.prompt, greedy(ask.tokens))
                async for chunk in await self._openai.completions.create(stream=True, **parameters):
                    for choice in chunk.choices:
                        tokens += (choice.model_extra or {}).get("token_ids") or []
                    now = time.monotonic()
                    if len(tokens) > 1:
                        seen.longest_gap_s = max(seen.longest_gap_s, now - last)
                    last = now
                    if begun is not None and len(tokens) >= 5:
                        begun.set()
            seen.outcome = "exact" if tokens == self._expected[ask] else "WRONG"
        except TimeoutError:
            seen.outcome = "HANG"
        except (openai.APIError, httpx.HTTPError) as error:
            seen.outcome = said_by(error)
            if tokens != self._expected[ask][: len(tokens)]:
                seen.outcome = "WRONG"
        seen.ended_at = time.monotonic()
        seen.took_s = seen.ended_at - started
        return seen

    async def until_served(self, ask: Ask) -> tuple[Seen, float]:
        """The first answer, and when one was exact."""
        first, until_s = await self.send(ask), time.monotonic() + BACK_S
        seen = first
        while seen.outcome != "exact":
            if time.monotonic() > until_s:
                return first, float("inf")
            await asyncio.sleep(RETRY_S)
            seen = await self.send(ask)
        return first, seen.ended_at


def said_by(error: Exception) -> str:
    if isinstance(error, openai.APIStatusError):
        return f"{error.status_code} `{error.code}`"
    if isinstance(error, openai.APIConnectionError):
        return "connection refused" if isinstance(error.__cause__, httpx.ConnectError) else "connection closed"
    if isinstance(error, openai.APIError):
        return f"error event `{error.code}`"
    return "connection closed"


async def send_signal(pid: int, name: str) -> None:
    number = signal.Signals[name.split(maxsplit=1)[0]]
    os.kill(pid, number)
    if number is signal.SIGSTOP:
        await asyncio.sleep(STOPPED_S)
        os.kill(pid, signal.SIGCONT)


async def run_case(cluster: Cluster, client: Client, case: Case) -> tuple[str, list[str]]:
    """A row of the table, and what is wrong with it."""
    pid = await asyncio.to_thread(cluster.pid, case.process)
    running: list[asyncio.Task[Seen]] = []
    if case.under_load:
        begun = asyncio.Event()
        running.append(asyncio.create_task(client.send(STREAM, begun)))
        await asyncio.wait_for(begun.wait(), HANG_S)
        written = await asyncio.to_thread(cluster.meter, "kv", "baton_kv_written_bytes_total")
        before = await asyncio.to_thread(written)
        running.append(asyncio.create_task(client.send(case.hand_off)))
        await asyncio.to_thread(until, lambda: written() > before, "prefill has not begun")
    struck = time.monotonic()
    signalling = asyncio.create_task(send_signal(pid, case.signal))
    first, served_at = await client.until_served(case.following)
    seen = [*(await asyncio.gather(*running)), first]
    await signalling
    clean = await asyncio.to_thread(clean_after, cluster)
    loaded = [str(one) for one in seen[:-1]] or ["-", "-"]
    cells = [
        case.process,
        "under load" if case.under_load else "idle",
        case.signal,
        *loaded,
        str(first),
        f"{served_at - struck:.1f} s",
        clean,
    ]
    wrong = [f"{case}: {one}" for one in seen if one.is_defect]
    wrong += [f"{case}: not served again"] if served_at == float("inf") else []
    wrong += [f"{case}: {clean}"] if clean != "yes" else []
    return f"| {' | '.join(cells)} |", wrong


def clean_after(cluster: Cluster) -> str:
    """Once everything is back: is anything still held?"""
    try:
        until(lambda: whole_again(cluster), "not whole again", BACK_S)
        until(lambda: not holds(cluster), "held", HANG_S)
    except AssertionError as error:
        return f"{error}: {holds(cluster)}"
    return "yes"


def expected_answers(folder: Path, model: Path, asks: list[Ask]) -> dict[Ask, list[int]]:
    engine = {**ENGINE, "model": str(model), "kv_cache_memory_bytes": 1 << 28}
    batches = [[{"tokens": tokens_of(ask.prompt), "params": greedy(ask.tokens)}] for ask in asks]
    results = run_reference(folder, engine, batches)
    return {ask: answers[0][0]["token_ids"] for ask, answers in zip(asks, results, strict=True)}


async def run_all(cluster: Cluster, client: Client, cases: list[Case]) -> list[str]:
    defects = []
    for case in cases:
        row, wrong = await run_case(cluster, client, case)
        print(row, flush=True)
        defects += wrong
    return defects


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--process", nargs="*", choices=PROCESSES, default=PROCESSES)
    chosen = parser.parse_args().process
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # the cluster is ended on the way out
    kinds = [(name, load, what) for name in chosen for load in (False, True) for what in SIGNALS]
    cases = [Case(name, load, what, number) for number, (name, load, what) in enumerate(kinds)]
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        model = make_sensitive_model(folder / MODEL, max_model_len=MAX_LEN)
        asks = [STREAM, *(case.following for case in cases), *(case.hand_off for case in cases if case.under_load)]
        expected = expected_answers(folder, model, asks)
        options = (
            f"--model={model}",
            f"--served-model-name={MODEL}",
            "--arrangement=split",
            "--kv-gib=0.25",
            "--arena-gib=0.25",
            *engine_options(enable_prefix_caching=False, **SMALL_STEPS),
        )
        with running_cluster(folder / "home", *options) as cluster:
            print(HEADER, "|---" * 8 + "|", sep="\n", flush=True)
            defects = asyncio.run(run_all(cluster, Client(cluster, expected), cases))
            for name in sorted({case.process for case in cases} if defects else ()):
                print(f"\n--- {name}\n{cluster.log(name)[-3000:]}", file=sys.stderr)
    print(*(f"\nDefect: {defect}" for defect in defects), sep="")
    return 1 if defects else 0


if __name__ == "__main__":
    sys.exit(main())
