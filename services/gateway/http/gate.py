"""Who may see the routes beside the hot ones: whatever is not named here wants a key, new routes included.

Invariants: nothing of an answer is made before the key is checked; without keys configured all is open.
"""

import ipaddress

from starlette.types import ASGIApp, Receive, Scope, Send

from services.gateway.access.access import Access
from services.gateway.access.client import ANONYMOUS
from services.gateway.answer import errors
from shared.errors import BatonError

CLIENT = "baton.client"  # in a scope
OPEN = frozenset({"/health", "/ready", "/dashboard"})
OPEN_FILES = "/dashboard/assets/"
KEYED = ("/v1/", "/dashboard/")  # whoever asks, and from wherever


async def gated(access: Access, rest: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
    if scope["type"] != "http":
        await rest(scope, receive, send)
        return
    headers = dict(scope["headers"])
    scope[CLIENT] = ANONYMOUS
    try:
        if not (_is_open(scope["path"]) or _looks_after_it(scope, headers)):
            scope[CLIENT] = access.client(headers.get(b"authorization", b""))
    except BatonError as error:
        status, more, body = errors.render(error)
        more += [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": status, "headers": more})
        await send({"type": "http.response.body", "body": body})
        return
    await rest(scope, receive, send)


def _is_open(path: str) -> bool:
    return path in OPEN or path.startswith(OPEN_FILES)


def _looks_after_it(scope: Scope, headers: dict[bytes, bytes]) -> bool:
    """Somebody on this machine who asks for metrics or the like, not for a model, and not on behalf of another."""
    if scope["path"].startswith(KEYED) or b"x-forwarded-for" in headers or b"forwarded" in headers:
        return False
    try:
        return ipaddress.ip_address((scope.get("client") or ("",))[0]).is_loopback
    except ValueError:
        return False
