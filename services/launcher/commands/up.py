"""`baton up`: check, start, say where it is, watch, and leave nothing behind."""

import asyncio
import contextlib
import json
import os
import secrets
import shlex
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Coroutine, Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx

from services.launcher import detach
from services.launcher.cluster import Cluster
from services.launcher.health import probe_client
from services.launcher.key_store import check_keys
from services.launcher.machine import free_ports, hold_port, port_taken, read_machine
from services.launcher.model import read_model
from services.launcher.options import UpOptions
from services.launcher.plan import Place, Plan, Programs, plan, ports_needed
from services.launcher.progress import Progress
from services.launcher.refusal import UserError
from services.launcher.state import ClusterFolder
from services.launcher.sweep import sweep
from shared.settings import PREFIX


def up(options: UpOptions, folder: ClusterFolder, programs: Programs) -> int:
    """Runs until stopped; with --detach only until ready."""
    check_keys(options.keys)
    folder.create()
    if options.detach:
        return detach.in_background(
            lambda announce: _launch(options, folder, programs, announce), folder.log("launcher")
        )
    return _launch(options, folder, programs, lambda: None)


def _launch(options: UpOptions, folder: ClusterFolder, programs: Programs, announce: detach.Announce) -> int:
    if not folder.take():
        raise UserError(
            f"a cluster already runs on port {options.port}: see baton status --port {options.port}, "
            f"stop it with baton down --port {options.port}, or choose another --port"
        )
    if (left := folder.read()) is not None:
        print(f"Cleaning up after a launcher that was killed ({sweep(folder, left)} processes were left).")
    with _own_port(options):
        return _launch_there(options, folder, programs, announce)


@contextlib.contextmanager
def _own_port(options: UpOptions) -> Iterator[None]:
    """Nobody else listens there; nor will, where the gateways could not notice because they share the port."""
    if (why := port_taken(options.host, options.port)) is not None:
        raise _taken(options, why)
    if options.gateways == 1:
        yield
        return
    try:
        holder = hold_port(options.host, options.port)
    except OSError as error:
        raise _taken(options, error.strerror or str(error)) from error
    with holder:
        yield


def _taken(options: UpOptions, why: str) -> UserError:
    return UserError(f"cannot listen on {options.host}:{options.port} ({why}): stop who does, or choose another --port")


def _launch_there(options: UpOptions, folder: ClusterFolder, programs: Programs, announce: detach.Announce) -> int:
    machine = read_machine(options.shm_dir)
    model = read_model(options.model, options.revision, with_weights=options.engine != "sim")
    for old_log in folder.logs.glob("*.log"):
        old_log.unlink()
    run_folder = _run_folder()
    try:
        place = Place(
            run_folder=run_folder,
            ports=tuple(free_ports(ports_needed(options))),
            token=secrets.token_urlsafe(24),
            peer_secret=secrets.token_urlsafe(32),
            redis_folder=_redis_folder(options, folder),
        )
        chosen = plan(options, machine, model, programs, place)
        return asyncio.run(_run(chosen, options, folder, announce))
    finally:
        shutil.rmtree(run_folder, ignore_errors=True)


def _redis_folder(options: UpOptions, folder: ClusterFolder) -> str:
    """Where Redis keeps what must outlive it: keys and usage."""
    if not options.keys:
        return ""
    kept = folder.path / "redis"
    kept.mkdir(mode=0o700, exist_ok=True)
    return str(kept)


def _run_folder() -> str:
    """Private, and short enough for the path of a unix socket (107 bytes) of vLLM's, which is a UUID."""
    parent = tempfile.gettempdir()
    return tempfile.mkdtemp(prefix="baton-", dir=parent if len(parent) < 55 else "/tmp")  # noqa: S108


