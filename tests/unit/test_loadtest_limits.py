"""The arithmetic of the micro-benchmarks: spreads, fairness, percentiles with many zeros, events across reads."""

import argparse
import random
import socket
import threading

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from loadtest.cluster.stream import percentile
from loadtest.instant import Chunks
from loadtest.machine import ROOT
from loadtest.micro import gateway, kv, kv_engine, limits, raw_peer
from loadtest.micro.bench import Figure, figure
from loadtest.micro.closed_loop import EVENT, NO_TOKEN, occurrences
from loadtest.micro.store_bench import KEYS, StoreBench, new_keys


@pytest.mark.parametrize(
    ("values", "expected"),
    [([3.0], (3.0, 3.0, 3.0)), ([3.0, 1.0, 2.0], (2.0, 1.0, 3.0)), ([4.0, 1.0, 2.0, 3.0], (2.0, 1.0, 4.0))],
)
def test_a_figure_is_median_lowest_and_highest(values, expected):
    assert figure(values) == Figure(median=expected[0], low=expected[1], high=expected[2])


@pytest.mark.parametrize(
    ("shares", "expected"), [([5, 5, 5, 5], 1.0), ([8, 0, 0, 0], 0.25), ([3, 1], 0.8), ([7], 1.0), ([0, 0], 0.0)]
)
def test_jains_index(shares, expected):
    assert kv.jain(shares) == pytest.approx(expected)


@given(st.lists(st.floats(0.001, 10)), st.integers(0, 50), st.sampled_from([0.0, 0.5, 0.9, 0.99, 1.0]))
def test_zeros_need_not_be_written_down(values, zeros, share):
    assert gateway.with_zeros(sorted(values), zeros, share) == percentile(values + [0.0] * zeros, share)


@given(st.booleans(), st.integers(1, 6), st.data())
def test_tokens_are_counted_however_the_bytes_are_cut(chat, tokens, data):
    chunks = Chunks(chat=chat)
    whole = chunks.opening + chunks.token * tokens + chunks.end(tokens)
    cuts = sorted(data.draw(st.sets(st.integers(1, len(whole) - 1), max_size=8)))
    before, counted = b"", 0
    for start, end in zip([0, *cuts], [*cuts, len(whole)], strict=True):
        piece = whole[start:end]
        counted += occurrences(before, piece, EVENT) - sum(occurrences(before, piece, mark) for mark in NO_TOKEN)
        before += piece
    assert counted == tokens


def test_a_raw_round_trip_has_the_sizes_that_were_asked_for():
    near, far = socket.socketpair()
    asked, answer = 300, 50
    seen = []

    def peer() -> None:
        following, wanted = raw_peer.HEADER.unpack(raw_peer.receive(far, raw_peer.HEADER.size))
        seen.append((raw_peer.HEADER.size + len(raw_peer.receive(far, following)), wanted))
        far.sendall(bytes(wanted))

    with near, far:
        thread = threading.Thread(target=peer)
        thread.start()
        assert limits.round_trip_s(near, asked, answer) > 0
        thread.join(timeout=30)
    assert seen == [(asked, answer)]


def test_a_peer_that_has_gone_is_an_error():
    near, far = socket.socketpair()
    far.close()
    with near, pytest.raises(ConnectionError):
        raw_peer.receive(near, 1)


def test_copies_go_from_buffer_to_buffer():
    memory = np.arange(256, dtype=np.uint8)
    ring = limits.Ring(memory, 64)
    first = ring.take().copy()  # the second of four
    ring = limits.Ring(memory, 64)
    assert ring.copy_s(2) > 0
    assert (memory.reshape(4, 64)[3] == first).all()
    assert ring.paged_copies_s(16) > 0


def test_a_block_of_pages_arrives_as_it_left():
    shape = kv_engine.Shape(slot_bytes=4096, layers=4, pool_bytes=4096 * 8)
    source, target = kv_engine.Pages(shape), kv_engine.Pages(shape)
    slot = memoryview(bytearray(4096))
    source.read(3, slot)
    target.write(5, slot)
    assert target.checksum(5) == source.checksum(3)
    assert target.checksum(4) != source.checksum(3)


def test_pages_are_taken_in_turns():
    pages = kv_engine.Pages(kv_engine.Shape(slot_bytes=4096, layers=1, pool_bytes=4096 * 3))
    assert [pages.take(2), pages.take(2)] == [[0, 1], [2, 0]]


def test_the_store_is_measured_over_and_over():
    store = StoreBench(blocks=40 * KEYS)
    for _ in range(3):
        found = store.measure(calls=10)
        assert found.keys() == {"get", "raw get", "prefix", "pin", "raw pin", "put", "raw put"}
        assert min(found.values()) > 0


def test_keys_are_new():
    keys = new_keys(100)
    assert len(set(keys)) == 100
    assert {len(key) for key in keys} == {16}


def options(command, *words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return parser.parse_args(list(words))


@pytest.mark.parametrize(
    ("command", "words", "named"),
    [
        (kv, ("--slots-kib", "65", "--layers", "7"), "--slots-kib"),
        (kv, ("--sizes-mib", "1", "--slots-kib", "2048"), "--slots-kib"),
        (kv, ("--sizes-mib", "4096"), "--sizes-mib"),
        (kv, ("--arena-gib", "0.01"), "--arena-gib"),
        (kv, ("--out", "/no/such/folder/x.json"), "--out"),
        (gateway, ("--model", "/no/such/model"), "--model"),
        (gateway, ("--seconds", "0"), "--seconds"),
        (gateway, ("--step-ms", "-1"), "--step-ms"),
        (gateway, ("--out", "/no/such/folder/x.json"), "--out"),
    ],
)
def test_what_cannot_be_measured_is_refused_by_name(command, words, named, capsys):
    assert command.run(options(command, *words)) == 2
    said = capsys.readouterr()
    assert named in said.err
    assert said.err.count("\n") == 1


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (kv, ("--sizes-mib", "x")),
        (kv, ("--rounds", "0")),
        (gateway, ("--concurrency", "0")),
        (gateway, ("--rounds", "a")),
    ],
)
def test_numbers_that_are_none_are_refused_by_argparse(command, words, capsys):
    with pytest.raises(SystemExit, match="2"):
        options(command, *words)
    assert words[0] in capsys.readouterr().err


@given(st.integers(1, 400))
def test_prompts_have_the_length_that_was_asked_for(tokens):
    """At least: letters are added until there are as many, and a few may come at once."""
    tokenizer = Tokenizer.from_file(str(ROOT / "models" / "demo" / "tokenizer.json"))
    text = gateway._prompt(tokenizer, tokens, random.Random(tokens))
    assert tokens <= len(tokenizer.encode(text).ids) <= tokens + 2
