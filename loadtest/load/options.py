"""The command line of `run`, read and checked: every error names the option and what to do."""

import argparse
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, cast

import msgspec

from loadtest.load import trace, workload
from loadtest.load.arrivals import Shape
from loadtest.load.client import Limits
from loadtest.load.conversation import Source
from loadtest.slo import Slo
from shared.errors import SettingsError

Api = Literal["chat", "completions"]
DEFAULT_SECONDS = 60.0
TIMEOUTS = ("connect_timeout", "first_byte_timeout", "progress_timeout", "total_timeout")
POSITIVE = ("seconds", "tail", "requests", "concurrency", "processes", "connections", "slo_ttft", "slo_itl", *TIMEOUTS)
HIDDEN = "..."


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """`shape`: of an open loop; `concurrency`: of a closed one; neither: the trace's own arrivals."""

    load: str
    url: str
    out: Path
    model: str | None
    api: Api | None
    shape: Shape | None
    concurrency: int | None
    think_s: float | None
    seconds: float | None
    tail_s: float | None
    requests: int | None
    seed: int
    processes: int
    window: trace.Window
    limits: Limits
    leave_share: float
    verify_share: float
    slo: Slo
    headers: tuple[tuple[str, str], ...]

    def described(self) -> dict[str, object]:
        """For the result: everything that was resolved, nothing secret."""
        described: dict[str, object] = msgspec.to_builtins(
            msgspec.structs.replace(self, headers=tuple((name, HIDDEN) for name, _ in self.headers)),
            enc_hook=str,
        )
        return described


