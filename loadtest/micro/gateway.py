"""The token path by itself: a real gateway and a real NATS between a closed loop and workers that have no engine.

Beside it, in turns, servers that answer without gateway, bus and workers: what HTTP, events and sockets cost in Python
on this machine. All share its cores; the gateway's CPU time is the cleaner figure. Two gateways run, one with workers
that never wait and one with workers of a fixed step; only one of them has load at a time.
"""

import argparse
import asyncio
import json
import random
import string
from pathlib import Path
from typing import Any

import psutil
from tokenizers import Tokenizer

from loadtest import machine, slo
from loadtest.cluster.stream import percentile
from loadtest.micro import bench, gateway_table
from loadtest.micro.closed_loop import Course, Seen, drive
from services.launcher.machine import LOOPBACK, free_ports
from services.launcher.processes import Child
from shared.errors import SettingsError
from shared.settings import served_name

FREE, PACED = "loadtest", "loadtest-paced"  # clusters
APIS = {"chat": "/v1/chat/completions", "completions": "/v1/completions"}
LIMITS = {"one write an event": (), "whole answer in one write": ("--joined",)}
MODEL = machine.ROOT / "models" / "demo"
REQUESTS = 2000  # different ones, sent in turns
WARM_SHARE = 0.35  # of the measured time, before it
PACED_FACTOR = 1.6  # longer, because an answer takes longer
PIECE = 4  # characters that are added to a prompt at a time
SETTINGS = ("concurrency", "streams", "step_ms", "prompt_tokens", "output_tokens", "rounds", "seconds")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--concurrency", type=_counts, default=[1, 32, 128, 256], help="with workers that never wait")
    parser.add_argument("--streams", type=_counts, default=[64, 256, 512], help="with workers of a fixed step")
    parser.add_argument("--step-ms", type=float, default=6.0)
    parser.add_argument("--prompt-tokens", type=_count, default=128)
    parser.add_argument("--output-tokens", type=_count, default=64)
    parser.add_argument("--rounds", type=_count, default=3)
    parser.add_argument("--seconds", type=float, default=1.2, help="measured at each point, each round")
    parser.add_argument(
        "--model", type=Path, default=machine.ROOT / "models" / "demo", help="a folder with a tokenizer"
    )
    parser.add_argument("--out", type=Path, help="write the result as JSON")
    parser.add_argument("--hold", action="store_true", help="start everything, print the addresses and wait for Ctrl-C")

    parser.add_argument(
        "--telemetry",
        action="store_true",
        help="instead: what spans and figures cost, gateways with and without side by side",
    )


def run(args: argparse.Namespace) -> int:
    if args.telemetry:
        from loadtest.micro import telemetry_cost

        return telemetry_cost.run(args, refusal=_refusal(args))
    return bench.command(args, refusal=_refusal(args), work=lambda: _measure(args), table=gateway_table.text)


def _refusal(args: argparse.Namespace) -> str | None:
    if args.out and not args.out.parent.is_dir():
        return f"--out: there is no folder {args.out.parent}"
    if not (args.model / "tokenizer.json").is_file():
        return f"--model: {args.model} has no tokenizer.json"
    for name in ("seconds", "step_ms"):
        if getattr(args, name) <= 0:
            return f"--{name.replace('_', '-')}: must be more than 0"
    return None


async def _measure(args: argparse.Namespace) -> dict[str, Any]:
    async with bench.opened() as here:
        here.say("starting NATS, two gateways, their workers and three servers without an engine")
        path = await TokenPath.start(here, args)
        if args.hold:
            here.say(f"fast: {path.url(FREE)}, paced: {path.url(PACED)}, pids {path.pids()}")
            await asyncio.Event().wait()
        for number in range(args.rounds):
            await path.round(number + 1)
        return bench.result(
            "gateway",
            {**{name: getattr(args, name) for name in SETTINGS}, "model": str(args.model)},
            **path.figures(),
        )