async def _run(chosen: Plan, options: UpOptions, folder: ClusterFolder, announce: detach.Announce) -> int:
    progress = Progress(sys.stdout)
    began = time.monotonic()
    stop, stop_now = _stop_events()
    progress.line(f"Starting {chosen.served_model_name} on this machine: {_tiers(options)}. Logs: {folder.logs}")
    cluster = Cluster(chosen, folder, _passed_on(os.environ), progress)
    outcome = 0
    try:
        if await _unless(stop, cluster.start()):
            for line in await _welcome(chosen, options, folder, time.monotonic() - began):
                progress.line(line)
            announce()
            await _unless(stop, cluster.keep())
            progress.line("Stopping: running requests may finish. Once more to stop at once.")
        else:
            outcome = 1  # stopped before it was ready
    finally:
        # Also when start refused: what it had started goes before the refusal is said.
        if not await _unless(stop_now, cluster.stop()):
            await cluster.kill()
    progress.line("Stopped; nothing is left running.")
    return outcome


async def _unless(event: asyncio.Event, work: Coroutine[Any, Any, None]) -> bool:
    """Do the work, or drop it when the event comes first; says whether it was done. Its errors are raised."""
    task, other = asyncio.create_task(work), asyncio.create_task(event.wait())
    await asyncio.wait({task, other}, return_when=asyncio.FIRST_COMPLETED)
    other.cancel()
    if task.done():
        task.result()
        return True
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    return False


def _stop_events() -> tuple[asyncio.Event, asyncio.Event]:
    """The first signal sets the first event, the second one the second."""
    stop, stop_now = asyncio.Event(), asyncio.Event()

    def on_signal() -> None:
        (stop_now if stop.is_set() else stop).set()

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # as nohup leaves it
            asyncio.get_running_loop().add_signal_handler(number, on_signal)
    return stop, stop_now


async def _welcome(chosen: Plan, options: UpOptions, folder: ClusterFolder, took_s: float) -> list[str]:
    me = sys.argv[0] if Path(sys.argv[0]).name == "baton" else "baton"
    port = "" if options.port == 8000 else f" --port {options.port}"
    question = {
        "model": chosen.served_model_name,
        "messages": [{"role": "user", "content": "What is Baton?"}],
        "temperature": 0,
        "max_tokens": 64,
    }
    url = f"{chosen.address}/v1/chat/completions"
    key = ' -H "Authorization: Bearer $BATON_API_KEY"' if options.keys else ""
    lines = [
        f"Ready after {took_s:.0f} s: {chosen.address}/v1 serves {chosen.served_model_name}",
        "",
        f"  curl {url} -H 'Content-Type: application/json'{key} -d {shlex.quote(json.dumps(question))}",
        "",
    ]
    async with probe_client() as client:
        with contextlib.suppress(httpx.HTTPError):
            if (await client.get(f"{chosen.address}/dashboard")).status_code == httpx.codes.OK:
                lines.append(f"  dashboard  {chosen.address}/dashboard")
    if options.keys:
        lines.append(f"  keys       from {options.keys}; {me} keys add{port} --tenant NAME makes one")
    stop = f"{me} down{port}" if options.detach else f"Ctrl-C, or {me} down{port}"
    return [
        *lines,
        f"  logs       {folder.logs}",
        f"  talk       {me} chat{port} 'What is Baton?'",
        f"  stop       {stop}",
    ]


def _tiers(options: UpOptions) -> str:
    engine = f", sim engine at speed {options.sim_speed:g}" if options.engine == "sim" else ""
    gateways = f", {options.gateways} gateways" if options.gateways > 1 else ""
    gateways += f", {options.nodes} nodes" if options.nodes > 1 else ""
    return f"{options.prefill} prefill, {options.decode} decode{gateways}, arrangement {options.arrangement}{engine}"


def _passed_on(environ: Mapping[str, str]) -> dict[str, str]:
    """Everything but Baton's own variables: each service gets those that it knows, resolved."""
    return {key: value for key, value in environ.items() if not key.startswith(PREFIX)}
