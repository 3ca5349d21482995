"""What measurements that start their clusters themselves have in common: options, engines, finding the capacity."""

import argparse
import contextlib
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec

from loadtest.cluster import judge, offer
from loadtest.cluster.capacity import Capacity, Step, capacity, next_clients
from loadtest.cluster.judge import Window
from loadtest.cluster.launch import Started
from loadtest.cluster.offer import Load
from loadtest.machine import ROOT
from loadtest.micro.bench import INTERRUPTED, REFUSED, Failed
from loadtest.slo import Slo
from services.launcher.refusal import UserError
from shared.errors import SettingsError

ENGINES = {"sim": ("--engine", "sim"), "vllm": ("--engine", "vllm", "--kv-gib", "1", "--arena-gib", "1")}
SCALES = {"sim": 1.0, "vllm": 0.25}  # of the workload's lengths: an engine on CPUs takes seconds for a long prompt
DRAIN_S = "2"
MODEL_S = 120.0
CAPACITY_SEED = 10_000
TAIL_TARGETS = 3  # so long is waited for a first token before it counts as missed
WARM_SHARE = 0.25  # of the measured time, before it


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--engine", choices=tuple(ENGINES), default="sim")
    add("--seconds", type=_positive, default=30.0, help="measured at each load, after a quarter of it; default 30")
    add("--out", type=Path, required=True, metavar="DIR")
    add("--ttft", type=_positive, default=2.0, metavar="S", help="the target, of the gateway and of the judgement")
    add("--itl", type=_positive, default=0.1, metavar="S")
    add("--workload", default="overload", help="as for `run`")
    add("--length-scale", type=_positive, help="of its lengths; default 1 for sim, 0.25 for vllm")
    add("--capacity", type=_positive, metavar="R", help="good requests a second; default: found first")
    add("--step-seconds", type=_positive, default=8.0, help="of each concurrency while capacity is looked for")
    add("--cv", type=_positive, default=2.0, help="of the gaps between arrivals; 1 is Poisson, more is bursts")
    add("--retries", type=int, default=2, help="of a client, as the official one does it")
    add("--tail", type=_positive, default=15.0, metavar="S", help="what is in flight so long after a run is given up")
    add("--seed", type=int, default=0)
    add("--model", type=Path, help="default: sim the demo model, vllm one that `python -m loadtest model` makes")
    add("--sim-speed", default="1", help="times the profile's")
    add("--arrangement", choices=("auto", "split", "unsplit"), default="split")
    add("--engine-arg", action="append", default=[], metavar="KEY=VALUE", help="of the engines; may be repeated")
    add("--prefill", type=int, default=1)
    add("--decode", type=int, default=1)


def slo(args: argparse.Namespace) -> Slo:
    return Slo(ttft_s=args.ttft, itl_s=args.itl)


def load(args: argparse.Namespace) -> Load:
    """Raises SettingsError."""
    if args.tail < TAIL_TARGETS * args.ttft:
        raise SettingsError(
            f"--tail {args.tail:g}: at least {TAIL_TARGETS} times --ttft: what has no token by then is late"
        )
    return Load(
        workload=args.workload,
        length_scale=args.length_scale or SCALES[args.engine],
        slo=slo(args),
        retries=args.retries,
        tail_s=args.tail,
        seed=args.seed,
    )


def window(seconds: float) -> Window:
    """Of a run of `whole(seconds)`."""
    return Window(start_s=WARM_SHARE * seconds, end_s=(1 + WARM_SHARE) * seconds)


def whole(seconds: float) -> float:
    return (1 + WARM_SHARE) * seconds


def settings(args: argparse.Namespace, **more: str) -> dict[str, str]:
    """Of every cluster of the measurement."""
    targets = {"default": {"ttft_s": args.ttft, "itl_s": args.itl}}
    return {"drain_s": DRAIN_S, "targets": msgspec.json.encode(targets).decode(), **more}


