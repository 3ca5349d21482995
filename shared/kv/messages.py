"""The local protocol between a node's kv_transfer and the processes on its node: frames over a unix socket.

A frame is a little-endian uint32 length and one MessagePack `Call`, `Answer` or `Push`. A process speaks over one or
more connections that share a `session`; the closing of them all is the crash signal that frees what it held.

Kinds of connection
  host   the worker's asyncio process: reserves, waits, releases; owns leases
  rank   one engine rank's command channel: commits, keeps and reports loads, one call at a time
  watch  one engine rank's second channel: the store pushes `Revoke`, the rank calls `Revoked` when no copy under
         that lease runs any more, and never starts one again
"""

import msgspec


class Body(msgspec.Struct, frozen=True, kw_only=True, tag=True, omit_defaults=True):
    """Base of all calls, answers and pushes."""


class Geometry(msgspec.Struct, frozen=True, kw_only=True):
    """What an engine's blocks look like. All ranks of all engines on a node must agree on it."""

    fingerprint: str  # model, weights, dtype, layout, parallel shape … : hex digest, without the rank
    block_size: int  # tokens
    slot_bytes: int  # one block of one rank
    ranks: int  # engine ranks that must write a block before it is committed
    max_model_len: int  # tokens


# ---- calls to the store -------------------------------------------------------------------------------------


class Attach(Body, frozen=True):
    """First call on every connection. The first rank's geometry cuts the arena into slots."""

    session: str
    kind: str  # host | rank | watch
    worker: str  # id on the bus, for `Heartbeat.lost`
    rank: int = 0
    geometry: Geometry | None = None  # rank connections only; others get the store's


class Reserve(Body, frozen=True):
    """All blocks of a prompt under one new lease, or none.

    For each key: committed already -> pinned. Else with `write`: a private slot to write into; if `take_from` names
    a lease of this store that has a slot set aside for that key and nobody writes it, that slot is taken over.
    Else without `write` (a decode worker waiting for somebody's prefill): a slot set aside, so that the writer
    cannot find the arena full; it is given up when the key is committed by anybody, and that slot is pinned.
    """

    lease: str  # unique for ever, chosen by the caller
    request: str
    keys: list[bytes]
    write: bool
    ttl_s: float  # after it the store revokes
    wait_s: float = 0.0  # how long to queue for room before KvMemory
    take_from: str = ""
    traceparent: str = ""
    # With `write`: the blocks are for this lease of another node's store. They are pushed there as they are committed,
    # and a Wait is complete only when that store has taken the offer.
    push_node: str = ""
    push_lease: str = ""


class Keep(Body, frozen=True):
    """Slots for the blocks of a request that has ended, or KvMemory; never waits, nor takes room that others wait for.

    Every rank asks, with the same lease and keys, and gets the same answer. The lease ends when all blocks are
    committed, or soon.
    """

    lease: str  # unique for ever
    request: str
    keys: list[bytes]


class Commit(Body, frozen=True):
    """This rank has written these blocks of the lease. When the last rank has, each key is bound to its slot."""

    lease: str
    blocks: list[int]  # positions in the lease's key list
    checksums: list[int]  # xxh3_64 of each slot's bytes
    started_ns: int = 0  # wall clock when the copies began: the end of the step that computed the blocks


class Wait(Body, frozen=True):
    """Answer when every block of the lease is committed (and pinned), or at the timeout with what there is."""

    lease: str
    timeout_s: float


class Release(Body, frozen=True):
    """Unpin, and free what was never committed (after `Revoke` where a rank may still write). Idempotent."""

    lease: str


class Loaded(Body, frozen=True):
    """A rank has copied blocks out of the arena into its pages, for metrics and the `kv.load` span."""

    lease: str
    blocks: int
    failed: int
    started_ns: int  # wall clock
    ended_ns: int


class Revoked(Body, frozen=True):
    lease: str


# ---- answers ------------------------------------------------------------------------------------------------


class Attached(Body, frozen=True):
    arena: str  # a new name with every start of the store; leases and slots of another arena mean nothing
    path: str
    size_bytes: int
    words_offset: int  # uint64 per slot: generation << 1 | committed, written by the store alone
    slots_offset: int
    slot_bytes: int
    slots: int
    node: str
    geometry: Geometry


class Reserved(Body, frozen=True):
    """Per key of the call: its slot, the word that a reader or writer must find there, and whether it is committed.

    A block of `ranks` ranks has consecutive slots: rank r's is `slots[i] + r`.
    """

    slots: list[int]  # -1: set aside without `write` and not needed yet by anybody else
    words: list[int]
    committed: list[bool]


class Ready(Body, frozen=True):
    """Like Reserved, at the end of a Wait; `complete` when all are committed."""

    slots: list[int]
    words: list[int]
    committed: list[bool]
    complete: bool


class Ok(Body, frozen=True):
    pass


class Refusal(Body, frozen=True):
    """A BatonError (shared/errors.py) on the local socket."""

    code: str
    message: str


# ---- pushes -------------------------------------------------------------------------------------------------


class Revoke(Body, frozen=True):
    lease: str


class Unhealthy(Body, frozen=True):
    """To a host whose rank did not answer a Revoke in 5 s: exit, so that the slots can be given back."""

    reason: str


AnyCall = Attach | Reserve | Keep | Commit | Wait | Release | Loaded | Revoked
AnyAnswer = Attached | Reserved | Ready | Ok | Refusal
AnyPush = Revoke | Unhealthy


class Call(msgspec.Struct, frozen=True, array_like=True):
    id: int
    body: AnyCall


class Answer(msgspec.Struct, frozen=True, array_like=True):
    """id 0 marks a push."""

    id: int
    body: AnyAnswer | AnyPush


HEADER_BYTES = 4
MAX_FRAME_BYTES = 8 * 1024 * 1024


def encode(frame: Call | Answer) -> bytes:
    """Length-prefixed bytes."""
    body = _encoder.encode(frame)
    return len(body).to_bytes(HEADER_BYTES, "little") + body


_encoder = msgspec.msgpack.Encoder()
decode_call = msgspec.msgpack.Decoder(Call).decode
decode_answer = msgspec.msgpack.Decoder(Answer).decode
