"""The flags of `baton keys`."""

import argparse

from shared.access.key import TIERS, USUAL_TIERS


def add_keys_flags(command: argparse.ArgumentParser, default_port: int) -> None:
    actions = command.add_subparsers(dest="action", required=True, metavar="add|list|revoke|usage")
    for name, what in (
        ("add", "make a key, and print it: it is shown this once"),
        ("list", "show the keys that there are; never the keys themselves"),
        ("revoke", "end a key; gateways know it within about a second"),
        ("usage", "tokens used, by day (UTC), tenant and model"),
    ):
        action = actions.add_parser(name, help=what, description=what, allow_abbrev=False)
        action.add_argument("--port", type=int, help=f"the cluster's port (default {default_port})")
        if name != "usage":
            action.add_argument(
                "--file", metavar="PATH", help="where the keys are (default: where the running cluster has them)"
            )
        _add_own(name, action)


def _add_own(name: str, action: argparse.ArgumentParser) -> None:
    add = action.add_argument
    if name == "add":
        add("--tenant", required=True, metavar="T", help="who pays; limits are each key's, usage is each tenant's")
        add("--name", default="", metavar="N", help="a note for whoever lists the keys")
        add("--tier", action="append", choices=TIERS, help=f"may be repeated (default {', '.join(USUAL_TIERS)})")
        add("--model", action="append", default=[], metavar="NAME", help="may be repeated (default: all models)")
        add("--requests-per-minute", type=int, default=0, metavar="N", help="default 0: no limit")
        add("--tokens-per-minute", type=int, default=0, metavar="N", help="of prompts and answers; default 0: no limit")
    elif name == "revoke":
        add("id", metavar="ID", help="as baton keys list shows it")
    elif name == "usage":
        add("--tenant", metavar="T", help="only this one")
        add("--days", type=int, default=30, metavar="N", help="how many, today included (default 30)")
    if name in ("list", "usage"):
        add("--json", action="store_true", help="as JSON")
