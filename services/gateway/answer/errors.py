"""Every error -> HTTP, in one place: status, headers and OpenAI's error object."""

import math

import msgspec

from services.gateway.answer.render import error_body
from shared.errors import BatonError, Unauthorized

Headers = list[tuple[bytes, bytes]]


def render(error: BatonError) -> tuple[int, Headers, bytes]:
    headers: Headers = []
    if error.retry_after_s is not None:
        headers.append((b"retry-after", str(max(1, math.ceil(error.retry_after_s))).encode()))
    if isinstance(error, Unauthorized):
        headers.append((b"www-authenticate", b'Bearer realm="baton"'))
    return error.status, headers, msgspec.json.encode(error_body(error))
