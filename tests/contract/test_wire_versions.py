"""A rollout mixes versions on the bus: what each released version said is still understood, and says the same again.

`golden/VERSION.json` has the bytes of one message of each kind, as that version encoded them. It is written once, when
the version is released, and never changed; what a message has gained since must have a default.
"""

import json
from pathlib import Path
from typing import Any

import msgpack
import msgspec
import pytest

from shared import wire

FILES = sorted((Path(__file__).parent / "golden").glob("*.json"))
SAID = [
    (file.stem, name, bytes.fromhex(text))
    for file in FILES
    for name, texts in json.loads(file.read_text()).items()
    for text in texts
]


def test_there_are_files() -> None:
    assert [file.stem for file in FILES][:1] == ["0.1"]


@pytest.mark.parametrize(("version", "name", "data"), SAID, ids=[f"{version}-{name}" for version, name, _ in SAID])
def test_an_older_peer_is_understood_and_understands(version: str, name: str, data: bytes) -> None:
    message = wire.decode(data)
    assert type(message).__name__ == name
    before, now = (
        msgpack.unpackb(data, strict_map_key=False),
        msgpack.unpackb(wire.encode(message), strict_map_key=False),
    )
    # Whatever the older one reads is there, unchanged; more is passed over.
    assert said_again(before, now), f"{name} of {version} is no longer what it was: {before} became {now}"


@pytest.mark.parametrize(("version", "name", "data"), SAID, ids=[f"{version}-{name}" for version, name, _ in SAID])
def test_what_a_newer_peer_adds_is_passed_over(version: str, name: str, data: bytes) -> None:
    fields = msgpack.unpackb(data, strict_map_key=False)
    newer = msgpack.packb({**fields, "a_field_of_the_future": {"x": [1]}})
    assert wire.decode(newer) == wire.decode(data)


def test_a_message_that_changed_is_noticed() -> None:
    assert not said_again({"a": 1, "b": {"c": 2}}, {"a": 1, "b": {"c": 3}})
    assert not said_again({"a": 1}, {"b": 1})
    assert said_again({"a": [{"b": 1}]}, {"a": [{"b": 1, "new": 2}], "new": 3})


def test_a_required_field_that_an_older_peer_lacks_is_noticed() -> None:
    with pytest.raises(msgspec.ValidationError):
        wire.decode(msgpack.packb({"type": "Pong"}))


def said_again(before: Any, now: Any) -> bool:
    """Everything of `before` is in `now`, with more at most in maps."""
    if isinstance(before, dict):
        return isinstance(now, dict) and all(
            key in now and said_again(value, now[key]) for key, value in before.items()
        )
    if isinstance(before, list):
        return len(before) == len(now) and all(map(said_again, before, now))
    return before == now
