"""The `baton` command, with a fault proxy in front of every kv_transfer."""

import sys

from services.launcher.__main__ import installed_programs, main
from services.launcher.plan import Programs


def proxied() -> Programs:
    return {**installed_programs(), "kv": (sys.executable, "-m", "tests.support.proxied_kv")}


if __name__ == "__main__":
    sys.exit(main(programs=proxied))
