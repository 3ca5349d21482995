"""`GET /dashboard/traces`: the last or the slowest, and one of them span by span. Same access rule as the API.

FastAPI's own encoder would hold the loop for tens of milliseconds a listing.
"""

from typing import Annotated, Literal

import msgspec
from fastapi import FastAPI, Query, Response

from services.gateway.observe.traces import view
from services.gateway.observe.traces.traces import MOST, Traces
from shared.errors import TraceNotFound

PRIVATE = {"cache-control": "no-store"}


def add_routes(app: FastAPI, traces: Traces) -> None:
    @app.get("/dashboard/traces", include_in_schema=False)
    async def last(
        order: Literal["last", "slowest"] = "last", limit: Annotated[int, Query(ge=1, le=MOST)] = 50
    ) -> Response:
        return _json(view.listing(await traces.summaries(order, limit)))

    @app.get("/dashboard/traces/{wanted}", include_in_schema=False)
    async def one(wanted: str) -> Response:
        found = await traces.find(wanted)
        if found is None:
            raise TraceNotFound("no gateway keeps a trace of this id")
        return _json(view.shown(found))


def _json(content: dict[str, object]) -> Response:
    return Response(msgspec.json.encode(content), media_type="application/json", headers=PRIVATE)
