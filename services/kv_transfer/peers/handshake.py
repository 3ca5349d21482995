"""Who is there: both stores show that they know the cluster's secret, before anything else is said.

Each side proves it by an HMAC over everything both have said, fresh random numbers of both included, so nothing that
was overheard can be used again, by anybody; the proofs of the two sides differ, so none can be sent back. What is
exchanged afterwards is bound to this handshake by the seeds of its frames. Cluster and format must be equal.
"""

import hashlib
import hmac
import secrets
import struct
from typing import TypeVar

import msgspec

from services.kv_transfer.peers.channel import Channel
from services.kv_transfer.peers.frames import (
    AUTHENTICATION,
    CLUSTER,
    FORMAT,
    MALFORMED,
    OVERSIZED,
    REASONS,
    VERSION,
    BadFrame,
)

LENGTH = struct.Struct("<I")
MAX_BYTES = 4096
NONCE_BYTES = 32


class Identity(msgspec.Struct, frozen=True, kw_only=True):
    cluster: str
    node: str
    secret: str
    format: int = FORMAT


class Seeds(msgspec.Struct, frozen=True, kw_only=True):
    """Of the frames in each direction."""

    source: int
    target: int


class _Message(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    pass


class Hello(_Message, frozen=True):
    format: int
    cluster: str
    node: str
    nonce: bytes


class Challenge(_Message, frozen=True):
    format: int
    cluster: str
    node: str
    nonce: bytes
    proof: bytes


class HandshakeAnswer(_Message, frozen=True):
    proof: bytes


class Welcome(_Message, frozen=True):
    pass


class Denied(_Message, frozen=True):
    reason: str


Message = Hello | Challenge | HandshakeAnswer | Welcome | Denied
M = TypeVar("M", Hello, Challenge, HandshakeAnswer, Welcome)
_decoder: msgspec.msgpack.Decoder[Message] = msgspec.msgpack.Decoder(Message)


def greet(channel: Channel, own: Identity, node: str) -> Seeds:
    """As the source, which expects this node there. Raises BadFrame, EOFError or OSError."""
    hello = Hello(format=own.format, cluster=own.cluster, node=own.node, nonce=secrets.token_bytes(NONCE_BYTES))
    _send(channel, hello)
    challenge = _receive(channel, Challenge)
    _check(own, challenge)
    if challenge.node != node:
        raise BadFrame(CLUSTER)
    said = _said(hello, challenge)
    if not hmac.compare_digest(challenge.proof, _proof(own, b"target", said)):
        raise BadFrame(AUTHENTICATION)
    _send(channel, HandshakeAnswer(proof=_proof(own, b"source", said)))
    _receive(channel, Welcome)
    return _seeds(own, said)


def receive(channel: Channel, own: Identity) -> tuple[str, Seeds]:
    """As the target: the peer's node. Raises BadFrame, EOFError or OSError; the peer is told why."""
    try:
        return _receive_peer(channel, own)
    except BadFrame as bad:
        _send(channel, Denied(reason=bad.reason))
        raise


def _receive_peer(channel: Channel, own: Identity) -> tuple[str, Seeds]:
    hello = _receive(channel, Hello)
    _check(own, hello)
    nonce = secrets.token_bytes(NONCE_BYTES)
    bare = Challenge(format=own.format, cluster=own.cluster, node=own.node, nonce=nonce, proof=b"")
    said = _said(hello, bare)
    _send(channel, msgspec.structs.replace(bare, proof=_proof(own, b"target", said)))
    answer = _receive(channel, HandshakeAnswer)
    if not hmac.compare_digest(answer.proof, _proof(own, b"source", said)):
        raise BadFrame(AUTHENTICATION)
    _send(channel, Welcome())
    return hello.node, _seeds(own, said)


def _check(own: Identity, other: Hello | Challenge) -> None:
    if other.format != own.format:
        raise BadFrame(VERSION)
    if other.cluster != own.cluster:
        raise BadFrame(CLUSTER)
    if len(other.nonce) != NONCE_BYTES:
        raise BadFrame(MALFORMED)


def _said(hello: Hello, challenge: Challenge) -> bytes:
    return msgspec.msgpack.encode((hello, msgspec.structs.replace(challenge, proof=b"")))


def _proof(own: Identity, side: bytes, said: bytes) -> bytes:
    return hmac.digest(own.secret.encode(), side + b"\0" + said, hashlib.sha256)


def _seeds(own: Identity, said: bytes) -> Seeds:
    source, target = struct.unpack("<QQ", _proof(own, b"seeds", said)[:16])
    return Seeds(source=source, target=target)


def _send(channel: Channel, message: Message) -> None:
    data = msgspec.msgpack.encode(message)
    channel.send(LENGTH.pack(len(data)) + data)


def _receive(channel: Channel, expect: type[M]) -> M:
    length = bytearray(LENGTH.size)
    channel.receive(length, fresh=True)
    (size,) = LENGTH.unpack(length)
    if size > MAX_BYTES:
        raise BadFrame(OVERSIZED)
    body = bytearray(size)
    channel.receive(body)
    try:
        message = _decoder.decode(body)
    except msgspec.DecodeError as error:
        raise BadFrame(MALFORMED) from error
    if isinstance(message, Denied):
        raise BadFrame(message.reason if message.reason in REASONS else MALFORMED)
    if not isinstance(message, expect):
        raise BadFrame(MALFORMED)
    return message
