"""Workload files: YAML that says what clients ask for; lengths are in tokens. Unknown keys are refused by name."""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import msgspec
import yaml

from loadtest.load.conversation import Conversation, Turn
from loadtest.load.lengths import Length, count, draw
from loadtest.load.prompts import GROUP_STREAM, OWN_STREAM, Segment, mixed
from shared.errors import SettingsError

SHIPPED = Path(__file__).parent / "workloads"
MAX_TURNS = 1000
STREAMS_EACH = MAX_TURNS + 1  # of a conversation: one a turn
MAX_PARTS = 64


class SharedPrefix(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Conversations belong to one of `groups`; those of a group begin with the same `tokens`."""

    groups: int
    tokens: int

    def __post_init__(self) -> None:
        if self.groups < 1 or self.tokens < 1:
            raise ValueError("shared_prefix: groups and tokens are at least 1")


class Part(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    workload: str
    weight: float = 1.0

    def __post_init__(self) -> None:
        if not self.weight > 0:
            raise ValueError("weight: must be more than 0")


class Workload(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One kind of client. `prompt_tokens`: what a turn adds, without the shared prefix."""

    description: str = ""
    api: Literal["chat", "completions"] = "completions"
    prompt_tokens: Length
    output_tokens: Length
    shared_prefix: SharedPrefix | None = None
    turns: Length = 1.0
    think_s: Length = 0.0  # from an answer to the same client's next turn, and in a closed loop to its next request


class Mix(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Several kinds at once, by weight."""

    description: str = ""
    mix: list[Part]

    def __post_init__(self) -> None:
        if not 1 <= len(self.mix) <= MAX_PARTS:
            raise ValueError(f"mix: 1 to {MAX_PARTS} workloads")


class Change(msgspec.Struct, frozen=True, kw_only=True):
    """What the command line says over the file."""

    seed: int = 0
    length_scale: float = 1.0
    api: Literal["chat", "completions"] | None = None
    think_s: float | None = None


class WorkloadSource:
    """`Source` of one workload. `family`: its place in a mix, so that parts share no tokens."""

    size: int | None = None
    arrivals_s: Sequence[float] | None = None

    def __init__(self, name: str, workload: Workload, change: Change, family: int = 0) -> None:
        self.name = name
        self._workload, self._change, self._family = workload, change, family

    def conversation(self, index: int) -> Conversation:
        shape, change = self._workload, self._change
        rng = random.Random(mixed(change.seed, self._family, index))
        turns = min(MAX_TURNS, count(shape.turns, rng))
        first = OWN_STREAM + (self._family << 40) + index * STREAMS_EACH
        return Conversation(
            chat=(change.api or shape.api) == "chat",
            system=self._system(rng),
            turns=tuple(self._turn(first + number, rng) for number in range(turns)),
        )

    def described(self) -> dict[str, object]:
        described: dict[str, object] = msgspec.to_builtins(self._workload)
        return described

    def _system(self, rng: random.Random) -> Segment | None:
        prefix = self._workload.shared_prefix
        if prefix is None:
            return None
        group = GROUP_STREAM + (self._family << 40) + rng.randrange(prefix.groups)
        return Segment(group, max(1, round(self._change.length_scale * prefix.tokens)))

    def _turn(self, stream: int, rng: random.Random) -> Turn:
        shape, change = self._workload, self._change
        return Turn(
            say=(Segment(stream, count(shape.prompt_tokens, rng, change.length_scale)),),
            output_tokens=count(shape.output_tokens, rng, change.length_scale),
            think_s=draw(shape.think_s, rng) if change.think_s is None else change.think_s,
        )


class MixedSource:
    """`Source` of a mix."""

    size: int | None = None
    arrivals_s: Sequence[float] | None = None

    def __init__(self, name: str, parts: list[tuple[float, WorkloadSource]], seed: int) -> None:
        self.name = name
        self._sources = [source for _, source in parts]
        self._weights = [weight for weight, _ in parts]
        self._seed = seed

    def conversation(self, index: int) -> Conversation:
        rng = random.Random(mixed(self._seed, -1, index))
        return rng.choices(self._sources, self._weights)[0].conversation(index)

    def described(self) -> dict[str, object]:
        parts = zip(self._sources, self._weights, strict=True)
        return {"mix": [{"workload": one.name, "weight": weight, **one.described()} for one, weight in parts]}


def shipped() -> list[str]:
    return sorted(path.stem for path in SHIPPED.glob("*.yaml"))


def find(name: str) -> Path | None:
    """A shipped workload by name, or a YAML file by path."""
    path = SHIPPED / f"{name}.yaml"
    if path.parent == SHIPPED and path.is_file():
        return path
    given = Path(name)
    return given if given.suffix in (".yaml", ".yml") else None


def load(path: Path, change: Change) -> WorkloadSource | MixedSource:
    """Raises SettingsError, one line that names the file and the key."""
    found = _read(path)
    if isinstance(found, Workload):
        return WorkloadSource(path.stem, found, change)
    parts = []
    for family, part in enumerate(found.mix, start=1):
        inner_path = find(part.workload)
        if inner_path is None:
            raise SettingsError(f"{path}: mix: no workload {part.workload}; there are {', '.join(shipped())}")
        if not inner_path.is_absolute():
            inner_path = path.parent / inner_path
        inner = _read(inner_path)
        if isinstance(inner, Mix):
            raise SettingsError(f"{path}: mix: {part.workload} is a mix itself; name its parts")
        parts.append((part.weight, WorkloadSource(inner_path.stem, inner, change, family)))
    return MixedSource(path.stem, parts, change.seed)


def _read(path: Path) -> Workload | Mix:
    try:
        raw = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}:" if mark else ""
        said = getattr(error, "problem", None) or str(error).partition("\n")[0]
        raise SettingsError(f"{path}:{where} no valid YAML: {said}") from None
    if not isinstance(raw, dict):
        raise SettingsError(f"{path}: a workload is a mapping of keys, such as prompt_tokens and output_tokens")
    kind: type[Workload | Mix] = Mix if "mix" in raw else Workload
    try:
        return msgspec.convert(raw, kind)
    except msgspec.ValidationError as error:
        known = ", ".join(kind.__struct_fields__)
        raise SettingsError(f"{path}: {error}; known keys: {known}") from None
