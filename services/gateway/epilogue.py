"""What is said of a request when it has ended: figures, one line in the log, its trace. Never what it was about."""

import logging
from dataclasses import dataclass

import msgspec

from services.gateway.edge.render import Usage
from services.gateway.gateway import Gateway
from services.gateway.metrics import outcome
from services.gateway.receipt import Receipt
from services.gateway.traces.sampling import Ending
from shared.errors import BatonError
from shared.spans import Span
from shared.telemetry import log_fields

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Epilogue:
    """Of one request."""

    request_id: str
    response_id: str
    tenant: str
    tier: str
    receipt: Receipt
    error: BatonError | None
    duration_s: float
    gap_s: float | None  # between tokens, on average
    prompt_tokens: int
    completion_tokens: int  # that the client has
    usage: Usage | None  # of one that went well

    def tell(self, gateway: Gateway, span: Span | None) -> None:
        """`span`: its root, which has ended; None: telemetry is off."""
        gateway.metrics.ended(self.error, self.tier, self.duration_s)
        if gateway.settings.request_log == "on":
            self._log(gateway.model, span)
        if span is not None:
            self._trace(gateway, span)

    def _log(self, model: str, span: Span | None) -> None:
        receipt, error = self.receipt, self.error
        fields: dict[str, object] = {
            "request_id": self.request_id,
            "response_id": self.response_id,
            "trace_id": f"{span.trace_id:032x}" if span is not None else "",
            "outcome": outcome(error),
            "reason": error.code if error is not None else receipt.reason,
            "tenant": self.tenant,
            "tier": self.tier,
            "model": model,
            "path": receipt.path,
            "prefill": receipt.prefill,
            "decode": receipt.decode,
            "prompt_tokens": self.prompt_tokens,
            "cached_tokens": receipt.cached_tokens,
            "completion_tokens": self.usage.completion if self.usage is not None else self.completion_tokens,
            "ttft_ms": receipt.actual_ttft_ms,
            "duration_ms": round(self.duration_s * 1000, 1),
            "retries": receipt.retries,
            "stages_ms": receipt.stages_ms,
        }
        log_fields(log, "request", {key: value for key, value in fields.items() if value not in (None, "")})

    def _trace(self, gateway: Gateway, span: Span) -> None:
        receipt, target = self.receipt, gateway.settings.target(self.tier)
        ttft_ms = receipt.actual_ttft_ms
        ending = Ending(
            outcome=outcome(self.error),
            duration_s=self.duration_s,
            ttft_s=None if ttft_ms is None else ttft_ms / 1000,
            gap_s=self.gap_s,
            target_ttft_s=target.ttft_s,
            target_itl_s=target.itl_s,
            retries=receipt.retries,
        )
        gateway.traces.ended(
            span,
            ending,
            lambda: msgspec.to_builtins(receipt),  # kept for long: nothing else of the request may hang on it
            request_id=self.request_id,
            tier=self.tier,
            tenant=self.tenant,
            path=receipt.path,
        )
