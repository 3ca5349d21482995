"""A request's receipt, worked out from its context: whenever it is shown, from the same timestamps."""

from services.gateway.answer.receipt import Receipt
from services.gateway.request.context import RequestContext, Stage


def receipt(ctx: RequestContext) -> Receipt:
    """Of a request with several prompts: the first one's way, the sums, and the first token of all."""
    prompts = ctx.prompts or [ctx]
    first = prompts[0]
    tokens_at = [one.first_token_at for one in prompts if one.first_token_at]
    expected_s = None if first.waiting is None else first.waiting.expected_s
    return Receipt(
        path=first.path,
        reason=first.reason,
        prefill=first.prefill,
        decode=first.decode or None,
        cached_tokens=sum(one.cached_tokens for one in prompts),
        predicted_ttft_ms=None if first.path is None or expected_s is None else round(expected_s * 1000, 1),
        actual_ttft_ms=round((min(tokens_at) - ctx.began) * 1000, 1) if tokens_at else None,
        retries=sum(one.retries for one in prompts),
        stages_ms=stages_ms(first),
    )


def stages_ms(ctx: RequestContext) -> dict[str, float] | None:
    """Where the time to the first token went; None: none has come.

    `prefill` is the wait for a computed prompt, `handoff` what follows until decode's first token; a prompt that
    decode computes itself is all `prefill`.
    """
    if not ctx.first_token_at:
        return None
    spent_s, began = _until_streaming(ctx)
    waited_s = spent_s.get(Stage.HANDOFF, 0.0)
    handoff_s = 0.0
    if ctx.prefilled_at is not None and ctx.prefilled_at <= ctx.first_token_at:
        handoff_s = min(max(0.0, began - ctx.prefilled_at), waited_s)
    queue_s, reserve_s = spent_s.get(Stage.QUEUED, 0.0), spent_s.get(Stage.RESERVING, 0.0)
    # The rest went into reading, checking and tokenising.
    edge_s = max(0.0, ctx.first_token_at - ctx.whole.began - queue_s - reserve_s - waited_s)
    stages = {
        "edge": edge_s,
        "queue": queue_s,
        "reserve": reserve_s,
        "prefill": max(0.0, waited_s - handoff_s),
        "handoff": handoff_s,
    }
    return {name: round(one_s * 1000, 1) for name, one_s in stages.items()}


def queued_s(ctx: RequestContext, now: float) -> float:
    """How long it was in line, over all attempts."""
    ends = [at for _, at in ctx.stages[1:]] + [now]
    return sum(end - at for (stage, at), end in zip(ctx.stages, ends, strict=True) if stage is Stage.QUEUED)


def _until_streaming(ctx: RequestContext) -> tuple[dict[Stage, float], float]:
    """What each stage took up to the first token, and when that came."""
    spent_s: dict[Stage, float] = {}
    last, since = ctx.stages[0]
    for stage, at in ctx.stages[1:]:
        spent_s[last] = spent_s.get(last, 0.0) + at - since
        last, since = stage, at
        if stage is Stage.STREAMING:
            break
    return spent_s, since
