"""Recorded traffic."""

import gzip
import json
import lzma

import pytest

from loadtest.load import trace
from loadtest.load.prompts import Segment, token_ids
from loadtest.load.trace import Entry, TraceSource, Window
from shared.errors import SettingsError

AZURE = (
    "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:17:03.9799600,4808,10\n2023-11-16 18:17:04.0319600,3180,8\n"
)


def line(at_ms: int, prompt: int, output: int, blocks: list[int]) -> str:
    return json.dumps({"timestamp": at_ms, "input_length": prompt, "output_length": output, "hash_ids": blocks})


MOONCAKE = "\n".join([line(0, 1100, 20, [0, 1, 2]), line(30_000, 1030, 5, [0, 1, 9]), line(90_000, 100, 1, [7])])


def source(tmp_path, text: str, **window) -> TraceSource:
    path = tmp_path / "recorded.txt"
    path.write_text(text)
    return TraceSource("recorded", trace.read(path), Window(**window))


def test_mooncake(tmp_path):
    found = source(tmp_path, MOONCAKE)
    assert found.size == 3
    assert list(found.arrivals_s) == [0.0, 30.0, 90.0]
    (turn,) = found.conversation(0).turns
    assert turn.say == (Segment(0, 512), Segment(1, 512), Segment(2, 76))
    assert (turn.new_tokens, turn.output_tokens) == (1100, 20)


@pytest.mark.parametrize("scale", [1.0, 0.5, 0.1, 0.013, 2.5])
def test_equal_blocks_are_equal_tokens_at_every_scale(tmp_path, scale):
    found = source(tmp_path, MOONCAKE, length_scale=scale)
    one, two = (token_ids(1, found.conversation(index).turns[0].say) for index in (0, 1))
    assert (len(one), len(two)) == (round(1100 * scale), round(1030 * scale))
    shared = min(round(1024 * scale), len(two))
    assert one[:shared] == two[:shared]
    assert one[shared : shared + 40] != two[shared : shared + 40] or shared == len(two)


def test_azure(tmp_path):
    found = source(tmp_path, AZURE)
    assert list(found.arrivals_s) == pytest.approx([0.0, 0.052], abs=1e-6)
    assert [found.conversation(index).turns[0].new_tokens for index in (0, 1)] == [4808, 3180]
    one, two = (token_ids(1, found.conversation(index).turns[0].say) for index in (0, 1))
    assert one[:100] != two[:100]


def test_windows_and_time_scales(tmp_path):
    assert list(source(tmp_path, MOONCAKE, time_scale=2.0).arrivals_s) == [0.0, 15.0, 45.0]
    assert list(source(tmp_path, MOONCAKE, minutes=1.0).arrivals_s) == [0.0, 30.0]
    late = source(tmp_path, MOONCAKE, start_minute=1.0, time_scale=0.5)
    assert list(late.arrivals_s) == [60.0]  # a quiet beginning is part of the recording
    with pytest.raises(SettingsError, match=r"recorded has 1\.5 minutes"):
        source(tmp_path, MOONCAKE, start_minute=5.0)


@pytest.mark.parametrize("pack", [lambda data: data, gzip.compress, lzma.compress])
def test_packed_or_not(tmp_path, pack):
    path = tmp_path / "recorded"
    path.write_bytes(pack(AZURE.encode()))
    assert len(trace.read(path)) == 2


def test_entries_are_in_order_of_time(tmp_path):
    path = tmp_path / "recorded"
    path.write_text("\n".join(reversed(MOONCAKE.splitlines())))
    assert [entry.at_s for entry in trace.read(path)] == [0.0, 30.0, 90.0]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "empty"),
        ("  \n ", "empty"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\n", "no requests"),
        ("time,tokens\n1,2\n", "line 1: neither a Mooncake"),
        ("hello", "line 1: neither"),
        (AZURE + "2023-11-16 18:17:05,many,3\n", "line 4"),
        (AZURE + "yesterday,5,3\n", "line 4"),
        (AZURE + "2023-11-16 18:17:05,5\n", "line 4"),
        (AZURE + "2023-11-16 18:17:05,-5,3\n", "line 4"),
        (MOONCAKE + "\n{oops", "line 4"),
        (MOONCAKE + '\n{"timestamp": 5}', "line 4"),
        (MOONCAKE + "\n" + line(5, 0, 1, []), "line 4"),
        (MOONCAKE + "\n" + line(-5, 10, 1, [3]), "line 4"),
        (MOONCAKE + "\n" + line(5, 1000, 1, [3]), "line 4: hash_ids has 1 blocks"),
        (MOONCAKE + "\n" + line(5, 10, 1, [-3]), "line 4: hash_ids"),
        (MOONCAKE.replace('"input_length": 100', '"input_length": "x"'), "line 3"),
    ],
)
def test_malformed_traces_name_the_line(tmp_path, text, words):
    path = tmp_path / "recorded"
    path.write_text(text)
    with pytest.raises(SettingsError) as caught:
        trace.read(path)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"\xff\xfe\x00\x01", "not text"),
        (gzip.compress(AZURE.encode())[:40], "damaged"),
        (lzma.compress(b"x")[:20], "damaged"),
    ],
)
def test_what_is_no_text(tmp_path, data, words):
    path = tmp_path / "recorded"
    path.write_bytes(data)
    with pytest.raises(SettingsError, match=words):
        trace.read(path)


def test_a_missing_file(tmp_path):
    with pytest.raises(SettingsError, match="No such file"):
        trace.read(tmp_path / "none.csv")


def test_a_folder(tmp_path):
    with pytest.raises(SettingsError, match="cannot be read"):
        trace.read(tmp_path)


@pytest.mark.parametrize(("name", "requests"), [("mooncake-conversation", 1750), ("azure-code", 1482)])
def test_shipped_excerpts(name, requests):
    path = trace.find(name)
    entries = trace.read(path)
    assert len(entries) == requests
    assert entries[-1].at_s - entries[0].at_s < 600
    assert path.stat().st_size < 100_000


def test_lengths_of_zero_still_ask_for_a_token():
    found = TraceSource("x", [Entry(0.0, 1, 0)], Window(length_scale=0.01))
    assert found.conversation(0).turns[0].new_tokens == 1
    assert found.conversation(0).turns[0].output_tokens == 1
