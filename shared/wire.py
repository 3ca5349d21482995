"""Every message on the bus, one frozen type each, grouped by who receives it.

MessagePack maps tagged by `type`; every field added after version 1 has a default, so that mixed versions talk.
Token ids are packed little-endian uint32 (`pack_tokens`). Times are durations in seconds: clocks of different
processes are never compared.
"""

import sys
from array import array
from collections.abc import Sequence
from typing import Any

import msgspec

FORMAT = 1
TOKEN_BYTES = 4  # of a packed id


class Message(msgspec.Struct, frozen=True, kw_only=True, tag=True, omit_defaults=True):
    """Base: tagged with its class name."""


class Backlog(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A worker's load, in every reply and beat."""

    running: int = 0
    waiting: int = 0
    queued_tokens: int = 0  # prompt tokens accepted and not yet computed; of a gateway: in its line
    queued_prompts: int = 0  # prompts that those belong to


class Sampling(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What the client asked for, in vLLM's names. None: the model's own default (generation_config), then vLLM's."""

    max_tokens: int
    n: int = 1
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float | None = None
    stop: list[str] = []
    stop_token_ids: list[int] = []
    include_stop_str_in_output: bool = False
    bad_words: list[str] = []
    logit_bias: dict[int, float] = {}
    ignore_eos: bool = False
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None  # alternatives a prompt token; never split, nothing of the prompt may be cached
    skip_special_tokens: bool = True
    structured: dict[str, Any] = {}  # vLLM's StructuredOutputsParams, e.g. {"json": {...}} or {"json_object": True}


# ---- to a decode worker -------------------------------------------------------------------------------------


class DecodeJob(Message, frozen=True):
    """Produce the output. With `prefill` somebody else computes the prompt's blocks: reserve, accept, wait, load."""

    request: str
    attempt: int
    gateway: str  # id; TokenBatch goes to its subject
    tokens: bytes
    sampling: Sampling
    prefill: bool
    timeout_s: float  # for the whole request
    handoff_s: float = 30.0  # how long to wait for the blocks before recomputing
    salt: bytes = b""
    priority: int = 0
    # A resumed stream: packed ids, one entry a choice, with which the output begins; all rows are sent again.
    replay: list[bytes] = []
    # Who computes the prompt, by the gateway's choice: asked by the decode worker as soon as it has reserved.
    prefill_worker: str = ""
    prefill_reply: str = ""  # where its answer goes: straight to the gateway
    holders: dict[str, int] = {}  # for the PrefillJob


class Accepted(Message, frozen=True):
    """The decode worker holds a sequence and all slots of the prompt under `lease`."""

    request: str
    attempt: int
    node: str
    lease: str
    cached_tokens: int = 0  # prompt tokens whose blocks its node already holds; all of them: no prefill is needed
    asked_prefill: bool = False  # it has sent the PrefillJob; an older worker leaves that to the gateway
    backlog: Backlog = Backlog()


# ---- to a prefill worker ------------------------------------------------------------------------------------


class PrefillJob(Message, frozen=True):
    """Compute the prompt's blocks and leave them, committed, where the lease of the decode worker waits."""

    request: str
    attempt: int
    gateway: str
    tokens: bytes
    lease: str
    node: str  # of the decode worker
    timeout_s: float
    salt: bytes = b""
    priority: int = 0
    holders: dict[str, int] = {}  # node -> leading tokens whose KV it holds, by the index: to pull them from


class PrefillDone(Message, frozen=True):
    request: str
    attempt: int
    cached_tokens: int = 0  # not computed: found in the node's store or the engine's cache
    backlog: Backlog = Backlog()


# ---- from any worker, in answer to a job --------------------------------------------------------------------


class Busy(Message, frozen=True):
    """The worker's short queue is full; place the job elsewhere or later."""

    reason: str
    backlog: Backlog = Backlog()


class Failure(Message, frozen=True):
    """A BatonError on its way to whoever asked (shared/errors.py)."""

    code: str
    message: str
    param: str | None = None
    retry_after_s: float | None = None
    backlog: Backlog = Backlog()


# ---- to a gateway -------------------------------------------------------------------------------------------


class TokenBatch(Message, frozen=True):
    """The deltas of one engine step for all of one gateway's requests: columns, one entry a row.

    A row is one delta of one choice. `sequences` count a (request, attempt)'s rows from 0, over all its choices.
    `finish`, `logprobs`, `failures`, `usage` and `prompt_logprobs` are sparse: keyed by row number as a decimal string,
    because MessagePack maps of other readers want string keys.
    """

    worker: str
    requests: list[str]
    attempts: list[int]
    sequences: list[int]
    choices: list[int]
    texts: list[str]
    tokens: list[bytes]  # packed ids of the delta
    finish: dict[str, "Finish"] = {}
    logprobs: dict[str, list["TokenLogprob"]] = {}
    failures: dict[str, Failure] = {}  # ends the request
    usage: dict[str, "DecodeUsage"] = {}  # with the last row of a request
    # In rows of their own before any other, piece by piece; None: the first token has no probability.
    prompt_logprobs: dict[str, list["TokenLogprob | None"]] = {}
    backlog: Backlog = Backlog()


class Finish(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    reason: str  # stop | length
    stop_reason: int | str | None = None  # the stop string or token id that ended it; None for eos


class TokenLogprob(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A sampled token, or one of the prompt: itself, and the most likely ones, best first, itself among them."""

    token: str
    token_id: int
    logprob: float
    top: list["TopLogprob"] = []
    rank: int = 0  # of a prompt token: 1 is the most likely; 0: not told


class TopLogprob(msgspec.Struct, frozen=True, kw_only=True):
    token: str
    token_id: int
    logprob: float


class DecodeUsage(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    completion_tokens: int = 0
    loaded_tokens: int = 0  # prompt tokens whose KV came from the store
    engine_cached_tokens: int = 0  # prompt tokens found in the decode engine's own cache
    recomputed_tokens: int = 0  # promised by the hand-off and computed here after all


# ---- to any worker ------------------------------------------------------------------------------------------


class Cancel(Message, frozen=True):
    """Stop every job of (request, attempt); remembered for 60 s, so that a job behind its cancel is refused."""

    request: str
    attempt: int


class Done(Message, frozen=True):
    """Acknowledges a message that has nothing to return."""


class Ping(Message, frozen=True):
    pass


class Pong(Message, frozen=True):
    id: str


# ---- to a node's kv_transfer (subject {c}.kv.{node}) --------------------------------------------------------


class KvLookup(Message, frozen=True):
    """How long a prefix of these block keys does the node hold?"""

    keys: list[bytes]


class KvHeld(Message, frozen=True):
    node: str
    blocks: int


class KvFetch(Message, frozen=True):
    """Push what you hold of these keys to that node's lease, which has set slots aside for them; KvHeld says how many.

    As many as lead the list are offered; the other store takes those that it lacks.
    """

    node: str
    lease: str
    keys: list[bytes]
    traceparent: str = ""


class KvRelease(Message, frozen=True):
    """Give a lease back on behalf of its owner; unknown leases are fine."""

    lease: str


class KvStatsRequest(Message, frozen=True):
    pass


class KvStats(Message, frozen=True):
    node: str
    slots: dict[str, int]  # state -> count; adds up to the arena
    leases: int
    slot_bytes: int
    fingerprint: str = ""


# ---- to everybody -------------------------------------------------------------------------------------------


class Heartbeat(Message, frozen=True):
    """Every 200 ms on {c}.beat.{role}.{id}."""

    role: str  # gateway | prefill | decode | kv: the pool it was started in
    id: str
    incarnation: str  # new with every process start
    state: str = "ready"  # starting | ready | draining
    takes: list[str] = []  # prefill and/or decode, now
    node: str = ""
    engine: str = ""
    model: str = ""  # served name
    max_model_len: int = 0
    block_size: int = 0
    fingerprint: str = ""
    backlog: Backlog = Backlog()
    max_running: int = 0  # sequences the engine runs at once
    max_waiting: int = 0  # jobs accepted beyond that
    kv_usage: float = 0.0  # share of the engine's own KV blocks in use
    kv_tokens: int = 0  # how many the engine's own KV cache holds; 0: not told
    kv_promised: int = 0  # tokens of prompts that are accepted and not in it yet
    # Measured, and 0 while not known. A prompt takes prompt_s + tokens / prefill_tokens_per_s; from its blocks to the
    # first token it takes load_s + tokens * load_token_s; a step takes decode_step_s now, and decode_sequence_s more
    # with every further sequence.
    prefill_tokens_per_s: float = 0.0
    prefill_prompt_s: float = 0.0
    load_s: float = 0.0
    load_token_s: float = 0.0
    decode_step_s: float = 0.0
    decode_sequence_s: float = 0.0
    forces: bool = False  # takes DecodeJobs with `replay`
    metrics_url: str = ""
    version: str = ""
    format: int = FORMAT
    lost: list[str] = []  # from kv: workers whose socket has just closed
    slots: dict[str, int] = {}  # from kv
    peer_address: str = ""  # from kv: where other nodes' stores reach it; empty: they do not
    peer_bytes_per_s: float = 0.0  # from kv: how fast blocks have come from other nodes; 0: not known
    block_bytes: int = 0  # from kv: of all ranks
    moved_bytes: dict[str, int] = {}  # from kv, since its start, by path


class Traffic(Message, frozen=True):
    """Once a second on {c}.traffic.{gateway}: what a gateway has counted since its start, so none needs to arrive."""

    gateway: str
    incarnation: str
    up_s: float = 0.0  # since its start
    counts: dict[str, dict[str, float]] = {}  # family -> label -> count (a gateway's dashboard/counts.py)


# ---- traces and metrics -------------------------------------------------------------------------------------

Attribute = str | bool | int | float | list[str]


class SpanEvent(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    name: str
    unix_ns: int
    attributes: dict[str, Attribute] = {}


class SpanRecord(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A finished span. Ids are hexadecimal; `root` is the span id of its request's first span."""

    name: str
    trace_id: str
    span_id: str
    parent_id: str = ""
    root: str
    service: str
    instance: str
    start_unix_ns: int  # by the clock of the machine where it was made
    duration_ns: int
    kind: int = 0  # OpenTelemetry's SpanKind
    attributes: dict[str, Attribute] = {}
    events: list[SpanEvent] = []
    status: str = "ok"  # ok | error
    error: str = ""  # a code or an exception's type


class Spans(Message, frozen=True):
    """From any service to the gateway whose requests they belong to, on {c}.spans.{gateway}."""

    instance: str
    spans: list[SpanRecord]
    dropped: int = 0  # since the last one: there were too many


class SpansWanted(Message, frozen=True):
    """From a gateway to everybody, on {c}.wanted: these requests turned out to be worth keeping."""

    gateway: str
    roots: list[str]


class TracesAsked(Message, frozen=True):
    """From one gateway to another, on {c}.trace.{gateway}."""

    order: str = "last"  # last | slowest
    limit: int = 20


class TraceAsked(Message, frozen=True):
    id: str  # of a trace or a request


class TraceSummary(msgspec.Struct, frozen=True, kw_only=True):
    trace_id: str
    request_id: str
    start_unix_ms: int
    duration_ms: float
    ttft_ms: float | None  # None: there was no token
    outcome: str
    tier: str
    tenant: str
    path: str | None
    spans: int
    kept: str = "sampled"  # sampled | error | slow | retried
    gateway: str = ""


class MetricsAsked(Message, frozen=True):
    """To any service, on {c}.metrics.{id}."""


class MetricsText(Message, frozen=True):
    text: str  # Prometheus's, with labels `service` and `instance`


class TraceList(Message, frozen=True):
    traces: list[TraceSummary]


class TraceFound(Message, frozen=True):
    """`summary` is None when it is not here."""

    summary: TraceSummary | None = None
    receipt: dict[str, Any] = {}
    spans: list[SpanRecord] = []


Reply = Accepted | PrefillDone | Busy | Failure | Done | Pong | KvHeld | KvStats | TraceList | TraceFound | MetricsText
Request = (
    DecodeJob
    | PrefillJob
    | Cancel
    | Ping
    | KvLookup
    | KvFetch
    | KvRelease
    | KvStatsRequest
    | TracesAsked
    | TraceAsked
    | MetricsAsked
)
Broadcast = TokenBatch | Heartbeat | Traffic | Spans | SpansWanted
AnyMessage = Reply | Request | Broadcast

_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[AnyMessage] = msgspec.msgpack.Decoder(AnyMessage)


def encode(message: Message) -> bytes:
    return _encoder.encode(message)


def decode(data: bytes) -> AnyMessage:
    """Raises msgspec.ValidationError or DecodeError for bytes that are no message of this version or an older one."""
    return _decoder.decode(data)


def prefill_job(job: DecodeJob, *, lease: str, node: str) -> PrefillJob:
    """What a decode worker asks on its gateway's behalf, when it has reserved under `lease`."""
    return PrefillJob(
        request=job.request,
        attempt=job.attempt,
        gateway=job.gateway,
        tokens=job.tokens,
        lease=lease,
        node=node,
        timeout_s=job.timeout_s,
        salt=job.salt,
        priority=job.priority,
        holders=job.holders,
    )


def pack_tokens(ids: Sequence[int]) -> bytes:
    """Token ids as packed little-endian uint32."""
    if len(ids) == 1:  # of most deltas
        return ids[0].to_bytes(TOKEN_BYTES, "little")
    packed = array("I", ids)
    if sys.byteorder == "big":
        packed.byteswap()
    return packed.tobytes()


def unpack_tokens(data: bytes) -> list[int]:
    """The inverse of `pack_tokens`; raises ValueError unless the length is a multiple of 4."""
    packed = array("I")
    packed.frombytes(data)
    if sys.byteorder == "big":
        packed.byteswap()
    return packed.tolist()
