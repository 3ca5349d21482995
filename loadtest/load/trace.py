"""Recorded traffic: who asked how much, when. Two formats, told apart by their content; plain, gzip or xz.

Mooncake (JSON lines): `timestamp` in ms, `input_length`, `output_length`, `hash_ids` of 512-token blocks. Equal ids
are made equal tokens, so prompts share the prefixes that they shared when they were recorded. Ids stand for whole
prefixes, so an id always has the same place in a prompt. Azure (CSV): `TIMESTAMP`, `ContextTokens`, `GeneratedTokens`.
"""

import csv
import gzip
import io
import itertools
import zlib
from collections.abc import Iterable, Iterator, Sequence
from datetime import datetime
from pathlib import Path

import msgspec

from loadtest.load.conversation import Conversation, Turn
from loadtest.load.prompts import OWN_STREAM, Segment
from shared.errors import SettingsError

SHIPPED = Path(__file__).parent / "traces"
BLOCK_TOKENS = 512  # of Mooncake's hash ids
AZURE_COLUMNS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
MAX_TOKENS = 10_000_000
GZIP_MAGIC, XZ_MAGIC = b"\x1f\x8b", b"\xfd7zXZ\x00"
SUFFIXES = (".jsonl", ".csv", ".gz", ".xz", ".txt", ".json")


class Entry(msgspec.Struct, frozen=True, gc=False):
    """One request. `blocks`: ids, empty where the trace has none."""

    at_s: float
    prompt_tokens: int
    output_tokens: int
    blocks: tuple[int, ...] = ()


class Window(msgspec.Struct, frozen=True, kw_only=True):
    """Which part of a trace, how fast, how long its prompts. `minutes`: None for all."""

    start_minute: float = 0.0
    minutes: float | None = None
    time_scale: float = 1.0
    length_scale: float = 1.0

    def __post_init__(self) -> None:
        for name, value in (("time-scale", self.time_scale), ("length-scale", self.length_scale)):
            if not 0 < value < float("inf"):
                raise SettingsError(f"--{name}: must be more than 0")
        if self.start_minute < 0 or (self.minutes is not None and not self.minutes > 0):
            raise SettingsError("--start-minute: at least 0; --minutes: more than 0")


class TraceSource:
    """`Source` of a part of a trace: one conversation an entry."""

    def __init__(
        self, name: str, entries: Sequence[Entry], window: Window, api: str = "completions", think_s: float = 0.0
    ) -> None:
        self.name = name
        self._window, self._api, self._think_s = window, api, think_s
        begin_s = 60 * window.start_minute
        end_s = float("inf") if window.minutes is None else begin_s + 60 * window.minutes
        origin_s = entries[0].at_s
        self._entries = [entry for entry in entries if begin_s <= entry.at_s - origin_s < end_s]
        if not self._entries:
            last_min = (entries[-1].at_s - origin_s) / 60
            raise SettingsError(f"--start-minute, --minutes: no request there; {name} has {last_min:.1f} minutes")
        self.size: int | None = len(self._entries)
        # From the window's start, not from its first request: a quiet beginning belongs to the recording.
        self.arrivals_s: Sequence[float] | None = [
            (entry.at_s - origin_s - begin_s) / window.time_scale for entry in self._entries
        ]

    def conversation(self, index: int) -> Conversation:
        entry, scale = self._entries[index], self._window.length_scale
        tokens = max(1, round(scale * entry.prompt_tokens))
        turn = Turn(
            say=tuple(_segments(entry.blocks, tokens, scale))
            if entry.blocks
            else (Segment(OWN_STREAM + index, tokens),),
            output_tokens=max(1, round(scale * entry.output_tokens)),
            think_s=self._think_s,
        )
        return Conversation(chat=self._api == "chat", turns=(turn,))

    def described(self) -> dict[str, object]:
        return {"trace": self.name, "requests": self.size, **msgspec.to_builtins(self._window)}


def _segments(blocks: Sequence[int], tokens: int, scale: float) -> Iterator[Segment]:
    """Blocks shrink with the lengths; a block's borders depend on its place only, so equal prefixes stay equal."""
    borders = [min(tokens, round(scale * BLOCK_TOKENS * number)) for number in range(len(blocks))] + [tokens]
    for block, (begin, end) in zip(blocks, itertools.pairwise(borders), strict=True):
        if end > begin:
            yield Segment(block, end - begin)


def shipped() -> list[str]:
    return sorted(path.name.split(".")[0] for path in SHIPPED.iterdir() if path.suffix in SUFFIXES)


