"""What a planner tells a copier in one engine step: pages to load, pages to save."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Page:
    """One KV block in both worlds."""

    block: int  # position in the prompt, and in the lease
    block_id: int  # the engine's page
    slot: int  # the arena's
    word: int  # generation word that the slot must show


@dataclass(frozen=True)
class Load:
    """Copy committed slots into pages; ends in exactly one completion, also after an abort."""

    request: str  # the engine's id
    arena: str
    lease: str
    pages: list[Page]
    in_step: bool = False  # before the step that asks for it is computed, which reads them; else beside the steps


@dataclass(frozen=True)
class Save:
    """Copy freshly computed pages into reserved slots and commit them."""

    arena: str
    lease: str
    pages: list[Page]


@dataclass(frozen=True)
class KeepCopy:
    """Store the full blocks of a request that has ended, for the next turn; its pages are held until that is done."""

    request: str  # the engine's id
    salt: bytes
    tokens: bytes  # packed; of whole blocks
    block_ids: list[int]  # the engine's pages, from the first block on


@dataclass
class StepPlan:
    loads: list[Load] = field(default_factory=list)
    saves: list[Save] = field(default_factory=list)
    keeps: list[KeepCopy] = field(default_factory=list)
    idle: bool = False  # nothing is computed in this step, so a load may be waited for
