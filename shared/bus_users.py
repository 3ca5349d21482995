"""Who may say and hear what on the bus: one NATS user for each role, with its subjects.

`python -m shared.bus_users CLUSTER` prints the users as NATS reads them, with passwords from its environment.
Invariants: nobody but a gateway can send decode jobs or cancel any; prefill jobs come from gateways, and from workers
that have accepted the decode job which names the prefill worker; nobody but a worker sends tokens, nobody beats as
another role, and answers go only to who has asked.
"""

import sys
from collections.abc import Callable

import msgspec

from shared import subjects
from shared.bus_login import inbox

OPERATOR = "operator"  # a person: baton status, baton tap
ROLES = ("gateway", "prefill", "decode", "kv")
ANY = "*"
# An answer to a job may come as late as the longest request ends.
REPLY_S = 900


class Rights(msgspec.Struct, frozen=True, kw_only=True):
    publish: tuple[str, ...]
    subscribe: tuple[str, ...]


def rights(cluster: str, role: str) -> Rights:
    """Of a role. All hear all beats: they say who is there."""
    c = cluster
    own = (inbox(role) + ".>", subjects.all_beats(c), subjects.ping(c, ANY), subjects.metrics(c, ANY))
    if role == "gateway":
        return Rights(
            publish=(
                *(named(c, ANY) for named in (subjects.decode, subjects.prefill, subjects.cancel, subjects.kv)),
                *(named(c, ANY) for named in (subjects.ping, subjects.metrics, subjects.trace)),
                *(subjects.beat(c, role, ANY), subjects.wanted(c), subjects.traffic(c, ANY)),
            ),
            subscribe=(
                *(*own, subjects.all_traffic(c)),
                *(named(c, ANY) for named in (subjects.gateway, subjects.spans, subjects.trace)),
            ),
        )
    if role == "kv":
        return Rights(
            publish=(subjects.kv(c, ANY), subjects.beat(c, role, ANY), subjects.spans(c, ANY)),
            subscribe=(*own, subjects.kv(c, ANY), subjects.wanted(c)),
        )
    # Work is what is advertised, not the pool: both kinds of workers take both kinds of jobs.
    tests = subjects.selftests(c)
    return Rights(
        publish=(
            *(subjects.gateway(c, ANY), subjects.prefill(c, ANY), *tests),
            *(subjects.kv(c, ANY), subjects.beat(c, role, ANY), subjects.spans(c, ANY)),
        ),
        subscribe=(
            *(*own, subjects.wanted(c), *tests),
            *(named(c, ANY) for named in (subjects.decode, subjects.prefill, subjects.cancel)),
        ),
    )


def authorization(cluster: str, password: Callable[[str], str]) -> str:
    """The users as a part of a NATS configuration. `password`: of a user, as it is to be written there."""
    lines = ["authorization {", "  users: ["]
    for role in ROLES:
        has = rights(cluster, role)
        lines += [
            f"    {{ user: {role}, password: {password(role)}, permissions: {{",
            f"      publish: {{ allow: {_listed(has.publish)} }}",
            f"      subscribe: {{ allow: {_listed(has.subscribe)} }}",
            f'      allow_responses: {{ max: 1, expires: "{REPLY_S}s" }}',
            "    } }",
        ]
    lines += [f"    {{ user: {OPERATOR}, password: {password(OPERATOR)} }}", "  ]", "}", ""]
    return "\n".join(lines)


def from_environment(user: str) -> str:
    """NATS puts the variable's value here."""
    return f"$NATS_{user.upper()}_PASSWORD"


def _listed(names: tuple[str, ...]) -> str:
    return "[" + ", ".join(f'"{name}"' for name in names) + "]"


if __name__ == "__main__":
    sys.stdout.write(authorization(sys.argv[1], from_environment))