def find(name: str) -> Path | None:
    """A shipped excerpt by name, or a file by path."""
    for path in SHIPPED.iterdir():
        if path.suffix in SUFFIXES and path.name.split(".")[0] == name:
            return path
    given = Path(name)
    return given if given.suffix in SUFFIXES or given.is_file() else None


def read(path: Path) -> list[Entry]:
    """Raises SettingsError, one line that names the file and the line."""
    try:
        text = _unpacked(path, path.read_bytes()).decode("utf-8-sig")
    except OSError as error:
        raise SettingsError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise SettingsError(f"{path}: neither JSON lines nor CSV: it is not text") from None
    first = text.lstrip()[:1]
    if not first:
        raise SettingsError(f"{path}: the trace is empty")
    entries = list(_mooncake(path, text) if first == "{" else _azure(path, text))
    if not entries:
        raise SettingsError(f"{path}: the trace has no requests")
    return sorted(entries, key=lambda entry: entry.at_s)


def _unpacked(path: Path, data: bytes) -> bytes:
    damaged = f"{path}: the file is damaged: it cannot be unpacked"
    if data.startswith(GZIP_MAGIC):
        try:
            return gzip.decompress(data)
        except (EOFError, gzip.BadGzipFile, zlib.error):
            raise SettingsError(damaged) from None
    if data.startswith(XZ_MAGIC):
        try:
            import lzma
        except ImportError:  # some builds of Python lack it
            raise SettingsError(f"{path}: this Python cannot read xz; unpack the file") from None
        try:
            return lzma.decompress(data)
        except lzma.LZMAError:
            raise SettingsError(damaged) from None
    return data


class _Line(msgspec.Struct):
    timestamp: float
    input_length: int
    output_length: int
    hash_ids: tuple[int, ...] = ()


def _mooncake(path: Path, text: str) -> Iterator[Entry]:
    decoder = msgspec.json.Decoder(_Line)
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            found = decoder.decode(line)
        except msgspec.MsgspecError as error:
            raise SettingsError(f"{path}: line {number}: {error}") from None
        needed = -(-found.input_length // BLOCK_TOKENS)
        if found.hash_ids and len(found.hash_ids) != needed:
            raise SettingsError(
                f"{path}: line {number}: hash_ids has {len(found.hash_ids)} blocks, "
                f"input_length {found.input_length} needs {needed} of {BLOCK_TOKENS} tokens"
            )
        _check(path, number, found.timestamp, found.input_length, found.output_length)
        if any(not 0 <= one < OWN_STREAM for one in found.hash_ids):
            raise SettingsError(f"{path}: line {number}: hash_ids: numbers from 0 to {OWN_STREAM - 1}")
        yield Entry(found.timestamp / 1000, found.input_length, found.output_length, found.hash_ids)


def _azure(path: Path, text: str) -> Iterator[Entry]:
    rows: Iterable[list[str]] = csv.reader(io.StringIO(text))
    header: list[str] | None = None
    for number, row in enumerate(rows, start=1):
        if not row:
            continue
        if header is None:
            header = [cell.strip() for cell in row]
            if not set(AZURE_COLUMNS) <= set(header):
                raise SettingsError(
                    f"{path}: line {number}: neither a Mooncake trace (JSON lines) nor an Azure one "
                    f"(a CSV with {', '.join(AZURE_COLUMNS)})"
                )
            at, prompt, output = (header.index(name) for name in AZURE_COLUMNS)
            continue
        try:
            when_s = _seconds(row[at])
            entry = Entry(when_s, int(row[prompt]), int(row[output]))
        except (ValueError, IndexError):
            wanted = ", ".join(AZURE_COLUMNS)
            raise SettingsError(f"{path}: line {number}: not {wanted}: {','.join(row)[:80]!r}") from None
        _check(path, number, entry.at_s, entry.prompt_tokens, entry.output_tokens)
        yield entry


def _seconds(stamp: str) -> float:
    """Azure writes seven decimals; a plain number of seconds is taken too."""
    try:
        return float(stamp)
    except ValueError:
        whole, _, part = stamp.strip().removesuffix("Z").partition(".")
        return datetime.fromisoformat(f"{whole}+00:00").timestamp() + (float(f"0.{part}") if part else 0.0)


def _check(path: Path, number: int, at_s: float, prompt: int, output: int) -> None:
    if not (0 <= at_s < float("inf") and 1 <= prompt <= MAX_TOKENS and 0 <= output <= MAX_TOKENS):
        raise SettingsError(f"{path}: line {number}: times are at least 0, prompts 1 to {MAX_TOKENS:,} tokens")
