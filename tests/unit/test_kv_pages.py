"""Blocks out of an engine's pages and back: a device's way gives the same bytes as a CPU's, and stays within its bounds."""

import threading

import pytest
import torch

from services.kv_transfer.connector.device_pages import Budget, PageTable
from services.kv_transfer.connector.pages import HostPages, layers_of
from shared.errors import KvLost

BLOCKS = 12
CPU = torch.device("cpu")


def caches(*pages: tuple[torch.dtype, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    """Layers of random bytes; a dtype and the shape of a page each."""
    torch.manual_seed(0)
    made = {}
    for number, (dtype, shape) in enumerate(pages):
        size = torch.empty((BLOCKS, *shape), dtype=dtype).nbytes
        made[f"layer {number}"] = torch.randint(0, 256, (size,), dtype=torch.uint8).view(dtype).reshape(BLOCKS, *shape)
    return made


SHAPES = {
    "bf16": ((torch.bfloat16, (2, 16, 32)), (torch.bfloat16, (2, 16, 32))),
    "unequal": ((torch.float32, (2, 4, 8)), (torch.float32, (1, 4, 8))),
    "odd": ((torch.uint8, (3, 5)), (torch.uint8, (7,))),
    "fours": ((torch.int32, (3,)), (torch.bfloat16, (2,))),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_gathered_rows_are_what_a_cpu_would_have_written(shape: str) -> None:
    layers = layers_of(caches(*SHAPES[shape]))
    host, table = HostPages(layers), PageTable(layers)
    assert table.slot_bytes == host.slot_bytes
    ids = [7, 0, 11, 3]
    slots = [bytearray(host.slot_bytes) for _ in ids]
    host.read(ids, [memoryview(slot) for slot in slots])
    rows = table.rows(len(ids), CPU)
    table.gather(torch.tensor(ids), rows)
    assert [bytes(row.numpy()) for row in rows] == [bytes(slot) for slot in slots]
    assert len({bytes(slot) for slot in slots}) == len(ids)


@pytest.mark.parametrize("shape", SHAPES)
def test_scattered_rows_fill_their_pages_and_no_other(shape: str) -> None:
    source, target = caches(*SHAPES[shape]), caches(*SHAPES[shape])
    before = {name: layer.clone() for name, layer in target.items()}
    rows = (taken := PageTable(layers_of(source))).rows(3, CPU)
    taken.gather(torch.tensor([1, 2, 4]), rows)
    PageTable(layers_of(target)).scatter(torch.tensor([9, 5, 6]), rows)
    for name, layer in target.items():
        was, now = (tensor.view(torch.uint8).reshape(BLOCKS, -1) for tensor in (before[name], layer))
        given = source[name].view(torch.uint8).reshape(BLOCKS, -1)
        assert torch.equal(now[[9, 5, 6]], given[[1, 2, 4]])
        others = [block for block in range(BLOCKS) if block not in {9, 5, 6}]
        assert torch.equal(now[others], was[others])


def test_layers_that_share_their_cache_are_one_and_pages_are_contiguous() -> None:
    (layer,) = caches((torch.float32, (2, 4))).values()
    assert len(layers_of({"a": layer, "b": layer})) == 1
    with pytest.raises(ValueError, match="b is not contiguous"):
        layers_of({"b": layer.transpose(1, 2)})


def test_a_budget_lets_in_what_fits_and_makes_the_rest_wait() -> None:
    budget = Budget(100)
    budget.take(60, 0)
    with pytest.raises(KvLost):
        budget.take(60, 0)
    waiting = threading.Thread(target=budget.take, args=(60, 30))
    waiting.start()
    budget.give(60)
    waiting.join(30)
    assert not waiting.is_alive()
    budget.give(60)
    budget.take(1000, 0)  # alone
    with pytest.raises(KvLost):
        budget.take(1, 0)
    budget.give(1000)
    budget.take(100, 0)