def add_load(parser: argparse.ArgumentParser) -> None:
    """What `find_source` takes."""
    parser.add_argument(
        "load",
        metavar="WORKLOAD|TRACE",
        help=f"workload {', '.join(workload.shipped())}; trace {', '.join(trace.shipped())}; or a path",
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_load(parser)
    add = parser.add_argument
    add("--url", default="http://127.0.0.1:8000")
    add("--out", type=Path, required=True, metavar="DIR", help="where result.json goes")
    add("--model", help="default: the first that the server lists")
    add("--api", choices=("chat", "completions"), help="default: as the workload says; traces use completions")
    add("--header", action="append", default=[], metavar="NAME:VALUE", help="sent with every request")
    add("--api-key", metavar="KEY", help="default: the variable OPENAI_API_KEY, which other users cannot see")

    load = parser.add_argument_group("load")
    load.add_argument("--rate", type=float, help="open loop: requests (with turns: sessions) a second")
    load.add_argument("--arrivals", choices=("poisson", "gamma", "constant", "ramp"), default="poisson")
    load.add_argument("--cv", type=float, help="gamma: coefficient of variation of the gaps; above 1 is bursts")
    load.add_argument("--rate-to", type=float, help="ramp: the rate at the end")
    load.add_argument("--concurrency", type=int, help="closed loop: so many clients, each waits for its answer")
    load.add_argument("--think-s", type=float, help="between an answer and the same client's next request")
    load.add_argument("--seconds", type=float, help=f"no request begins later; default {DEFAULT_SECONDS:g}")
    load.add_argument("--tail", type=float, metavar="S", help="give up what is in flight so long after --seconds")
    load.add_argument("--requests", type=int, help="no more than so many (with turns: sessions)")
    load.add_argument("--seed", type=int, default=0)
    load.add_argument("--length-scale", type=float, default=1.0, help="of all lengths, in tokens")

    replay = parser.add_argument_group("traces")
    replay.add_argument("--time-scale", type=float, default=1.0, help="2 is twice as fast")
    replay.add_argument("--start-minute", type=float, default=0.0)
    replay.add_argument("--minutes", type=float, help="of the trace's own time; default: all of it")

    client = parser.add_argument_group("clients")
    client.add_argument("--processes", type=int, default=1, help="that drive the load")
    client.add_argument("--connections", type=int, default=10_000, help="at most, over all processes")
    client.add_argument("--connect-timeout", type=float, default=5.0, metavar="S")
    client.add_argument("--first-byte-timeout", type=float, default=120.0, metavar="S")
    client.add_argument("--progress-timeout", type=float, default=60.0, metavar="S", help="between two reads")
    client.add_argument("--total-timeout", type=float, default=600.0, metavar="S", help="of one attempt")
    client.add_argument("--retries", type=int, default=0, help="as the official client does; its default is 2")
    client.add_argument("--leave-share", type=float, default=0.0, help="of clients that leave before the end")
    client.add_argument(
        "--verify", type=float, default=0.0, metavar="SHARE", help="of texts to compare: engine sim only"
    )

    slo = parser.add_argument_group("service level")
    slo.add_argument("--slo-ttft", type=float, default=2.0, metavar="S")
    slo.add_argument("--slo-itl", type=float, default=0.1, metavar="S")
    slo.add_argument("--slo-itl-share", type=float, default=0.95, help="of a request's gaps")


def checked(args: argparse.Namespace) -> Options:
    """Raises SettingsError."""
    _check_ranges(args)
    if args.rate is not None and args.concurrency is not None:
        raise SettingsError("--rate and --concurrency: an open or a closed loop, not both")
    if args.rate is None and (args.arrivals != "poisson" or args.rate_to is not None or args.cv is not None):
        raise SettingsError("--arrivals, --cv and --rate-to: need --rate")
    if args.cv is not None and args.arrivals != "gamma":
        raise SettingsError("--cv: needs --arrivals gamma")
    shape = None
    if args.rate is not None:
        shape = Shape(kind=args.arrivals, rate=args.rate, cv=args.cv or 1.0, rate_to=args.rate_to)
    return Options(
        load=args.load,
        url=args.url,
        out=args.out,
        model=args.model,
        api=cast("Api | None", args.api),
        shape=shape,
        concurrency=args.concurrency,
        think_s=args.think_s,
        seconds=args.seconds,
        tail_s=args.tail,
        requests=args.requests,
        seed=args.seed,
        processes=args.processes,
        window=trace.Window(
            start_minute=args.start_minute,
            minutes=args.minutes,
            time_scale=args.time_scale,
            length_scale=args.length_scale,
        ),
        limits=Limits(
            connections=args.connections,
            connect_s=args.connect_timeout,
            first_byte_s=args.first_byte_timeout,
            progress_s=args.progress_timeout,
            total_s=args.total_timeout,
            retries=args.retries,
        ),
        leave_share=args.leave_share,
        verify_share=args.verify,
        slo=Slo(ttft_s=args.slo_ttft, itl_s=args.slo_itl, itl_share=args.slo_itl_share),
        headers=_headers(args),
    )


def source(options: Options) -> Source:
    """What is to be said. Raises SettingsError."""
    return find_source(options.load, options.window, seed=options.seed, api=options.api, think_s=options.think_s)


def find_source(
    name: str, window: trace.Window, *, seed: int = 0, api: Api | None = None, think_s: float | None = None
) -> Source:
    """A workload or a trace, shipped or by path. Raises SettingsError."""
    path = workload.find(name)
    if path is not None:
        if window != trace.Window(length_scale=window.length_scale):
            raise SettingsError("--time-scale, --start-minute, --minutes: only for a trace")
        return workload.load(
            path, workload.Change(seed=seed, length_scale=window.length_scale, api=api, think_s=think_s)
        )
    path = trace.find(name)
    if path is not None:
        return trace.TraceSource(_name(path), trace.read(path), window, api or "completions", think_s or 0.0)
    known = ", ".join([*workload.shipped(), *trace.shipped()])
    raise SettingsError(
        f"{name}: no such workload or trace; there are {known}, or give a path (.yaml, .jsonl, .csv, .gz)"
    )


def bounds(options: Options, source: Source) -> tuple[float | None, int | None]:
    """Seconds and conversations; at least one is given."""
    seconds, count = options.seconds, options.requests
    if source.size is not None:
        count = source.size if count is None else min(count, source.size)
    elif seconds is None and count is None:
        seconds = DEFAULT_SECONDS
    if options.shape is not None and options.shape.kind == "ramp" and seconds is None:
        seconds = DEFAULT_SECONDS
    return seconds, count


def shown(argv: Sequence[str]) -> list[str]:
    """A command line without the values of headers: they may be keys."""
    words = list(argv)
    for place, word in enumerate(words):
        if word == "--api-key" and place + 1 < len(words):
            words[place + 1] = HIDDEN
        elif word.startswith("--api-key="):
            words[place] = f"--api-key={HIDDEN}"
        elif word == "--header" and place + 1 < len(words):
            words[place + 1] = words[place + 1].partition(":")[0] + f":{HIDDEN}"
        elif word.startswith("--header="):
            words[place] = word.partition(":")[0] + f":{HIDDEN}"
    return words


def _check_ranges(args: argparse.Namespace) -> None:
    for name in POSITIVE:
        value = getattr(args, name)
        if value is not None and not 0 < value < math.inf:
            raise SettingsError(f"--{name.replace('_', '-')}: must be more than 0")
    for name in ("think_s", "retries", "seed"):
        value = getattr(args, name)
        if value is not None and not 0 <= value < math.inf:
            raise SettingsError(f"--{name.replace('_', '-')}: must not be negative")
    for name in ("leave_share", "verify", "slo_itl_share"):
        if not 0 <= getattr(args, name) <= 1:
            raise SettingsError(f"--{name.replace('_', '-')}: a share from 0 to 1")


def _headers(args: argparse.Namespace) -> tuple[tuple[str, str], ...]:
    headers = [_header(one) for one in args.header]
    key = args.api_key or os.environ.get("OPENAI_API_KEY", "")
    if key and all(name.lower() != "authorization" for name, _ in headers):
        headers.append(_header(f"authorization:Bearer {key}"))
    return tuple(headers)


def _header(given: str) -> tuple[str, str]:
    name, colon, value = given.partition(":")
    name, value = name.strip(), value.strip()
    if not colon or not name or not given.isprintable() or " " in name or not given.isascii():
        raise SettingsError("--header: NAME:VALUE in one line of ASCII, such as 'authorization: Bearer ...'")
    return name, value


def _name(path: Path) -> str:
    return path.name.split(".")[0]
