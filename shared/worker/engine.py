"""What Baton asks of an engine. `vllm` implements it; one contract suite runs over every implementation."""

from collections.abc import AsyncGenerator
from typing import Any, Protocol

import msgspec

from shared import wire


class KvPlan(msgspec.Struct, frozen=True, kw_only=True):
    """Which slots of the node's arena hold, or are to hold, a prompt's blocks. Travels as `kv_transfer_params`.

    `slots[i]` and `words[i]` belong to block i. The first `load` blocks are committed: copied into the engine's pages
    instead of being computed, unless the engine has them itself. With `save`, blocks for which `write[i]` is true are
    copied out and committed as soon as they are computed. With `keep`, all full blocks, those of generated tokens too,
    are stored when the request has ended, if there is room: the next turn begins with them.
    """

    arena: str
    lease: str
    slots: list[int]
    words: list[int]
    load: int = 0
    save: bool = False
    write: list[bool] = []
    keep: bool = False
    salt: str = ""  # the tenant's, as hex: names the blocks that are kept


class EngineRequest(msgspec.Struct, frozen=True, kw_only=True):
    id: str  # unique for ever in this engine
    tokens: list[int]
    sampling: wire.Sampling
    kv: KvPlan | None = None
    salt: str = ""  # keeps tenants apart in the engine's own prefix cache
    priority: int = 0
    replay: list[bytes] = []  # packed ids, one entry a choice: what its output must begin with
    trace_headers: dict[str, str] = {}


class EngineDelta(msgspec.Struct, frozen=True, kw_only=True):
    """New tokens of one choice. `finish` is set on the last delta of the choice."""

    choice: int
    text: str
    tokens: list[int]
    logprobs: list[wire.TokenLogprob] | None = None
    prompt_logprobs: list[wire.TokenLogprob | None] | None = None  # of the whole prompt, with a choice's first delta
    finish: wire.Finish | None = None
    cached_tokens: int = 0  # prompt tokens that this engine did not compute
    loaded_tokens: int = 0  # of those, copied out of the node's store; with the last delta
    computed_tokens: int | None = None  # prompt tokens that this engine's steps computed; with the last delta, if known
    recomputed_tokens: int = 0  # promised by the KvPlan and computed after all; with the last delta
    unkept_tokens: int = 0  # not stored for the next turn: too many were waiting for that; with the last delta


class EngineInfo(msgspec.Struct, frozen=True, kw_only=True):
    name: str  # vllm | sim
    max_model_len: int
    max_running: int
    step_tokens: int = 0  # the most that a step computes; 0: not known
    kv_blocks: int  # of the engine's own cache
    kv_tokens: int = 0  # how many those hold
    splits: bool  # False: this model's KV cannot be handed over; serve it whole
    forces: bool = False  # takes requests with `replay`
    details: dict[str, Any] = {}


class EngineLoad(msgspec.Struct, frozen=True, kw_only=True):
    running: int = 0
    waiting: int = 0
    kv_usage: float = 0.0
    preemptions: int = 0
    computed_prompt_tokens: int = 0  # counted by the engine itself
    decode_step_s: float = 0.0  # with as many sequences as run now; 0: not known yet
    decode_sequence_s: float = 0.0  # more with every further one


class Engine(Protocol):
    """One engine in this process's care.

    Invariants: `generate` ends after the last choice's `finish`; closing the iterator aborts the request in the
    engine; after `close` no process of the engine is left. What follows a `replay` is what would have followed if the
    engine had chosen those tokens itself: penalties, grammar, seed and all.
    """

    @property
    def info(self) -> EngineInfo: ...

    def generate(self, request: EngineRequest) -> AsyncGenerator[EngineDelta, None]:
        """Raises EngineFailed when the engine has died, InvalidRequest for parameters that it refuses."""
        ...

    def load(self) -> EngineLoad: ...

    async def check_health(self) -> None:
        """Ask for a sign of life, without waiting for it. Raises EngineFailed when the engine has died."""
        ...

    def silent_s(self) -> float:
        """Seconds without a sign of life; see liveness.py. To be asked about once a second, after `check_health`."""
        ...

    async def close(self) -> None: ...