def described(args: argparse.Namespace) -> dict[str, object]:
    """The settings for the result: what was resolved."""
    told = {name: value for name, value in vars(args).items() if name not in ("command", "out", "model")}
    told["length_scale"] = args.length_scale or SCALES[args.engine]
    told["model"] = None if args.model is None else args.model.name
    return {"command": ["python", "-m", "loadtest", *sys.argv[1:]], **told}


@contextlib.contextmanager
def up_options(args: argparse.Namespace) -> Iterator[list[str]]:
    """Those of `baton up`; a model that had to be made lasts as long."""
    options = [
        *ENGINES[args.engine],
        *("--arrangement", args.arrangement, "--prefill", str(args.prefill), "--decode", str(args.decode)),
        *(("--sim-speed", args.sim_speed) if args.engine == "sim" else ()),
        *(word for given in args.engine_arg for word in ("--engine-arg", given)),
    ]
    with tempfile.TemporaryDirectory(prefix="baton-model-") as folder:
        model = args.model
        if model is None and args.engine == "vllm":
            model = Path(folder) / "cpu-8-layers"
            _make_model(model)
        yield [*options, "--model", str(model)] if model is not None else options


def find_capacity(
    cluster: Started, asked: Load, args: argparse.Namespace, out: Path, say: Callable[[str], None]
) -> Capacity:
    """Its clients do not try again. Raises Failed when nothing is good."""
    if args.capacity is not None:
        return Capacity(per_s=args.capacity, how="given on the command line")
    seconds, steps = args.step_seconds, list[Step]()
    while (clients := next_clients(steps)) is not None:
        # Other prompts each time: what a cache holds of the step before would cost nothing.
        cold = msgspec.structs.replace(asked, retries=0, seed=asked.seed + CAPACITY_SEED + clients)
        result = offer.closed(cluster, cold, clients=clients, seconds=whole(seconds), out=out / f"clients-{clients}")
        point = judge.judge(result, window(seconds))
        steps.append(
            Step(
                clients=clients,
                good_per_s=point.good_per_s,
                answered_per_s=point.answered_per_s,
                ttft_p50_s=point.ttft_s.p50,
                ttft_p99_s=point.ttft_s.p99,
            )
        )
        say(f"{clients} clients: {point.good_per_s:.2f} good requests/s of {point.answered_per_s:.2f} answered")
    found = capacity(steps, seconds)
    if found.per_s <= 0:
        raise Failed("no request was good at any concurrency: give a larger --ttft or --itl, or shorter prompts")
    return found


def command(name: str, work: Callable[[], int]) -> int:
    """Runs it; on every way out what it started ends first."""

    def on_sigterm(*_: object) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, on_sigterm)
    try:
        return work()
    except KeyboardInterrupt:
        print(f"loadtest {name}: interrupted, everything that was started has been stopped", file=sys.stderr)
        return INTERRUPTED
    except (UserError, SettingsError) as error:
        print(f"loadtest {name}: {error}", file=sys.stderr)
        return REFUSED
    except (Failed, OSError) as error:
        print(f"loadtest {name}: {error}", file=sys.stderr)
        return 1


def write(found: msgspec.Struct, file: Path, html: str, shown: Path) -> None:
    """The result, and the page that shows it."""
    file.write_bytes(msgspec.json.format(msgspec.json.encode(found), indent=1))
    shown.write_text(html, encoding="utf-8")


def make_folder(out: Path) -> None:
    """Raises SettingsError."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SettingsError(f"--out {out}: cannot be made: {error.strerror}") from None


def _make_model(folder: Path) -> None:
    """In a process of its own, because torch is large."""
    words = (sys.executable, "-m", "loadtest", "model", str(folder))
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False, timeout=MODEL_S)
    if done.returncode:
        raise Failed(f"no model could be made: {(done.stderr.strip() or 'it said nothing').splitlines()[-1]}")


def _positive(text: str) -> float:
    """What this raises, argparse reports with the option."""
    number = float(text)
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"{text}: must be more than 0")
    return number
