"""The `baton` command: starts a whole cluster on one machine, and looks after it."""

import argparse
import os
import signal
import sys
from collections.abc import Callable, Sequence

from services.launcher.brokers import find_nats, find_redis
from services.launcher.commands.chat import chat
from services.launcher.commands.config import config
from services.launcher.commands.down import down
from services.launcher.commands.keys import keys
from services.launcher.commands.logs import logs
from services.launcher.commands.status import status
from services.launcher.commands.tap import tap
from services.launcher.commands.trace import trace
from services.launcher.commands.up import up
from services.launcher.options import given_settings, home, port_option, read_flags, up_options
from services.launcher.plan import Programs
from services.launcher.refusal import UserError
from services.launcher.state import ClusterFolder
from shared.errors import SettingsError

REFUSED = 2
INTERRUPTED = 128 + signal.SIGINT


def installed_programs() -> Programs:
    """The command of each role. -P: a folder named `services` where the user happens to be is not ours."""
    python = (sys.executable, "-P", "-m")
    return {
        "nats": (find_nats(),),
        "redis": (find_redis(),),
        "kv": (*python, "services.kv_transfer"),
        "prefill": (*python, "services.prefill_worker"),
        "decode": (*python, "services.decode_worker"),
        "gateway": (*python, "services.gateway"),
    }


def main(argv: Sequence[str] | None = None, programs: Callable[[], Programs] = installed_programs) -> int:
    """Returns the exit code: 0 done, 1 failed or not ready, 2 refused in one line on stderr."""
    try:
        return _run(read_flags(argv), programs)
    except (UserError, SettingsError) as error:
        print(f"baton: {error}", file=sys.stderr)
        return REFUSED
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:  # e.g. baton logs | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _run(flags: argparse.Namespace, programs: Callable[[], Programs]) -> int:
    # A setting that only `up` would refuse must not keep `down` from its work.
    given = given_settings(os.environ) if flags.command in ("up", "config") else _only_port()
    port = port_option(flags, given)
    folder = ClusterFolder(home(), port)
    if flags.command == "up":
        return up(up_options(flags, given), folder, programs())
    if flags.command == "config":
        return config(up_options(flags, given), folder, programs())
    if flags.command == "status":
        return status(folder, port, as_json=flags.json)
    if flags.command == "down":
        return down(folder, port)
    if flags.command == "chat":
        key = flags.key or os.environ.get("BATON_API_KEY", "")
        text = " ".join(flags.text)
        return chat(folder, port, text, temperature=flags.temperature, max_tokens=flags.max_tokens, key=key)
    if flags.command == "keys":
        return keys(flags, folder, os.environ)
    if flags.command == "logs":
        return logs(folder, port, flags.id, follow=flags.follow)
    if flags.command == "trace":
        key = flags.key or os.environ.get("BATON_API_KEY", "")
        return trace(folder, port, flags.id, order=flags.order or "", as_json=flags.json, key=key)
    return tap(folder, port, flags.subject, flags.count)


def _only_port() -> dict[str, str]:
    return {"port": os.environ["BATON_PORT"]} if "BATON_PORT" in os.environ else {}


if __name__ == "__main__":
    sys.exit(main())
