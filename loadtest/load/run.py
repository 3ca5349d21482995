"""`python -m loadtest run WORKLOAD|TRACE --url URL --out DIR`: offers load, measures as a client, writes result.json.

Exit 0 done, 1 nothing completed, 2 refused in one line, 130 interrupted (the result is written all the same).
"""

import argparse
import asyncio
import itertools
import signal
import sys
import time
from collections.abc import Sequence

import msgspec
import uvloop

from loadtest.load import arrivals, expected, progress
from loadtest.load.bodies import Bodies, Tokeniser
from loadtest.load.conversation import Source
from loadtest.load.crew import Crew
from loadtest.load.drive import Job, Progress
from loadtest.load.levels import Sampler
from loadtest.load.options import Options, add_arguments, bounds, checked, shown, source
from loadtest.load.records import Share, merged
from loadtest.load.tally import tally
from loadtest.load.target import Found, calibrated, look
from loadtest.machine import git, machine
from loadtest.result import Client, Levels, Result, write
from shared.errors import SettingsError

__all__ = ["add_arguments", "run"]

NOTHING, REFUSED, INTERRUPTED = 1, 2, 128 + signal.SIGINT
LOOKED_AT = 64  # conversations, to see whether there is chat among them
CHAT_ROOM = 0.9  # of the model's length: texts are only about as long as they are meant to be
TICK_S = 0.25


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that is settled before the load begins."""

    options: Options
    source: Source
    found: Found
    tokeniser: Tokeniser | None
    arrivals_s: Sequence[float] | None
    conversations: int | None
    horizon_s: float | None  # the run lasts at least so long
    seconds: float | None
    expected: expected.Expected | None
    sessions: bool  # some conversations have several turns


class Finished(msgspec.Struct, frozen=True, kw_only=True):
    """What came of it."""

    shares: list[Share]
    levels: Levels
    interrupted: bool
    lost: list[str]
    started_at: str


def run(args: argparse.Namespace) -> int:
    try:
        plan = _plan(checked(args))
        _make_folder(plan.options)
    except SettingsError as error:
        print(f"loadtest run: {error}", file=sys.stderr)
        return REFUSED
    except KeyboardInterrupt:
        return INTERRUPTED
    return _finish(plan, _drive(plan))


def _plan(options: Options) -> Plan:
    """Raises SettingsError."""
    load = source(options)
    seconds, count = bounds(options, load)
    times = _times(options, load, seconds, count)
    progress.say(f"looking at {options.url} ...")
    found = look(options.url, options.model, options.headers)
    some = [load.conversation(index) for index in range(min(LOOKED_AT, load.size or LOOKED_AT))]
    chat = any(one.chat for one in some)
    known = None
    if options.verify_share:
        if chat:
            raise SettingsError("--verify: needs prompts of token ids: --api completions")
        known = expected.of_engine(found.model_path, found.engine)
    tokeniser = calibrated(found) if chat else None
    if chat and tokeniser is None:
        progress.say("the server did not say how it counts tokens: a word is taken for one")
    return Plan(
        options=options,
        source=load,
        found=found,
        tokeniser=tokeniser,
        arrivals_s=times,
        conversations=count if times is None else len(times),
        horizon_s=seconds if times is not None and options.requests is None else None,
        seconds=seconds,
        expected=known,
        sessions=any(len(one.turns) > 1 for one in some),
    )


def _times(options: Options, load: Source, seconds: float | None, count: int | None) -> Sequence[float] | None:
    """Of an open loop; None for a closed one."""
    if options.concurrency is not None:
        return None
    if options.shape is not None:
        times: list[float] = arrivals.drawn(options.shape, options.seed, seconds=seconds, requests=count).tolist()
    elif load.arrivals_s is not None:
        end_s = float("inf") if seconds is None else seconds
        times = list(itertools.takewhile(lambda at_s: at_s < end_s, load.arrivals_s))[:count]
    else:
        raise SettingsError(f"{load.name} has no arrivals of its own: give --rate R or --concurrency N")
    if not times:
        raise SettingsError("--rate, --seconds, --minutes: not one request falls into this time; give more of one")
    return times


def _make_folder(options: Options) -> None:
    try:
        options.out.mkdir(parents=True, exist_ok=True)
        probe = options.out / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise SettingsError(f"--out {options.out}: cannot be written: {error.strerror}") from None


def _jobs(plan: Plan) -> list[Job]:
    options, found = plan.options, plan.found
    users = options.concurrency or 0
    parts = min(options.processes, users or options.processes)
    length = found.max_model_len
    limits = msgspec.structs.replace(options.limits, connections=max(1, options.limits.connections // parts))
    return [
        Job(
            part=part,
            parts=parts,
            source=plan.source,
            bodies=Bodies(model=found.target.model, seed=options.seed, tokeniser=plan.tokeniser or Tokeniser()),
            endpoint=found.endpoint,
            limits=limits,
            seed=options.seed,
            room_tokens=length,
            chat_room_tokens=None if length is None else max(2, int(CHAT_ROOM * length)),
            arrivals_s=plan.arrivals_s,
            conversations=plan.conversations,
            users=users // parts + (part < users % parts),
            seconds=plan.seconds,
            leave_share=options.leave_share,
            verify_share=options.verify_share,
            expected=plan.expected,
        )
        for part in range(parts)
    ]


def _drive(plan: Plan) -> Finished:
    jobs = _jobs(plan)
    total = plan.conversations
    of = "until the time is over" if total is None else f"{total} {'sessions' if plan.sessions else 'requests'}"
    target = plan.found.target
    progress.say(f"{plan.source.name} on {target.model} at {target.url}: {of}, {len(jobs)} driver processes")
    started_at = progress.started()
    with Crew(jobs) as crew:
        levels, interrupted = uvloop.run(_watch(plan, crew, len(jobs)))
        return Finished(
            shares=crew.shares, levels=levels, interrupted=interrupted, lost=crew.lost, started_at=started_at
        )


async def _watch(plan: Plan, crew: Crew, drivers: int) -> tuple[Levels, bool]:
    """The parent's part of the run: progress, levels, Ctrl-C."""
    sampler = Sampler(plan.found.places)
    board = progress.Board(drivers)
    printer = progress.Printer(board, None if plan.sessions else plan.conversations, progress.say)
    start_s = time.monotonic()
    stops = 0

    def on_signal() -> None:
        nonlocal stops
        stops += 1
        if stops == 1:
            progress.say("stopping: what is in flight is given up, what is done is written (again: end at once)")
            crew.stop()
        else:
            crew.kill()

    def on_progress(part: int, report: Progress) -> None:
        board.heard(part, report, time.monotonic() - start_s)

    async def show() -> None:
        while True:
            await asyncio.sleep(TICK_S)
            printer.tick(time.monotonic() - start_s)

    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, on_signal)

    async def give_up() -> None:
        if plan.seconds is not None and plan.options.tail_s is not None:
            await asyncio.sleep(plan.seconds + plan.options.tail_s)
            crew.stop()

    beside = [asyncio.ensure_future(work) for work in (sampler.run(start_s), show(), give_up())]
    try:
        await crew.run(on_progress)
    finally:
        for task in beside:
            task.cancel()
        await asyncio.wait(beside)
    return sampler.taken(), stops > 0


