"""Rows and the end of a request, on their way to the client: as events while they come, or all at once."""

import asyncio
from typing import Protocol

from services.gateway.edge.render import DONE, Collector, EventWriter, Form, Usage
from services.gateway.exchange import Exchange
from services.gateway.streams import Row


class Answer(Protocol):
    async def rows(self, rows: list[Row]) -> None: ...

    def push(self, rows: list[Row]) -> bool:
        """`rows` without waiting; False, and nothing done, where that would have to wait."""

    async def end(self, usage: Usage) -> None: ...

    def overrun(self) -> None:
        """Rows come faster than they can be given away."""


class Streamed:
    def __init__(self, exchange: Exchange, form: Form) -> None:
        self._exchange = exchange
        self._events = EventWriter(form)
        self._turn = asyncio.Lock()  # legs write side by side

    async def rows(self, rows: list[Row]) -> None:
        async with self._turn:
            data = self._events.rows(rows)
            if not self._exchange.started:
                await self._exchange.open_stream()
            if data:
                await self._exchange.write(data)

    def push(self, rows: list[Row]) -> bool:
        if self._turn.locked() or not self._exchange.flows:
            return False
        if data := self._events.rows(rows):
            self._exchange.push(data)
        return True

    async def end(self, usage: Usage) -> None:
        await self._exchange.close(self._events.usage(usage) + self._exchange.receipt.comment() + DONE)

    def overrun(self) -> None:
        self._exchange.overrun()


class Whole:
    def __init__(self, exchange: Exchange, form: Form) -> None:
        self._exchange = exchange
        self._collector = Collector(form)

    async def rows(self, rows: list[Row]) -> None:
        self._collector.rows(rows)

    def push(self, rows: list[Row]) -> bool:
        self._collector.rows(rows)
        return True

    async def end(self, usage: Usage) -> None:
        await self._exchange.answer(200, self._collector.body(usage))

    def overrun(self) -> None:
        self._exchange.overrun()


def answer(exchange: Exchange, form: Form) -> Answer:
    return Streamed(exchange, form) if exchange.streams else Whole(exchange, form)
