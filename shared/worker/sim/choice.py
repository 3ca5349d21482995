"""A request in the sim: its stream of deltas, and its choices, each a sequence of the scheduler's."""

import asyncio

from shared import wire
from shared.errors import BatonError, InvalidRequest, UnsupportedParameter
from shared.worker.engine import EngineDelta, EngineRequest
from shared.worker.sim.contents import Contents, History, Reading
from shared.worker.sim.scheduler import Sequence
from shared.worker.sim.text import Stops, TokenSampler, TokenTable

# What there is nothing for in an engine without likelihoods. Temperature and its like change nothing, and are taken.
_MISSING = ("logprobs", "prompt_logprobs", "structured", "logit_bias", "bad_words")


class DeltaStream:
    """Deltas on their way to whoever reads `generate`."""

    __slots__ = ("deltas", "error", "open", "waiter")

    def __init__(self, choices: int) -> None:
        self.deltas: list[EngineDelta] = []
        self.open = choices  # without their last delta
        self.error: BatonError | None = None
        self.waiter: asyncio.Future[None] | None = None

    def push(self, delta: EngineDelta) -> None:
        self.deltas.append(delta)
        self.wake()

    def fail(self, error: BatonError) -> None:
        self.error = error
        self.wake()

    def wake(self) -> None:
        waiter, self.waiter = self.waiter, None
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    async def take(self) -> list[EngineDelta]:
        """What has come since the last call; waits for more than nothing. Raises what the stream failed with."""
        while not self.deltas:
            if self.error is not None:
                raise self.error
            self.waiter = asyncio.get_running_loop().create_future()
            await self.waiter
        deltas, self.deltas = self.deltas, []
        return deltas


class Choice(Sequence):
    __slots__ = (
        "excess",
        "fresh",
        "history",
        "index",
        "lease",
        "limit",
        "min_tokens",
        "produced",
        "replay",
        "sampler",
        "stops",
        "stream",
        "texts",
    )

    def __init__(
        self, request: EngineRequest, index: int, stream: DeltaStream, *, reading: Reading, salt: int, limit: int
    ) -> None:
        """`limit`: tokens after which it ends."""
        name = request.id if request.sampling.n == 1 else f"{index}_{request.id}"
        super().__init__(name, list(request.tokens), reading, salt)
        sampling = request.sampling
        self.index = index
        self.stream = stream
        self.lease = request.kv.lease if request.kv is not None else ""
        self.limit = limit
        self.min_tokens = sampling.min_tokens
        self.produced = 0
        self.replay: list[int] = []  # into the table
        self.stops = Stops(sampling) if sampling.stop or sampling.stop_token_ids else None
        self.excess = 0  # of the prompt's pages, see pages.py
        self.fresh: list[int] = []  # tokens that no delta has yet,
        self.texts: list[str] = []  # and what they read as

    def prepare(self, contents: Contents, table: TokenTable, request: EngineRequest) -> None:
        """Raises InvalidRequest for a replay that is no output of this engine."""
        self.sampler = TokenSampler(table, request.sampling, self.index)
        if request.replay:
            self.replay = [table.index(token) for token in wire.unpack_tokens(request.replay[self.index])]
        self.history = History(contents, self.reading, self.tokens)

    def sample(self, table: TokenTable) -> wire.Finish | None:
        """One more token, and how the choice ends with it."""
        produced = self.produced
        if produced < len(self.replay):
            index = self.replay[produced]
        else:
            index = self.sampler.next(self.history.state, self.excess, may_stop=produced >= self.min_tokens)
        token, text = table.ids[index], table.texts[index]
        self.produced = produced = produced + 1
        finish = None
        if self.stops is not None:
            ending = self.stops.push(token, text, is_last=produced >= self.limit)
            text, finish = ending.text, ending.finish
        elif produced >= self.limit:
            finish = wire.Finish(reason="length")
        self.tokens.append(token)
        self.fresh.append(token)
        self.texts.append(text)
        if finish is None:
            self.history.push(token, table.hashes[index])
        return finish

    @property
    def plain_tokens(self) -> int:
        """How many come that neither end it nor are given."""
        if self.stops is not None or self.produced < len(self.replay):
            return 0
        return self.limit - 1 - self.produced

    def sample_more(self, table: TokenTable, count: int) -> None:
        """As so many calls of `sample`, of plain tokens, in one."""
        indices = self.history.go_on(table.hashes, table.ids, self.sampler.key, self.excess, count)
        tokens = [table.ids[index] for index in indices]
        self.produced += count
        self.tokens += tokens
        self.fresh += tokens
        self.texts += [table.texts[index] for index in indices]

    def take(self, finish: wire.Finish | None = None, account: dict[str, int] | None = None) -> EngineDelta:
        """What was sampled since the last delta; with `finish` it is the last one, and has the planner's account."""
        account = account or {}
        is_first = self.produced == len(self.fresh)
        tokens, self.fresh, texts, self.texts = self.fresh, [], self.texts, []
        return EngineDelta(
            choice=self.index,
            text=texts[0] if len(texts) == 1 else "".join(texts),
            tokens=tokens,
            finish=finish,
            cached_tokens=self.cached if is_first or finish is not None else 0,
            loaded_tokens=account.get("loaded_tokens", 0),
            computed_tokens=account.get("computed_tokens"),
            recomputed_tokens=account.get("recomputed_tokens", 0),
            unkept_tokens=account.get("unkept_tokens", 0),
        )


def refuse(request: EngineRequest, max_model_len: int, vocabulary: int) -> None:
    """Raises InvalidRequest for what this engine cannot do, as vLLM does for what no engine could."""
    sampling, length = request.sampling, len(request.tokens)
    for name in _MISSING:
        if getattr(sampling, name) not in (None, {}, []):
            raise UnsupportedParameter(f"the sim engine has no {name}", param=name)
    if not length:
        raise InvalidRequest("the prompt is empty")
    if length >= max_model_len:
        raise InvalidRequest(
            f"the prompt has {length} tokens and this model takes {max_model_len}, one of them for the output"
        )
    if sampling.max_tokens < 1:
        raise InvalidRequest("max_tokens must be at least 1", param="max_tokens")
    if max(request.tokens) >= vocabulary:
        raise InvalidRequest(f"the prompt has a token id beyond the vocabulary of {vocabulary}")