class TokenPath:
    """What is measured, and what was found so far. Use `start`."""

    def __init__(self, here: bench.Bench, args: argparse.Namespace) -> None:
        self._here = here
        self._args = args
        self.ports: dict[str, int] = {}
        self.children: dict[str, Child] = {}
        self._requests = _requests(args)
        self.seen: dict[tuple[str, str, int], list[Seen]] = {}

    @classmethod
    async def start(cls, here: bench.Bench, args: argparse.Namespace) -> "TokenPath":
        path = cls(here, args)
        names = (FREE, PACED, *LIMITS, "paced")
        path.ports = dict(zip(names, free_ports(len(names)), strict=True))
        path.children["nats"], nats_url = await here.nats()
        # What takes long to start starts together.
        for cluster, step_ms in ((FREE, 0.0), (PACED, args.step_ms)):
            path.start_cluster(cluster, nats_url, step_ms)
        for name, options in (*LIMITS.items(), ("paced", ("--token-ms", str(args.step_ms)))):
            number = f"instant-{len(path.children)}"
            child = here.python(number, "loadtest.instant", "--port", str(path.ports[name]), *options)
            path.children[name] = child
        for cluster in (FREE, PACED):
            await here.until_probed(path.children[f"gateway {cluster}"], path.url(cluster))
        for name in (*LIMITS, "paced"):
            await here.until(path.children[name], _until_open(path.ports[name]))
        return path

    def start_cluster(self, cluster: str, nats_url: str, step_ms: float, **more: Any) -> None:
        """`more`: settings of its gateway."""
        settings = {
            **more,
            "cluster": cluster,
            "id": "gateway-0",
            "nats_url": nats_url,
            "model": str(self._args.model),
            "port": self.ports[cluster],
            "arrangement": "split",
        }
        child = self._here.python(f"gateway-{cluster}", "services.gateway", settings=settings)
        self.children[f"gateway {cluster}"] = child
        folder = self._here.folder / cluster
        folder.mkdir()
        for role in ("prefill", "decode"):
            arguments = (cluster, role, f"{role}-0", nats_url, str(folder), str(step_ms))
            child = self._here.python(f"{role}-{cluster}", "loadtest.micro.stub_worker", *arguments)
            self.children[f"{role} {cluster}"] = child

    def url(self, name: str) -> str:
        return f"http://{LOOPBACK}:{self.ports[name]}"

    def pids(self) -> dict[str, int]:
        return {name: child.pid for name, child in self.children.items()}

    async def round(self, number: int) -> None:
        args = self._args
        for concurrency in args.concurrency:
            self._here.say(f"round {number} of {args.rounds}: {concurrency} at once")
            for api in APIS:
                await self.point(FREE, api, concurrency, args.seconds)
            for name in LIMITS:
                await self.point(name, "completions", concurrency, args.seconds)
        for streams in args.streams:
            self._here.say(f"round {number} of {args.rounds}: {streams} streams, a token every {args.step_ms:g} ms")
            for name in (PACED, "paced"):
                await self.point(name, "completions", streams, args.seconds * PACED_FACTOR)

    async def point(self, name: str, api: str, concurrency: int, seconds: float) -> None:
        self._here.check()
        if f"gateway {name}" not in self.children:
            watched = {"server": self.children[name]}
        else:
            watched = {role: self.children[f"{role} {name}"] for role in ("gateway", "prefill", "decode")}
            watched["nats"] = self.children["nats"]
        course = Course(
            address=(LOOPBACK, self.ports[name]),
            requests=self._requests[api],
            tokens=self._args.output_tokens,
            concurrency=concurrency,
            warm_s=WARM_SHARE * seconds,
            measured_s=seconds,
            processes={"driver": psutil.Process(), **{role: psutil.Process(one.pid) for role, one in watched.items()}},
        )
        try:
            seen = await asyncio.to_thread(drive, course)
        except OSError as error:
            raise bench.Failed(f"{name} does not serve {concurrency} clients: {error}") from error
        self.seen.setdefault((name, api, concurrency), []).append(seen)

    def figures(self) -> dict[str, Any]:
        args, seen = self._args, self.seen
        free = [
            {"api": api, "concurrency": count, **figures_of(seen[FREE, api, count], args)}
            for api in APIS
            for count in args.concurrency
        ]
        limits = [
            {"server": name, "concurrency": count, **figures_of(seen[name, "completions", count], args)}
            for name in LIMITS
            for count in args.concurrency
        ]
        paced = [
            {
                "server": "gateway" if name == PACED else "instant",
                "streams": count,
                **figures_of(seen[name, "completions", count], args, ideal_per_s=1e3 * count / args.step_ms),
            }
            for count in args.streams
            for name in (PACED, "paced")
        ]
        errors: dict[str, int] = {}
        for (name, api, count), rounds in seen.items():
            for one in rounds:
                for what, times in one.errors.items():
                    key = f"{name}, {api}, {count}: {what}"
                    errors[key] = errors.get(key, 0) + times
        return {"free": free, "limits": limits, "paced": paced, "errors": errors}


