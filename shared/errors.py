"""Every error that crosses a process or reaches a client, with the HTTP status it becomes.

Workers send a `Failure` (shared/wire.py); the bus raises it again through `from_wire`; the gateway renders it in
OpenAI's shape. Invariants: every concrete subclass has a unique `code`, and `from_wire` finds it by that code.

BatonError
├── RequestError                 the client's fault: 4xx, never retried
│   ├── InvalidRequest           400 invalid_request_error
│   │   ├── ContextLengthExceeded, ExceedsQuota
│   │   └── UnsupportedParameter
│   ├── ModelNotFound            404
│   ├── TraceNotFound            404
│   ├── RequestTimeout           408
│   ├── BodyTooLarge             413
│   ├── UnsupportedMedia         415
│   ├── HeadersTooLarge          431
│   ├── Unauthorized             401
│   └── TierNotAllowed           403
├── Refused                      no room: 429 or 503 with Retry-After, see `reason`
│   ├── QueueFull, DeadlineInfeasible, KvMemory, RateLimited   429
│   └── NoCapacity, Draining, KeysUnavailable                  503
└── ServiceError                 ours: 5xx
    ├── WorkerLost, WorkerStalled, OutputLost, EngineFailed, BusUnavailable, KvLost, KvMismatch, Timeout, Cancelled,
    ├── ResumeInexact
    └── Internal
"""

from typing import ClassVar


class BatonError(Exception):
    """Base of all. `message` is safe to show to a client: no prompts, keys or paths."""

    code: ClassVar[str] = "internal_error"
    status: ClassVar[int] = 500
    kind: ClassVar[str] = "server_error"
    retryable: ClassVar[bool] = False

    def __init__(self, message: str, *, param: str | None = None, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.retry_after_s = retry_after_s


class RequestError(BatonError):
    kind = "invalid_request_error"
    status = 400
    code = "invalid_request"


class InvalidRequest(RequestError):
    code = "invalid_value"


class ContextLengthExceeded(InvalidRequest):
    code = "context_length_exceeded"


class ExceedsQuota(InvalidRequest):
    """More tokens than the key may use in a minute. Not a 429: no client should send it again."""

    code = "exceeds_quota"


class UnsupportedParameter(InvalidRequest):
    code = "unsupported_parameter"


class ModelNotFound(RequestError):
    code = "model_not_found"
    status = 404


class TraceNotFound(RequestError):
    code = "trace_not_found"
    status = 404


class BodyTooLarge(RequestError):
    code = "request_too_large"
    status = 413


class RequestTimeout(RequestError):
    """Head or body did not arrive in time."""

    code = "request_timeout"
    status = 408


class UnsupportedMedia(RequestError):
    code = "unsupported_media_type"
    status = 415


class HeadersTooLarge(RequestError):
    code = "headers_too_large"
    status = 431


class Unauthorized(RequestError):
    code = "invalid_api_key"
    status = 401
    kind = "authentication_error"


class TierNotAllowed(RequestError):
    code = "tier_not_allowed"
    status = 403
    kind = "permission_error"


class Refused(BatonError):
    """No room now. The code is the reason label on `baton_shed_total`."""

    kind = "overloaded_error"
    status = 429
    code = "refused"
    retryable = True


class QueueFull(Refused):
    code = "queue_full"


class DeadlineInfeasible(Refused):
    code = "deadline_infeasible"


class KvMemory(Refused):
    code = "kv_memory"


class RateLimited(Refused):
    code = "rate_limited"
    kind = "rate_limit_error"


class NoCapacity(Refused):
    code = "no_capacity"
    status = 503


class Draining(Refused):
    code = "draining"
    status = 503


class KeysUnavailable(Refused):
    """The keys could not be read yet, so nobody can be told from anybody."""

    code = "keys_unavailable"
    status = 503


class ServiceError(BatonError):
    code = "service_error"


class WorkerLost(ServiceError):
    """No responder on the worker's subject, or its process died."""

    code = "worker_lost"
    status = 502
    retryable = True


class WorkerStalled(ServiceError):
    """The worker lives but its stream made no progress before the deadline."""

    code = "worker_stalled"
    status = 504
    retryable = True


class OutputLost(ServiceError):
    """A row is missing in a stream: NATS dropped it, or a worker skipped it."""

    code = "output_lost"
    status = 502
    retryable = True


class EngineFailed(ServiceError):
    code = "engine_failed"
    retryable = True


class BusUnavailable(ServiceError):
    code = "bus_unavailable"
    status = 503
    retryable = True


class KvLost(ServiceError):
    """Blocks that a job should have left in the store are not there."""

    code = "kv_lost"
    retryable = True


class KvMismatch(ServiceError):
    """Two sides disagree about model, layout or version of KV blocks."""

    code = "kv_mismatch"


class Timeout(ServiceError):
    code = "timeout"
    status = 504


class Cancelled(ServiceError):
    """The request was cancelled before this job; nobody is left to read the answer."""

    code = "cancelled"
    status = 499


class ResumeInexact(ServiceError):
    """A stream was lost, and nobody can go on with it as it would have gone on."""

    code = "resume_inexact"
    status = 502


class Internal(ServiceError):
    code = "internal_error"


class SettingsError(Exception):
    """Bad configuration: stops the process at start. The message names the key and what to do."""


def all_errors() -> dict[str, type[BatonError]]:
    """Every class by its code."""
    found: dict[str, type[BatonError]] = {}
    todo: list[type[BatonError]] = list(BatonError.__subclasses__())
    while todo:
        cls = todo.pop()
        found[cls.code] = cls
        todo.extend(cls.__subclasses__())
    return found


def from_wire(code: str, message: str, *, param: str | None = None, retry_after_s: float | None = None) -> BatonError:
    """The error a `Failure` stood for; a code of a newer version becomes `ServiceError`."""
    cls = all_errors().get(code, ServiceError)
    return cls(message, param=param, retry_after_s=retry_after_s)
