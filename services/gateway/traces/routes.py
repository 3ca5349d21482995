"""`GET /dashboard/traces`: the last or the slowest, and one of them span by span. Same access rule as the API."""

from typing import Annotated, Literal

from fastapi import FastAPI, Query

from services.gateway.traces import view
from services.gateway.traces.traces import MOST, Traces
from shared.errors import TraceNotFound


def add_routes(app: FastAPI, traces: Traces) -> None:
    @app.get("/dashboard/traces", include_in_schema=False)
    async def last(
        order: Literal["last", "slowest"] = "last", limit: Annotated[int, Query(ge=1, le=MOST)] = 50
    ) -> dict[str, object]:
        return view.listing(await traces.summaries(order, limit))

    @app.get("/dashboard/traces/{wanted}", include_in_schema=False)
    async def one(wanted: str) -> dict[str, object]:
        found = await traces.find(wanted)
        if found is None:
            raise TraceNotFound("no gateway keeps a trace of this id")
        return view.shown(found)