def figures_of(rounds: list[Seen], args: argparse.Namespace, ideal_per_s: float = 0.0) -> dict[str, Any]:
    rows = [row_of(seen, args.output_tokens, ideal_per_s) for seen in rounds]
    return {name: bench.figure([row[name] for row in rows]) for name in rows[0]}


def row_of(seen: Seen, output_tokens: int, ideal_per_s: float = 0.0) -> dict[str, float]:
    """One round of one point."""
    tokens = max(1, seen.tokens)
    requests = tokens / output_tokens
    ttft, gaps = sorted(seen.ttft_s), sorted(seen.gaps_s)
    row = {
        "requests_per_s": requests / seen.elapsed_s,
        "tokens_per_s": seen.tokens / seen.elapsed_s,
        "ttft_p50_ms": 1e3 * percentile(ttft, 0.5),
        "ttft_p99_ms": 1e3 * percentile(ttft, 0.99),
        "itl_p50_ms": 1e3 * with_zeros(gaps, seen.joined, 0.5),
        "itl_p99_ms": 1e3 * with_zeros(gaps, seen.joined, 0.99),
        "tokens_per_read": seen.tokens / max(1, seen.reads),
    }
    for name, spent_s in seen.cpu_s.items():
        row[f"{name}_us_per_request"] = 1e6 * spent_s / requests
        row[f"{name}_us_per_token"] = 1e6 * spent_s / tokens
        row[f"{name}_cores"] = spent_s / seen.elapsed_s
    if ideal_per_s:
        row["share_of_ideal"] = seen.tokens / seen.elapsed_s / ideal_per_s
    return row


def with_zeros(ranked: list[float], zeros: int, share: float) -> float:
    """Nearest rank over sorted values and so many zeros before them; 0 for nothing."""
    place = slo.rank(share, len(ranked) + zeros) - zeros
    return ranked[place] if ranked and place >= 0 else 0.0


def _requests(args: argparse.Namespace) -> dict[str, list[bytes]]:
    """HTTP requests whose prompts no cache has seen. A chat's template adds a few tokens."""
    try:
        tokenizer = Tokenizer.from_file(str(args.model / "tokenizer.json"))
    except Exception as error:  # the library raises bare Exception
        raise SettingsError(f"--model: {args.model / 'tokenizer.json'} cannot be read: {error}") from error
    dice = random.Random()
    prompts = [_prompt(tokenizer, args.prompt_tokens, dice) for _ in range(REQUESTS)]
    model = served_name(str(args.model), "")
    return {
        api: [_request(path, model, prompt, args.output_tokens, is_chat=api == "chat") for prompt in prompts]
        for api, path in APIS.items()
    }


def _prompt(tokenizer: Tokenizer, tokens: int, dice: random.Random) -> str:
    """Random letters that come close to so many tokens."""
    letters = string.ascii_lowercase + "     "
    text = "".join(dice.choices(letters, k=tokens))
    while (missing := tokens - len(tokenizer.encode(text).ids)) > 0:
        text += "".join(dice.choices(letters, k=max(1, missing)))
    return text


def _request(path: str, model: str, prompt: str, output_tokens: int, *, is_chat: bool) -> bytes:
    body: dict[str, Any] = {
        "model": model,
        "max_tokens": output_tokens,
        "stream": True,
        "stream_options": {"include_usage": True},
        "ignore_eos": True,
    }
    body |= {"messages": [{"role": "user", "content": prompt}]} if is_chat else {"prompt": prompt}
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nhost: {LOOPBACK}\r\ncontent-type: application/json\r\ncontent-length: {len(data)}"
    return head.encode() + b"\r\n\r\n" + data


async def _until_open(port: int) -> None:
    while True:
        try:
            _, writer = await asyncio.open_connection(LOOPBACK, port)
        except OSError:
            await asyncio.sleep(0.02)  # nothing announces that it has begun to listen
        else:
            writer.close()
            return


def _counts(text: str) -> list[int]:
    return [_count(part) for part in text.split(",")]


def _count(text: str) -> int:
    """What this raises, argparse reports with the option."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text}: must be at least 1")
    return number
