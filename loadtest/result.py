"""result.json: what a run of the load generator found, and everything needed to judge it. Times in seconds."""

from pathlib import Path
from typing import Any

import msgspec

from loadtest.slo import Slo, Spread

SCHEMA = 1
FILE = "result.json"
Column = list[float | None]
Counts = list[int | None]


class Git(msgspec.Struct, frozen=True, kw_only=True):
    """None where the program does not lie in a repository."""

    revision: str | None
    dirty: bool | None


class Machine(msgspec.Struct, frozen=True, kw_only=True):
    cpu: str
    cores: int
    memory_gib: float
    platform: str
    python: str


class Target(msgspec.Struct, frozen=True, kw_only=True):
    """What was measured. `engine`: vllm, sim, or unknown; `profile`: of the sim engine; `workers`: by role."""

    url: str
    model: str
    engine: str = "unknown"
    profile: str = ""
    arrangement: str = "unknown"
    workers: dict[str, int] = {}


class Requests(msgspec.Struct, frozen=True, kw_only=True):
    """Columns of equal length: one entry per offered request, by intended time; None where it is not known.

    `intended_s`, `sent_s`, `end_s` count from the run's start, `ttft_s` from the intended time. `retries` are the
    server's own, `attempts` the client's. `stages`: parts of the time to the first token, as the server saw them.
    `sent_s` is the first attempt's, `last_sent_s` the last one's. `steady`: enough gaps within the SLO. The predicted
    and the actual TTFT are those of the server's receipt. Columns that may be None are not in every file.
    """

    intended_s: list[float]
    sent_s: Column
    ttft_s: Column
    end_s: Column
    prompt_tokens: Counts
    output_tokens: Counts
    cached_tokens: Counts
    outcome: list[str]
    status: Counts
    code: list[str]
    attempts: list[int]
    path: list[str]
    retries: Counts
    itl_p50_s: Column
    itl_p99_s: Column
    itl_max_s: Column
    good: list[bool]
    stages: dict[str, Column] = {}
    last_sent_s: Column | None = None
    steady: list[bool] | None = None
    predicted_ttft_s: Column | None = None
    actual_ttft_s: Column | None = None


class Tries(msgspec.Struct, frozen=True, kw_only=True):
    """Columns: one entry per attempt that was refused or that failed, by request. `request`: its place there.

    `number`: 0 for a request's first attempt. `retry_after_s`: what the server asked for; `queued_s`: how long it had
    let the request wait in line, where it says so.
    """

    request: list[int]
    number: list[int]
    sent_s: list[float]
    end_s: list[float]
    outcome: list[str]
    status: Counts
    code: list[str]
    retry_after_s: Column
    queued_s: Column


class Timeline(msgspec.Struct, frozen=True, kw_only=True):
    """Columns of buckets that begin at `t_s`; what happened is counted where it happened."""

    bucket_s: float
    t_s: list[float]
    offered: list[int]
    completed: list[int]
    good: list[int]
    shed: list[int]
    failed: list[int]
    tokens: list[int]
    ttft_p50_s: Column
    ttft_p90_s: Column
    ttft_p99_s: Column
    itl_p50_s: Column
    itl_p99_s: Column


class Levels(msgspec.Struct, frozen=True, kw_only=True):
    """Gauges of the cluster, sampled; None where one did not answer."""

    t_s: list[float] = []
    series: dict[str, Column] = {}


class Summary(msgspec.Struct, frozen=True, kw_only=True):
    """`good_share` is of all that were offered: what was refused or failed is a miss."""

    offered: int
    completed: int
    good: int
    goodput_per_s: float
    good_share: float | None
    requests_per_s: float
    output_tokens_per_s: float
    ttft_s: Spread
    itl_s: Spread
    e2e_s: Spread
    outcomes: dict[str, int]
    shed: dict[str, int]
    errors: dict[str, int]
    cached_tokens: int
    prompt_tokens: int
    output_tokens: int


class Lateness(msgspec.Struct, frozen=True, kw_only=True):
    """Sent minus intended: the generator's own error."""

    p50: float | None
    p99: float | None
    max: float | None


class Client(msgspec.Struct, frozen=True, kw_only=True):
    """`cpu_share`: of one core, all processes. `rejected_by_client`: found no socket free."""

    processes: int
    cpu_share: float
    lateness_s: Lateness
    rejected_by_client: int


class Result(msgspec.Struct, frozen=True, kw_only=True):
    schema: int = SCHEMA
    name: str
    started_at: str  # ISO 8601, UTC
    duration_s: float
    git: Git
    machine: Machine
    target: Target
    settings: dict[str, Any]
    slo: Slo
    summary: Summary
    requests: Requests
    timeline: Timeline
    levels: Levels
    client: Client
    tries: Tries | None = None


def write(result: Result, folder: Path) -> Path:
    """Raises OSError. A reader never meets half a file."""
    path = folder / FILE
    new = path.with_suffix(".tmp")
    new.write_bytes(msgspec.json.encode(result))
    new.replace(path)
    return path
