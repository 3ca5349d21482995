"""A vLLM logits processor that makes an output begin with given tokens: a resumed stream repeats what was sent.

One token a step, chosen behind every other processor: what comes before the sampler (the grammar) and behind it
(penalties' counts, the seed's state, stop strings, log probabilities, which are taken from the model's own logits)
goes exactly as if the engine had chosen the token itself. Requests without a replay cost nothing.

vLLM has two model runners with an interface each: this one, and forcing_v2.py. Named to vLLM by string, loaded in the
engine's process. Neither works under speculative decoding, where one step chooses several tokens.
"""

from typing import TYPE_CHECKING

from vllm.v1.sample.logits_processor.builtin import process_dict_updates
from vllm.v1.sample.logits_processor.interface import BatchUpdate, LogitsProcessor

from shared import wire
from shared.worker.replay import EXTRA_ARG

if TYPE_CHECKING:
    import torch
    from vllm.config import VllmConfig
    from vllm.sampling_params import SamplingParams

NEVER = float("-inf")


class Forcing(LogitsProcessor):
    """Keyed by a request's row in the batch, which vLLM moves about."""

    def __init__(self, vllm_config: "VllmConfig", device: "torch.device", is_pin_memory: bool) -> None:  # noqa: ARG002 - vLLM's signature
        # What to repeat, and vLLM's own list of the output so far. Its length counts: under asynchronous scheduling
        # the last entries are placeholders, and a preempted request comes back with all that it had.
        self._replays: dict[int, tuple[list[int], list[int]]] = {}

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        process_dict_updates(self._replays, batch_update, _entry)

    def apply(self, logits: "torch.Tensor") -> "torch.Tensor":
        for row, (replay, output) in self._replays.items():
            if len(output) < len(replay):
                logits[row].fill_(NEVER)
                logits[row, replay[len(output)]] = 0.0
        return logits


def _entry(
    params: "SamplingParams",
    _: list[int] | None,
    output: list[int],
) -> tuple[list[int], list[int]] | None:
    replay = replay_of(params)
    return (replay, output) if replay else None


def replay_of(params: "SamplingParams") -> list[int]:
    return wire.unpack_tokens((params.extra_args or {}).get(EXTRA_ARG, b""))
