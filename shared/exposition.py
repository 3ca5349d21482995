"""A service's metrics as Prometheus text with `service` and `instance` labels, asked for over the bus, and many as one.

Invariant: one HELP and TYPE a family, all its samples below them, whoever they come from.
"""

from collections.abc import Iterable

from prometheus_client import CollectorRegistry, generate_latest

from shared import subjects, wire
from shared.bus import Bus
from shared.errors import Internal

HELP = "# HELP "


async def serve_metrics(bus: Bus, cluster: str, service: str, instance: str, registry: CollectorRegistry) -> None:
    """Answer on {c}.metrics.{id}."""

    async def answer(message: wire.AnyMessage, _: object) -> wire.Message:
        if not isinstance(message, wire.MetricsAsked):
            raise Internal(f"a metrics subject got {type(message).__name__}")
        return wire.MetricsText(text=labelled(registry, service, instance))

    await bus.serve(subjects.metrics(cluster, instance), answer)


def labelled(registry: CollectorRegistry, service: str, instance: str) -> str:
    """Prometheus's text; every sample says whose it is."""
    label = f'service="{service}",instance="{instance}"'
    return "\n".join(_with(label, line) for line in generate_latest(registry).decode().splitlines()) + "\n"


def _with(label: str, line: str) -> str:
    if line.startswith("#"):
        return line
    name, brace, rest = line.partition("{")
    if brace and " " not in name:
        return f"{name}{{{label},{rest}"
    name, _, value = line.partition(" ")
    return f"{name}{{{label}}} {value}"


def merged(pages: Iterable[str]) -> str:
    """Families of the same name and type become one; one whose type differs from the first's is left out."""
    heads: dict[str, str] = {}
    bodies: dict[str, list[str]] = {}
    for page in pages:
        for family in page.split(HELP)[1:]:
            told, _, rest = family.partition("\n")
            typed, _, samples = rest.partition("\n")
            name = told.partition(" ")[0]
            if name not in heads:
                heads[name] = f"{HELP}{told}\n{typed}\n"
                bodies[name] = []
            elif not heads[name].endswith(f"\n{typed}\n"):
                continue
            bodies[name].append(samples)
    return "".join(heads[name] + "".join(bodies[name]) for name in heads)
