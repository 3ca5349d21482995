"""What the gateway's OpenAPI document says beside the requests: the answers, the errors, the model that is served.

Invariants: it documents and checks nothing; every error of every route has the one shape of `ErrorBody`.
"""

from typing import Any, Literal

from fastapi import FastAPI
from pydantic import BaseModel

Responses = dict[int | str, dict[str, Any]]


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: str


class ErrorBody(BaseModel):
    error: ErrorDetail


class ModelCard(BaseModel):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    max_model_len: int | None


class ModelList(BaseModel):
    object: Literal["list"]
    data: list[ModelCard]


class Health(BaseModel):
    status: Literal["alive"]


class Readiness(BaseModel):
    ready: bool
    reason: str | None


class UsageDetail(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class ChatMessage(BaseModel):
    role: Literal["assistant"]
    content: str | None


class ChatChoice(BaseModel):
    index: int
    message: ChatMessage
    finish_reason: str


class ChatCompletion(BaseModel):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: UsageDetail


class TextChoice(BaseModel):
    index: int
    text: str
    finish_reason: str


class Completion(BaseModel):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[TextChoice]
    usage: UsageDetail


API = "/v1/"  # what wants a key, where keys are configured
SCHEME = "bearer"


def errors(*statuses: int) -> Responses:
    return {status: {"model": ErrorBody} for status in statuses}


# Of the two routes that do the work. 5xx: what happened is in `code`.
SERVED: Responses = {
    200: {
        "description": "One JSON object, or server-sent events where `stream` is true",
        "content": {"text/event-stream": {}},
    },
    **errors(400, 404, 408, 413, 415, 429, 500, 502, 503, 504),
}


def describe(app: FastAPI, model: str, *, keyed: bool) -> None:
    """Make the document say what only the running gateway knows. `keyed`: clients need a key."""
    make = app.openapi

    def openapi() -> dict[str, Any]:
        document = app.openapi_schema
        if document is None:
            document = make()
            for path in document["paths"].values():
                for operation in path.values():
                    # Nothing answers 422: FastAPI supposes it of every route with a parameter.
                    operation["responses"].pop("422", None)
            schemas = document["components"]["schemas"]
            for name in ("HTTPValidationError", "ValidationError"):
                schemas.pop(name, None)
            for name in ("ChatBody", "CompletionBody"):
                schemas[name]["additionalProperties"] = False  # reading.py names those that it knows and refuses
                schemas[name]["properties"]["model"]["enum"] = [model]
            if keyed:
                _ask_for_keys(document)
        return document

    app.openapi = openapi  # type: ignore[method-assign] # as FastAPI's own pages on extending it say


def _ask_for_keys(document: dict[str, Any]) -> None:
    document["components"]["securitySchemes"] = {
        SCHEME: {"type": "http", "scheme": "bearer", "description": "An API key, as `baton keys add` gives it"}
    }
    refused = {"content": {"application/json": {"schema": {"$ref": "#/components/schemas/ErrorBody"}}}}
    for path, operations in document["paths"].items():
        if not path.startswith(API):
            continue
        for operation in operations.values():
            operation["security"] = [{SCHEME: []}]
            operation["responses"]["401"] = {"description": "No key, or one that is not known", **refused}
            operation["responses"]["403"] = {"description": "The key may not do this", **refused}
