"""forcing.py for vLLM's model runner V2 (the default on GPUs), where state is kept by request slot, not by row."""

from typing import TYPE_CHECKING

from vllm.v1.worker.gpu.sample.logits_processor import LogitsContext, LogitsProcessor, LogitsProcRequestState

from shared.worker.forcing import NEVER, replay_of

if TYPE_CHECKING:
    import torch
    from vllm.config import VllmConfig
    from vllm.sampling_params import SamplingParams


class ForcingV2(LogitsProcessor):
    def __init__(self, vllm_config: "VllmConfig", req_states: LogitsProcRequestState) -> None:
        super().__init__(vllm_config, req_states)
        self._prompt_len = req_states.prompt_len
        self._replays: dict[int, list[int]] = {}  # by slot; a slot's next request replaces it

    def add_request(self, req_idx: int, sampling_params: "SamplingParams") -> bool:
        replay = replay_of(sampling_params)
        self._replays.pop(req_idx, None)
        if replay:
            self._replays[req_idx] = replay
        return bool(replay)

    def apply(self, logits: "torch.Tensor", ctx: LogitsContext) -> "torch.Tensor":
        """Without speculative decoding a request has one row, in the batch's order, and its length is exact."""
        if not self._replays:
            return logits
        for row, slot in enumerate(ctx.idx_mapping_np.tolist()):
            replay = self._replays.get(slot)
            if replay is None:
                continue
            produced = int(ctx.seq_lens_upper_bound_np[row]) - int(self._prompt_len.np[slot])
            if 0 <= produced < len(replay):
                logits[row].fill_(NEVER)
                logits[row, replay[produced]] = 0.0
        return logits
