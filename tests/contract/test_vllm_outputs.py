"""What vLLM's own output processor makes of tokens, through our adapter and the gateway's events; no engine runs.

A character that is cut over several tokens reaches the client whole or not at all, streamed token by token.
"""

import json
from pathlib import Path
from typing import Any

import pytest

from services.gateway.answer.render import EventWriter, Form, PromptShown, Row
from shared import wire
from shared.worker.engine import EngineRequest
from shared.worker.vllm_engine import to_deltas, to_sampling_params

DEMO = Path(__file__).parents[2] / "models" / "demo"
PROMPT = [5, 6, 7]
TEXTS = ["日本語の文章", "한국어 😀👩‍👩‍👧 家族", "naïve café — ¿qué? Ωμέγα", "𐍈𠮷 𓀀"]
COMPLETION = Form(
    chat=False,
    id="id",
    created=1,
    model="m",
    n=1,
    top_logprobs=None,
    prompt_logprobs=None,
    include_usage=False,
    return_token_ids=False,
    service_tier=None,
    prompts=[PromptShown(tokens=PROMPT)],
    prompt_only=False,
)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from vllm.tokenizers import get_tokenizer

    return get_tokenizer(str(DEMO))


class Processor:
    """VLLM's front end for one request, fed with what an EngineCore would have sent."""

    def __init__(self, tokenizer: Any, sampling: wire.Sampling) -> None:
        from vllm.v1.engine import EngineCoreRequest
        from vllm.v1.engine.output_processor import OutputProcessor

        self._processor = OutputProcessor(tokenizer, log_stats=False)
        request = EngineCoreRequest(
            request_id="r",
            external_req_id="r",
            prompt_token_ids=PROMPT,
            mm_features=None,
            sampling_params=to_sampling_params(EngineRequest(id="r", tokens=PROMPT, sampling=sampling), {}),
            pooling_params=None,
            arrival_time=0.0,
            lora_request=None,
            cache_salt=None,
            data_parallel_rank=None,
        )
        self._processor.add_request(request, None)

    def step(self, token: int, *, last: bool = False, prompt_logprobs: Any = None) -> list[Any]:
        from vllm.v1.engine import EngineCoreOutput, FinishReason

        output = EngineCoreOutput(
            "r",
            [token],
            new_prompt_logprobs_tensors=prompt_logprobs,
            finish_reason=FinishReason.LENGTH if last else None,
        )
        made = self._processor.process_outputs([output]).request_outputs
        return [delta for request_output in made for delta in to_deltas(request_output)]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("stop", [[], ["never"]], ids=["plain", "with text held back for a stop"])
def test_a_cut_character_is_never_sent_broken(tokenizer: Any, text: str, stop: list[str]) -> None:
    tokens = tokenizer.encode(text, add_special_tokens=False)
    alone = [tokenizer.decode([token]) for token in tokens]
    assert any("�" in piece for piece in alone), "no character is cut here: this proves nothing"
    processor = Processor(tokenizer, wire.Sampling(max_tokens=len(tokens), stop=stop))
    writer = EventWriter(COMPLETION)
    pieces: list[str] = []
    for index, token in enumerate(tokens):
        for delta in processor.step(token, last=index == len(tokens) - 1):
            row = Row(delta.choice, delta.text, wire.pack_tokens(delta.tokens), delta.finish, delta.logprobs)
            sent = writer.rows([row]).decode("utf-8", errors="strict")
            pieces += [json.loads(event[6:])["choices"][0]["text"] for event in sent.split("\n\n") if event]
    assert not any("�" in piece for piece in pieces)
    assert "".join(pieces) == text


def test_prompt_logprobs_come_once_with_ranks(tokenizer: Any) -> None:
    import torch
    from vllm.v1.outputs import LogprobsTensors

    tensors = LogprobsTensors(
        logprob_token_ids=torch.tensor([[6, 9, 6], [7, 8, 9]]),  # the prompt's own first, then the best two
        logprobs=torch.tensor([[-1.0, -0.5, -1.0], [-4.0, -0.25, -0.5]]),
        selected_token_ranks=torch.tensor([2, 40]),
    )
    processor = Processor(tokenizer, wire.Sampling(max_tokens=2, prompt_logprobs=2))
    (first,) = processor.step(10, prompt_logprobs=tensors)
    (second,) = processor.step(11, last=True)
    assert first.prompt_logprobs is not None
    opening, one, two = first.prompt_logprobs
    assert opening is None
    assert one is not None
    assert two is not None
    assert (one.token_id, one.rank, [top.token_id for top in one.top]) == (6, 2, [9, 6])
    assert (two.token_id, two.rank, [top.token_id for top in two.top]) == (7, 40, [8, 9, 7])
    assert two.token == tokenizer.decode([7])
    assert second.prompt_logprobs is None
