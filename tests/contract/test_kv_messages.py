"""The local protocol as bytes: golden frames, read back by the independent `msgpack` package."""

from typing import Any

import msgpack
import msgspec
import pytest

from shared.kv import messages as m

GEOMETRY = m.Geometry(fingerprint="abc", block_size=16, slot_bytes=4096, ranks=2, max_model_len=64)
KEY = bytes(range(16))

FRAMES: dict[str, m.Call | m.Answer] = {
    "attach": m.Call(1, m.Attach(session="s", kind="rank", worker="w-0", rank=1, geometry=GEOMETRY)),
    "attach host": m.Call(1, m.Attach(session="s", kind="host", worker="w-0")),
    "reserve": m.Call(
        2,
        m.Reserve(
            lease="l", request="r", keys=[KEY], write=True, ttl_s=2.5, wait_s=1.0, take_from="d", traceparent="00-1"
        ),
    ),
    "keep": m.Call(9, m.Keep(lease="l", request="r", keys=[KEY])),
    "commit": m.Call(3, m.Commit(lease="l", blocks=[0], checksums=[2**64 - 1])),
    "wait": m.Call(4, m.Wait(lease="l", timeout_s=0.5)),
    "release": m.Call(5, m.Release(lease="l")),
    "loaded": m.Call(6, m.Loaded(lease="l", blocks=3, failed=1, started_ns=10, ended_ns=20)),
    "revoked": m.Call(7, m.Revoked(lease="l")),
    "attached": m.Answer(
        1,
        m.Attached(
            arena="a",
            path="/dev/shm/a.arena",
            size_bytes=1 << 31,
            words_offset=0,
            slots_offset=4096,
            slot_bytes=4096,
            slots=8,
            node="node-0",
            geometry=GEOMETRY,
        ),
    ),
    "reserved": m.Answer(2, m.Reserved(slots=[-1, 4], words=[0, 3], committed=[False, True])),
    "ready": m.Answer(4, m.Ready(slots=[4], words=[3], committed=[True], complete=True)),
    "ok": m.Answer(5, m.Ok()),
    "refusal": m.Answer(5, m.Refusal(code="kv_memory", message="full")),
    "revoke": m.Answer(0, m.Revoke(lease="l")),
    "unhealthy": m.Answer(0, m.Unhealthy(reason="x")),
}

GOLDEN: dict[str, str] = {
    "attach": "7e000000920186a474797065a6417474616368a773657373696f6ea173a46b696e64a472616e6ba6776f726b6572a3772d30a472616e6b01a867656f6d6574727985ab66696e6765727072696e74a3616263aa626c6f636b5f73697a6510aa736c6f745f6279746573cd1000a572616e6b7302ad6d61785f6d6f64656c5f6c656e40",
    "attach host": "2e000000920184a474797065a6417474616368a773657373696f6ea173a46b696e64a4686f7374a6776f726b6572a3772d30",
    "reserve": "7d000000920289a474797065a752657365727665a56c65617365a16ca772657175657374a172a46b65797391c410000102030405060708090a0b0c0d0e0fa57772697465c3a574746c5f73cb4004000000000000a6776169745f73cb3ff0000000000000a974616b655f66726f6da164ab7472616365706172656e74a430302d31",
    "keep": "37000000920984a474797065a44b656570a56c65617365a16ca772657175657374a172a46b65797391c410000102030405060708090a0b0c0d0e0f",
    "commit": "34000000920384a474797065a6436f6d6d6974a56c65617365a16ca6626c6f636b739100a9636865636b73756d7391cfffffffffffffffff",
    "wait": "28000000920483a474797065a457616974a56c65617365a16ca974696d656f75745f73cb3fe0000000000000",
    "release": "18000000920582a474797065a752656c65617365a56c65617365a16c",
    "loaded": "3d000000920686a474797065a64c6f61646564a56c65617365a16ca6626c6f636b7303a66661696c656401aa737461727465645f6e730aa8656e6465645f6e7314",
    "revoked": "18000000920782a474797065a75265766f6b6564a56c65617365a16c",
    "attached": "c800000092018aa474797065a84174746163686564a56172656e61a161a470617468b02f6465762f73686d2f612e6172656e61aa73697a655f6279746573ce80000000ac776f7264735f6f666673657400ac736c6f74735f6f6666736574cd1000aa736c6f745f6279746573cd1000a5736c6f747308a46e6f6465a66e6f64652d30a867656f6d6574727985ab66696e6765727072696e74a3616263aa626c6f636b5f73697a6510aa736c6f745f6279746573cd1000a572616e6b7302ad6d61785f6d6f64656c5f6c656e40",
    "reserved": "30000000920284a474797065a85265736572766564a5736c6f747392ff04a5776f726473920003a9636f6d6d697474656492c2c3",
    "ready": "34000000920485a474797065a55265616479a5736c6f74739104a5776f7264739103a9636f6d6d697474656491c3a8636f6d706c657465c3",
    "ok": "0b000000920581a474797065a24f6b",
    "refusal": "2c000000920583a474797065a75265667573616ca4636f6465a96b765f6d656d6f7279a76d657373616765a466756c6c",
    "revoke": "17000000920082a474797065a65265766f6b65a56c65617365a16c",
    "unhealthy": "1b000000920082a474797065a9556e6865616c746879a6726561736f6ea178",
}


def plain(value: Any) -> Any:
    """A message as another language's MessagePack sees it."""
    return msgspec.to_builtins(value, builtin_types=(bytes,))


@pytest.mark.parametrize("name", FRAMES)
def test_a_frame_is_these_bytes(name: str) -> None:
    assert m.encode(FRAMES[name]).hex() == GOLDEN[name]


@pytest.mark.parametrize("name", FRAMES)
def test_another_reader_sees_id_type_and_fields(name: str) -> None:
    frame, data = FRAMES[name], bytes.fromhex(GOLDEN[name])
    size, body = int.from_bytes(data[: m.HEADER_BYTES], "little"), data[m.HEADER_BYTES :]
    assert size == len(body)
    read = msgpack.unpackb(body)
    assert read == plain(frame)
    assert read[0] == frame.id
    assert read[1]["type"] == type(frame.body).__name__


@pytest.mark.parametrize("name", FRAMES)
def test_golden_bytes_become_the_frame_again(name: str) -> None:
    frame, body = FRAMES[name], bytes.fromhex(GOLDEN[name])[m.HEADER_BYTES :]
    decode = m.decode_call if isinstance(frame, m.Call) else m.decode_answer
    assert decode(body) == frame


def test_every_message_has_a_golden_frame() -> None:
    bodies = {type(frame.body) for frame in FRAMES.values()}
    assert bodies == set(m.Body.__subclasses__())


def test_fields_of_a_newer_version_are_ignored() -> None:
    data = msgpack.packb([9, {"type": "Release", "lease": "l", "added_later": 1}])
    assert m.decode_call(data) == m.Call(9, m.Release(lease="l"))


@pytest.mark.parametrize(
    "body",
    [
        [1],
        [1, {"type": "Nothing"}],
        [1, {"type": "Release"}],
        [1, {"type": "Release", "lease": 5}],
        ["1", {"type": "Release", "lease": "l"}],
        {"id": 1},
        [1, {"type": "Ok"}],
    ],
)
def test_what_is_no_call_is_refused(body: Any) -> None:
    with pytest.raises(msgspec.DecodeError):
        m.decode_call(msgpack.packb(body))
