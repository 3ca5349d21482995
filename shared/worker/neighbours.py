"""Who is in the cluster that a worker joins: one that serves another model than all others is in the wrong one."""

import asyncio

from nats.aio.subscription import Subscription

from shared import subjects, wire
from shared.bus import Bus
from shared.errors import SettingsError

LISTEN_S = 0.5  # at least two beats of everybody; an engine takes longer to load


class Neighbours:
    """Listen, load the engine, then check."""

    def __init__(self) -> None:
        self._models: dict[str, str] = {}  # by model, the last who said it
        self._since = asyncio.get_running_loop().time()
        self._subscription: Subscription | None = None

    @classmethod
    async def listen(cls, bus: Bus, cluster: str) -> "Neighbours":
        neighbours = cls()
        neighbours._subscription = await bus.listen(subjects.all_beats(cluster), neighbours.hear)
        return neighbours

    def hear(self, beat: wire.AnyMessage) -> None:
        if isinstance(beat, wire.Heartbeat) and beat.model:
            self._models[beat.model] = beat.id

    async def check(self, model: str) -> None:
        """Raises SettingsError when others are there and none serves this model."""
        left_s = self._since + LISTEN_S - asyncio.get_running_loop().time()
        await asyncio.sleep(max(0.0, left_s))
        if self._subscription is not None:
            await self._subscription.unsubscribe()
        if self._models and model not in self._models:
            other, worker = next(iter(self._models.items()))
            raise SettingsError(
                f"setting 'served_model_name': {worker} serves {other!r} and this worker would serve {model!r}: "
                "give all of them the same BATON_MODEL and BATON_SERVED_MODEL_NAME, or this one another BATON_CLUSTER"
            )
