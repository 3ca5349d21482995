"""The arena's size, its file, and what is done with a dead predecessor's."""

import fcntl
from pathlib import Path

import pytest

from services.kv_transfer.arena import Arena, Memory, choose_size, remove_stale
from services.kv_transfer.deadlines import SLACK, Deadlines
from services.kv_transfer.slots import GIB, Layout, cut
from shared.errors import SettingsError
from shared.kv.messages import Geometry

MIB = 1024**2


def memory(total: float = 64, available: float = 32, shm: float = 32) -> Memory:
    return Memory(total_bytes=int(total * GIB), available_bytes=int(available * GIB), shm_free_bytes=int(shm * GIB))


@pytest.mark.parametrize(
    ("arena_gib", "has", "gib"), [(0, memory(), 2), (0, memory(total=10), 1), (0.5, memory(), 0.5), (8, memory(), 8)]
)
def test_size(arena_gib: float, has: Memory, gib: float) -> None:
    assert choose_size(arena_gib, has) == gib * GIB


@pytest.mark.parametrize(
    ("has", "words"), [(memory(shm=0.0625), "--shm-size"), (memory(available=1), "stop something")]
)
def test_a_size_that_is_not_there_is_refused_with_what_to_do(has: Memory, words: str) -> None:
    with pytest.raises(SettingsError, match=rf"'arena_gib'.*{words}"):
        choose_size(4, has)


def test_the_file_is_the_owners_alone_and_goes_with_its_store(tmp_path: Path) -> None:
    arena = Arena.create(tmp_path, "c", "n", MIB / GIB)
    assert arena.path.stat().st_mode & 0o777 == 0o600
    assert arena.path.stat().st_size == arena.size_bytes == MIB
    arena.close()
    assert list(tmp_path.iterdir()) == []


def test_words_of_a_new_cut_replace_the_old_ones(tmp_path: Path) -> None:
    arena = Arena.create(tmp_path, "c", "n", MIB / GIB)
    layout = Layout(words_offset=0, slots_offset=4096, slot_bytes=4096, ranks=1, blocks=4)
    words = arena.words(layout)
    words[3] = 2**64 - 1
    assert arena.path.read_bytes()[24:32] == b"\xff" * 8
    again = arena.words(layout)
    assert again[3] == 2**64 - 1
    with pytest.raises(ValueError, match="released"):
        words[0]
    arena.close()


def test_only_unlocked_arenas_of_this_node_are_removed(tmp_path: Path) -> None:
    dead = tmp_path / "baton-c-n-0123abcd.arena"
    neighbour = tmp_path / "baton-c-n-2-0123abcd.arena"
    living = tmp_path / "baton-c-n-89ab0123.arena"
    for path in (dead, neighbour, living):
        path.touch()
    with living.open("r+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert remove_stale(tmp_path, "c", "n") == [dead]
    assert sorted(tmp_path.iterdir()) == sorted([neighbour, living])


@pytest.mark.parametrize(("slot_bytes", "ranks"), [(4096, 1), (5000, 3), (1 << 20, 2)])
def test_a_cut_lies_within_the_arena(slot_bytes: int, ranks: int) -> None:
    size = 16 * MIB
    layout = cut(size, Geometry(fingerprint="f", block_size=16, slot_bytes=slot_bytes, ranks=ranks, max_model_len=16))
    assert layout.words_offset + 8 * layout.slots <= layout.slots_offset
    assert layout.slots_offset % 4096 == 0
    end = layout.slots_offset + layout.slots * slot_bytes
    assert size - (slot_bytes + 8) * ranks - 2 * 4096 < end <= size


def test_deadlines_come_in_order_and_dropped_ones_never() -> None:
    deadlines: Deadlines[str] = Deadlines()
    for name, at in (("b", 2.0), ("a", 1.0), ("c", 3.0), ("d", 2.5)):
        deadlines.set(name, at)
    deadlines.set("a", 2.2)  # moved
    deadlines.drop("d")
    assert deadlines.earliest() == 2.0
    assert deadlines.due(2.5) == ["b", "a"]
    assert deadlines.due(2.5) == []
    assert deadlines.earliest() == 3.0


def test_dropped_deadlines_do_not_pile_up() -> None:
    deadlines: Deadlines[int] = Deadlines()
    for name in range(50 * SLACK):
        deadlines.set(name, float(name))
        deadlines.drop(name)
    assert len(deadlines) == 0
    assert len(deadlines._heap) <= SLACK + 1
