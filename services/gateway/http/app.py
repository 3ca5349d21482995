"""The HTTP face: FastAPI for what is not hot and for the OpenAPI page, plain ASGI for the two routes that are.

FastAPI's routing and dependency layer costs 130-180 microseconds a request: the hot routes are answered before it,
and appear in its document through stand-ins with the same models.
"""

import time
from http import HTTPStatus

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Receive, Scope, Send

from services.gateway.access.client import Client, unknown_model
from services.gateway.answer import errors
from services.gateway.gateway import Gateway, not_ready
from services.gateway.http import document
from services.gateway.http.entry import handle
from services.gateway.http.gate import CLIENT, gated
from services.gateway.http.requests import ChatBody, CompletionBody, RequestBody
from services.gateway.http.tokenizer import ChatTokenizer
from services.gateway.observe.dashboard import routes as dashboard
from services.gateway.observe.traces.routes import add_routes
from shared.errors import BatonError, InvalidRequest, RequestError
from shared.version import VERSION

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
HOT: dict[str, type[RequestBody]] = {CHAT: ChatBody, COMPLETIONS: CompletionBody}


class Front:
    """The application that uvicorn serves."""

    def __init__(self, gateway: Gateway, tokenizer: ChatTokenizer) -> None:
        self._deps = gateway.deps
        self._tokenizer = tokenizer
        self._rest: ASGIApp = rest(gateway)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        kind = HOT.get(scope["path"]) if scope["type"] == "http" and scope["method"] == "POST" else None
        if kind is None:
            await gated(self._deps.access, self._rest, scope, receive, send)
        else:
            await handle(self._deps, self._tokenizer, kind, scope, receive)


def rest(gateway: Gateway) -> FastAPI:
    app = FastAPI(
        title="Baton",
        version=VERSION,
        description="OpenAI-compatible; prefill and decode run apart.",
        redirect_slashes=False,  # it would build an address from what the client says its host is
    )
    deps, started = gateway.deps, int(time.time())

    def model(request: Request) -> dict[str, object] | None:
        """None where the key may not see it."""
        client: Client = request.scope[CLIENT]
        if not client.sees(deps.model):
            return None
        return {
            "id": deps.model,
            "object": "model",
            "created": started,
            "owned_by": "baton",
            "root": deps.model,
            "max_model_len": deps.fleet.max_model_len or None,
        }

    @app.get("/v1/models", responses={200: {"model": document.ModelList}})
    async def models(request: Request) -> dict[str, object]:
        return {"object": "list", "data": [one for one in [model(request)] if one is not None]}

    @app.get("/v1/models/{name:path}", responses={200: {"model": document.ModelCard}, **document.errors(404)})
    async def one_model(request: Request, name: str) -> dict[str, object]:
        found = model(request)
        if name != deps.model or found is None:
            raise unknown_model()
        return found

    @app.get("/health", responses={200: {"model": document.Health}})
    async def health() -> dict[str, str]:
        return {"status": "alive"}

    @app.get("/ready", responses={status: {"model": document.Readiness} for status in (200, 503)})
    async def ready() -> JSONResponse:
        reason = not_ready(deps)
        return JSONResponse(
            {"ready": reason is None, "reason": reason},
            status_code=HTTPStatus.OK if reason is None else HTTPStatus.SERVICE_UNAVAILABLE,
        )

    @app.get("/metrics", include_in_schema=False)
    async def metrics() -> Response:
        """Of every service that lives; each serves its own on its probe port as well."""
        return Response(await gateway.cluster_metrics.page(), media_type=CONTENT_TYPE_LATEST)

    dashboard.add_routes(app, gateway.dashboard, deps.access)
    add_routes(app, deps.traces)
    _document_hot_routes(app)
    document.describe(app, deps.model, keyed=bool(deps.settings.keys))
    app.add_exception_handler(BatonError, _baton_error)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(RequestValidationError, _query_error)
    return app


def _document_hot_routes(app: FastAPI) -> None:
    """Never called: `Front` answers these paths first."""

    @app.post(CHAT, summary="Chat completion, streamed or not", responses=document.SERVED)
    async def chat(body: ChatBody) -> document.ChatCompletion:
        raise NotImplementedError

    @app.post(COMPLETIONS, summary="Text completion, streamed or not", responses=document.SERVED)
    async def completion(body: CompletionBody) -> document.Completion:
        raise NotImplementedError


async def _baton_error(_: Request, error: Exception) -> Response:
    if not isinstance(error, BatonError):
        raise error
    status, headers, body = errors.render(error)
    return Response(
        body,
        status_code=status,
        headers={name.decode(): value.decode() for name, value in headers},
        media_type="application/json",
    )


async def _http_error(request: Request, error: Exception) -> Response:
    """Unknown paths and methods, in the shape that every other error has."""
    if not isinstance(error, HTTPException):
        raise error
    response = await _baton_error(request, RequestError(HTTPStatus(error.status_code).phrase.lower()))
    response.status_code = error.status_code
    response.headers.update(error.headers or {})
    return response


async def _query_error(request: Request, error: Exception) -> Response:
    """A parameter in a query that is not what it should be; the hot routes read theirs themselves."""
    if not isinstance(error, RequestValidationError):
        raise error
    first = error.errors()[0]
    param = str(first["loc"][-1])
    return await _baton_error(request, InvalidRequest(f"{param}: {first['msg']}", param=param))
