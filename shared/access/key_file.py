"""Keys in a YAML file: read whole, changed under a lock, replaced in one step, readable by its owner only.

Invariant: whoever reads sees the file before a change or after it, never half of it.
"""

import contextlib
import fcntl
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import yaml

from shared.access.key import BadKey, Key, check_unique, read_key

HEAD = """\
# Written by `baton keys`, and may be edited: gateways see a change within about a second.
# `hash` is the SHA-256 of a key; the key itself is kept nowhere.
"""
# The C parser, where PyYAML was built with it, is ten times as fast.
_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def read(path: Path) -> list[Key]:
    """Raises BadKey that names the entry, OSError where the file cannot be read."""
    return parse(path.read_bytes())


def parse(data: bytes) -> list[Key]:
    try:
        loaded = yaml.load(data, Loader=_Loader)  # noqa: S506 - a safe loader
    except (yaml.YAMLError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        # The parser's own words quote the file.
        raise BadKey(f"not valid YAML{f' in line {mark.line + 1}' if mark else ''}") from None
    if loaded is None:
        return []
    entries = loaded.get("keys") if isinstance(loaded, dict) else None
    if not isinstance(loaded, dict) or set(loaded) != {"keys"} or not isinstance(entries, list | None):
        raise BadKey("it must hold one mapping with `keys`, a list, and nothing else")
    keys = [read_key(entry, f"entry {number}") for number, entry in enumerate(entries or [], start=1)]
    check_unique(keys)
    return keys


def change(path: Path, edit: Callable[[list[Key]], list[Key]]) -> None:
    """Read, edit and replace. Raises BadKey, OSError, or what `edit` raises; then nothing is changed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with _locked(path):
        keys = edit(read(path) if path.exists() else [])
        check_unique(keys)
        _replace(path, HEAD + yaml.safe_dump({"keys": [_plain(key) for key in keys]}, sort_keys=False))


def _plain(key: Key) -> dict[str, Any]:
    values: dict[str, Any] = msgspec.to_builtins(key)
    return {name: value for name, value in values.items() if value not in (None, "", 0, [])}


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    descriptor = os.open(path.with_name(f".{path.name}.lock"), os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _replace(path: Path, text: str) -> None:
    new = path.with_name(f".{path.name}.new")
    new.unlink(missing_ok=True)
    descriptor = os.open(new, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    new.replace(path)
