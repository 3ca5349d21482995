"""`baton keys`: make, show and end API keys, and read what was used."""

import argparse
import datetime as dt
import json
import sys
from collections.abc import Mapping, Sequence

import msgspec

from services.launcher.key_store import IN_REDIS, KeyStore, configured, find_redis_url, find_store, in_redis
from services.launcher.refusal import UserError
from services.launcher.state import ClusterFolder, ClusterRecord
from shared.access import usage_table
from shared.access.key import USUAL_TIERS, BadKey, digest, new_id, new_secret, read_key
from shared.access.usage_table import KINDS, UsageRow

MOST_DAYS = usage_table.KEEP_S // 86_400


def keys(flags: argparse.Namespace, folder: ClusterFolder, environ: Mapping[str, str]) -> int:
    record = folder.read()
    if flags.action == "usage":
        return _usage(flags, record, environ)
    store = find_store(flags.file, record, environ)
    if flags.action == "add":
        return _add(flags, store, record, environ)
    if flags.action == "list":
        return _list(store, as_json=flags.json)
    if not store.revoke(flags.id):
        raise UserError(f"there is no key {flags.id} in {store.name}: see baton keys list")
    print(f"Revoked {flags.id} in {store.name}. Gateways that read it refuse the key within about a second.")
    return 0


def _add(flags: argparse.Namespace, store: KeyStore, record: ClusterRecord | None, environ: Mapping[str, str]) -> int:
    secret = new_secret()
    entry = {
        "id": new_id(),
        "hash": digest(secret),
        "tenant": flags.tenant,
        "name": flags.name,
        "tiers": list(dict.fromkeys(flags.tier or USUAL_TIERS)),
        "models": list(dict.fromkeys(flags.model)),
        "requests_per_minute": flags.requests_per_minute,
        "tokens_per_minute": flags.tokens_per_minute,
        "created": dt.datetime.now(dt.UTC).date(),
    }
    try:
        key = read_key(entry, "this key")
    except BadKey as error:
        raise UserError(str(error)) from error
    store.add(key)
    # The key alone on stdout, so that it can be taken into a variable; all else beside it.
    print(secret, flush=True)
    print(f"\nThis is {key.id} of tenant {key.tenant}, kept in {store.name}.", file=sys.stderr)
    print("Copy the key now: only its hash is kept, so it is never shown again.", file=sys.stderr)
    print("  use it     as api_key of any OpenAI client, or BATON_API_KEY=… baton chat 'Hello'", file=sys.stderr)
    print(f"  end it     baton keys revoke {key.id}", file=sys.stderr)
    if record is not None and not configured(record, environ):
        print("The cluster that runs now wants no keys: start it with baton up --keys", file=sys.stderr)
    elif record is None:
        where = IN_REDIS if configured(record, environ) == IN_REDIS else store.name
        print(f"  ask for it baton up --keys {where}", file=sys.stderr)
    return 0


def _list(store: KeyStore, *, as_json: bool) -> int:
    found = store.read()
    if as_json:
        shown = [{name: value for name, value in msgspec.to_builtins(key).items() if name != "hash"} for key in found]
        print(json.dumps(shown, indent=2))
        return 0
    if not found:
        print(f"No keys in {store.name}: make one with baton keys add --tenant NAME")
        return 0
    rows = [
        (
            key.id,
            key.tenant,
            key.name or "-",
            ",".join(key.tiers),
            ",".join(key.models) or "all",
            _limit(key.requests_per_minute),
            _limit(key.tokens_per_minute),
            str(key.created or "-"),
        )
        for key in found
    ]
    _print_table(("id", "tenant", "name", "tiers", "models", "requests/min", "tokens/min", "created"), rows)
    return 0


def _usage(flags: argparse.Namespace, record: ClusterRecord | None, environ: Mapping[str, str]) -> int:
    if not 1 <= flags.days <= MOST_DAYS:
        raise UserError(f"--days must be between 1 and {MOST_DAYS}, not {flags.days}")
    if record is None and "BATON_REDIS_URL" not in environ:
        raise UserError("usage is kept in the cluster's Redis and no cluster runs: start it with baton up --keys")
    url, cluster = find_redis_url(record, environ)
    last = dt.datetime.now(dt.UTC).date()
    days = [(last - dt.timedelta(days=back)).isoformat() for back in reversed(range(flags.days))]
    rows = in_redis(url, lambda redis: usage_table.read(redis, cluster, days))
    rows = [row for row in rows if flags.tenant in (None, row.tenant)]
    if flags.json:
        print(json.dumps([_flat(row) for row in rows], indent=2))
    elif rows:
        head = ("day", "tenant", "model", *KINDS)
        _print_table(head, [tuple(str(value) for value in _flat(row).values()) for row in rows])
    else:
        print("Nothing was used in these days; usage is kept by clusters that want keys.")
    return 0


def _flat(row: UsageRow) -> dict[str, str | int]:
    return {
        "day": row.day,
        "tenant": row.tenant,
        "model": row.model,
        **{kind: getattr(row.used, kind) for kind in KINDS},
    }


def _limit(limit: int) -> str:
    return str(limit) if limit else "-"


def _print_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    widths = [max(len(row[column]) for row in (head, *rows)) for column in range(len(head))]
    for row in (head, *rows):
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
