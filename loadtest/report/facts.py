"""What a run says about itself: the engine, the machine, the revision, the settings, and why not to trust it."""

import shlex
from collections.abc import Iterator
from typing import Any

import yaml

from loadtest.report import quantities as q
from loadtest.report.blocks import Engine
from loadtest.report.runs import Run
from loadtest.result import Git, Machine, Result, Target
from loadtest.slo import Slo

LATE_S = 0.010  # a generator later than this at its p99 measures itself
LATE_SHARE = 0.05  # or than this part of the TTFT bound, whichever is more
TOLD_ELSEWHERE = ("command", "out", "url", "slo.", "source")  # keys of the settings
BUSY_SHARE = 0.85  # of a core a process: above it the generator's own queueing shows


def engine(run: Run, *, several: bool) -> Engine:
    """The strip that says which engine ran."""
    return engine_of(run.result.target, run.label if several else "")


def engine_of(target: Target, label: str = "") -> Engine:
    """`label`: of the run, where the page has several."""
    kind = target.engine if target.engine in ("vllm", "sim") else "unknown"
    name = {"vllm": "vLLM", "sim": "sim", "unknown": target.engine}[kind]
    if kind == "sim":
        name += f" ({target.profile})" if target.profile else " (profile not recorded)"
    brief, note = {
        "vllm": ("real engines", "real vLLM engines ran the model"),
        "sim": (
            "no model ran",
            "simulated step times: no model ran, these are not measurements of a model on this machine",
        ),
        "unknown": ("the run could not tell", "the run could not tell which engine served it"),
    }[kind]
    told = f"{brief if label else note} \u00b7 arrangement: {arrangement_of(target)} \u00b7 model: {target.model}"
    return Engine(kind, f"engine: {name}", told, label)


def arrangement(result: Result) -> str:
    return arrangement_of(result.target)


def arrangement_of(target: Target) -> str:
    """`split (1 prefill, 2 decode)`."""
    workers = ", ".join(f"{number} {role}" for role, number in target.workers.items() if number)
    return f"{target.arrangement or 'unknown'} ({workers})" if workers else target.arrangement or "unknown"


def machine(result: Result) -> str:
    return machine_of(result.machine)


def machine_of(told: Machine) -> str:
    """One line; what is not known is left out."""
    size = f"{told.cores} cores, {q.significant(told.memory_gib)} GiB"
    parts = (told.cpu or "unknown processor", size, told.platform, told.python and f"Python {told.python}")
    return ", ".join(part for part in parts if part)


def revision(result: Result) -> str:
    return revision_of(result.git)


def revision_of(told: Git) -> str:
    return f"{(told.revision or 'unknown')[:12]}{' with uncommitted changes' if told.dirty else ''}"


def slo(result: Result) -> str:
    return slo_of(result.slo)


def slo_of(bound: Slo) -> str:
    return (
        f"first token within {q.bound(bound.ttft_s)} of the intended send time, "
        f"and {100 * bound.itl_share:g}\u00a0% of the gaps between tokens within {q.bound(bound.itl_s)}"
    )


def command(result: Result) -> str:
    """The command line as the settings hold it, or nothing."""
    told = result.settings.get("command")
    return shlex.join(str(part) for part in told) if isinstance(told, list) else str(told or "")


def workload(result: Result) -> str:
    """What was sent, as the workload's own YAML; without the keys that were not given."""
    told = _given(result.settings.get("source"))
    return yaml.safe_dump(told, sort_keys=False, default_flow_style=None, width=110).strip() if told else ""


def _given(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _given(inner) for key, inner in value.items() if inner is not None}
    return [_given(inner) for inner in value] if isinstance(value, list) else value


def settings(result: Result) -> list[tuple[str, str]]:
    """What was set, as dotted keys; without what the report tells elsewhere."""
    return [
        (key, value)
        for key, value in flat(result.settings)
        if value != q.UNKNOWN and not key.startswith(TOLD_ELSEWHERE)
    ]


def flat(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Nested settings as dotted keys with printable values."""
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from flat(inner, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list) and any(isinstance(inner, dict | list) for inner in value):
        for place, inner in enumerate(value):
            yield from flat(inner, f"{path}[{place}]")
    else:
        yield path, printable(value) or q.UNKNOWN


def printable(value: Any) -> str:
    if value is None or value in ("", {}):
        return q.UNKNOWN
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list):
        return ", ".join(printable(inner) for inner in value)
    return str(value)


def warnings(run: Run) -> list[str]:
    """Why this run's figures may not be what they seem: sentences, none where all is well."""
    result, client, found = run.result, run.result.client, []
    late_s = client.lateness_s.p99
    bound_s = max(LATE_S, LATE_SHARE * result.slo.ttft_s)
    if late_s is not None and late_s > bound_s:
        found.append(
            f"The load generator itself was late: {q.seconds(late_s)} at p99 after the intended send time "
            f"(more than {q.bound(bound_s)}). Latencies count from the intended time, so they hold its own delay too: "
            "try an idler machine, more --processes or a lower rate."
        )
    if client.cpu_share is not None and client.cpu_share > BUSY_SHARE * client.processes:
        found.append(
            f"The load generator was busy: {q.share(client.cpu_share)} of a core in {client.processes} "
            f"{'process' if client.processes == 1 else 'processes'}. Its own work may show in the latencies."
        )
    if client.rejected_by_client:
        found.append(
            f"The load generator itself turned {q.several(client.rejected_by_client, 'request')} away: its own limit."
        )
    if result.settings.get("interrupted"):
        found.append("The run was interrupted before its end.")
    if lost := result.settings.get("lost_drivers"):
        found.append(f"Processes of the load generator were lost with what they had measured: {printable(lost)}.")
    if clipped := result.settings.get("clipped"):
        found.append(f"{printable(clipped)} requests were clipped to fit the model's length.")
    if not result.summary.offered:
        found.append("No request was offered.")
    elif not result.summary.completed:
        found.append("No request was completed: there are no latencies to show.")
    if result.summary.outcomes.get("wrong"):
        found.append(f"{q.count(result.summary.outcomes['wrong'])} answers had the wrong text.")
    return found
