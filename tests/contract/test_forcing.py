"""The processors that force a replay, called as vLLM's two model runners call them: rows move, slots are given again."""

import numpy as np
import pytest
import torch
from vllm import SamplingParams
from vllm.v1.sample.logits_processor import BatchUpdateBuilder, MoveDirectionality
from vllm.v1.worker.gpu.sample.logits_processor import LogitsContext, LogitsProcRequestState

from shared import wire
from shared.worker.forcing import Forcing
from shared.worker.forcing_v2 import ForcingV2
from shared.worker.replay import EXTRA_ARG

pytestmark = pytest.mark.vllm

TOKENS = 12
PROMPT = 5  # tokens


def params(*replay: int) -> SamplingParams:
    return SamplingParams(extra_args={EXTRA_ARG: wire.pack_tokens(list(replay))} if replay else None)


def chosen(logits: torch.Tensor) -> list[int | None]:
    """The only token that each row leaves, None for a row that is as it was."""
    found: list[int | None] = []
    for row in logits:
        (left,) = torch.nonzero(torch.isfinite(row), as_tuple=True)
        found.append(int(left[0]) if len(left) == 1 else None)
        assert len(left) in (1, TOKENS)
    return found


# ---- model runner V1: by row -----------------------------------------------------------------------------------------


class Batch:
    """Rows as GPUInputBatch keeps them: outputs are lists that the processor may look at."""

    def __init__(self) -> None:
        self.processor = Forcing(None, torch.device("cpu"), False)
        self.outputs: list[list[int]] = []

    def update(self, *, added=(), removed=(), moved=()) -> None:
        builder = BatchUpdateBuilder(list(removed), list(added), list(moved))
        self.processor.update_state(builder.get_and_reset(len(self.outputs)))

    def add(self, *replay: int, output: tuple[int, ...] = ()) -> None:
        self.outputs.append(list(output))
        self.update(added=[(len(self.outputs) - 1, params(*replay), [], self.outputs[-1])])

    def step(self) -> list[int | None]:
        """Every row takes what it was left; -1 stands for a token that is not known yet."""
        self.processor.update_state(None)
        tokens = chosen(self.processor.apply(torch.zeros(len(self.outputs), TOKENS)))
        for output in self.outputs:
            output.append(-1)
        return tokens


def test_one_token_a_step_until_the_replay_is_out():
    batch = Batch()
    batch.add(3, 4, 5)
    batch.add()
    assert [batch.step() for _ in range(4)] == [[3, None], [4, None], [5, None], [None, None]]


def test_logits_are_left_alone_where_nobody_repeats():
    batch = Batch()
    batch.add()
    batch.update()
    logits = torch.zeros(1, TOKENS)
    assert batch.processor.apply(logits) is logits
    assert not batch.processor.is_argmax_invariant()


def test_rows_move_swap_and_leave():
    batch = Batch()
    batch.add(1, 2, 3, 4)
    batch.add(5, 6, 7, 8)
    batch.add()
    assert batch.step() == [1, 5, None]
    batch.outputs.reverse()
    batch.update(moved=[(0, 2, MoveDirectionality.SWAP)])
    assert batch.step() == [None, 6, 2]
    del batch.outputs[0]
    batch.outputs.reverse()
    batch.update(removed=[0], moved=[(2, 0, MoveDirectionality.UNIDIRECTIONAL)])
    assert batch.step() == [3, 7]
    del batch.outputs[1]
    batch.update(removed=[1])
    batch.add()  # takes the row of the one that has left
    assert batch.step() == [4, None]


def test_a_preempted_request_goes_on_where_it_was():
    batch = Batch()
    batch.add(1, 2, 3, output=(1, 2))
    assert batch.step() == [3]
    assert batch.step() == [None]


# ---- model runner V2: by slot ----------------------------------------------------------------------------------------


class Lengths:
    """Of prompts, as UvaBackedTensor has them for the host."""

    np = np.full(4, PROMPT, dtype=np.int32)


def state() -> LogitsProcRequestState:
    return LogitsProcRequestState(
        device=torch.device("cpu"),
        max_num_reqs=4,
        vocab_size=TOKENS,
        all_token_ids=None,
        prompt_len=Lengths(),
        prefill_len=None,
        total_len=None,
    )


def apply(processor: ForcingV2, lengths: dict[int, int]) -> list[int | None]:
    """`lengths`: tokens seen so far by slot, in the batch's order."""
    slots = np.array(list(lengths), dtype=np.int32)
    at = torch.from_numpy(slots)
    context = LogitsContext(
        expanded_idx_mapping=at,
        idx_mapping=at,
        idx_mapping_np=slots,
        expanded_local_pos=torch.zeros(len(slots)),
        input_ids=at,
        pos=at,
        seq_lens_upper_bound_np=np.array(list(lengths.values()), dtype=np.int32),
    )
    return chosen(processor.apply(torch.zeros(len(slots), TOKENS), context))


def test_v2_finds_requests_by_slot_and_counts_by_length():
    processor = ForcingV2(None, state())
    assert apply(processor, {0: PROMPT}) == [None]
    assert processor.add_request(2, params(3, 4))
    assert not processor.add_request(0, params())
    assert apply(processor, {0: PROMPT, 2: PROMPT}) == [None, 3]
    assert apply(processor, {2: PROMPT + 1, 0: PROMPT + 1}) == [4, None]
    assert apply(processor, {2: PROMPT + 2}) == [None]
    assert apply(processor, {2: PROMPT - 2}) == [None]  # a chunk of the prompt: its token is thrown away
    assert not processor.add_request(2, params())
    assert apply(processor, {2: PROMPT}) == [None]
