"""The `baton` command with stand-ins for the services; NATS and Redis are real."""

import sys

from services.launcher.__main__ import installed_programs, main
from services.launcher.plan import Programs


def stand_ins() -> Programs:
    services = {
        role: (sys.executable, "-m", "tests.support.stand_in", role) for role in ("kv", "prefill", "decode", "gateway")
    }
    return {**installed_programs(), **services}


if __name__ == "__main__":
    sys.exit(main(programs=stand_ins))