def _finish(plan: Plan, finished: Finished) -> int:
    for line in finished.lost:
        print(f"loadtest run: {line}; its requests are missing from the result", file=sys.stderr)
    result = _result(plan, finished)
    try:
        path = write(result, plan.options.out)
    except OSError as error:
        print(f"loadtest run: --out {plan.options.out}: cannot be written: {error.strerror}", file=sys.stderr)
        return REFUSED
    progress.say(progress.summary(result))
    progress.say(f"{path}")
    if finished.interrupted:
        return INTERRUPTED
    return NOTHING if finished.lost or not result.summary.completed else 0


def _result(plan: Plan, finished: Finished) -> Result:
    shares, options = finished.shares, plan.options
    table = merged(shares)
    duration_s = max((row.end_s or row.intended_s for row in table.rows), default=0.0)
    if plan.horizon_s is not None and not finished.interrupted:
        duration_s = max(duration_s, plan.horizon_s)
    found = tally(table, options.slo, duration_s)
    return Result(
        name=plan.source.name,
        started_at=finished.started_at,
        duration_s=round(duration_s, 6),
        git=git(),
        machine=machine(),
        target=plan.found.target,
        settings=_settings(plan, finished),
        slo=options.slo,
        summary=found.summary,
        requests=found.requests,
        timeline=found.timeline,
        levels=finished.levels,
        tries=found.tries,
        client=Client(
            processes=len(_jobs(plan)),
            cpu_share=sum(share.cpu_s for share in shares) / max(duration_s, 1e-9),
            lateness_s=found.lateness,
            rejected_by_client=sum(share.no_connection for share in shares),
        ),
    )


def _settings(plan: Plan, finished: Finished) -> dict[str, object]:
    return {
        "command": ["python", "-m", "loadtest", *shown(sys.argv[1:])],
        **plan.options.described(),
        "source": plan.source.described(),
        "max_model_len": plan.found.max_model_len,
        "tokeniser": None if plan.tokeniser is None else msgspec.to_builtins(plan.tokeniser),
        "clipped": sum(share.clipped for share in finished.shares),
        "verified": sum(share.verified for share in finished.shares),
        "interrupted": finished.interrupted,
        "lost_drivers": finished.lost,
    }
