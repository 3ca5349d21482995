"""From options and machine to the list of processes. Pure: nothing is started, read or written here."""

import hmac
import ipaddress
import math
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from services.launcher.machine import GIB, LOOPBACK, Machine
from services.launcher.model import WIDEST_VALUE_BYTES, Model
from services.launcher.options import UpOptions
from services.launcher.refusal import UserError
from shared.bus_users import OPERATOR
from shared.settings import SERVICES, CommonSettings, load, to_environ
from shared.worker.sim.arguments import resolve

WORKER_BYTES = int(1.5 * GIB)  # measured: a worker's Python, torch and vLLM
SIM_WORKER_BYTES = 128 * 1024**2  # measured: without either
SIM_BLOCK_BYTES = 256  # of the sim's own book-keeping
SLOT_WORD_BYTES = 8  # beside each slot
LEAST_ARENA_BYTES = 1024**2
SERVICE_BYTES = GIB // 2  # gateway, kv_transfer, Redis and NATS together
GATEWAY_BYTES = 160 * 1024**2  # of each further gateway; measured: 62 MiB idle, with a small vocabulary
STORE_BYTES = 64 * 1024**2  # of each further kv_transfer, without its arena
ARENA_BYTES = 2 * GIB
ARENA_SHARE = 0.1  # of memory
SMALL_KV_BYTES = GIB // 2
KV_SHARE = 0.15  # of memory, for one engine
KV_PROMPTS = 8
ARENA_PROMPTS = 2
GPU_SHARE = 0.9  # of a GPU's memory, over all engines on it

# Of Redis: what would expire soonest goes first. So the prefix index's keys (an hour) go long before quotas' buckets (a
# day) and usage (a year), and what never expires, as clients' keys, stays.
EVICTION = "volatile-ttl"

Programs = Mapping[str, Sequence[str]]  # role -> the command that starts it


class Place(msgspec.Struct, frozen=True, kw_only=True):
    """What is chosen anew at every start."""

    run_folder: str
    ports: tuple[int, ...]
    token: str  # from it come the passwords of the bus; who knows it may do anything there
    peer_secret: str = ""  # the stores of several nodes show each other that they know it
    redis_folder: str = ""  # where Redis keeps what it holds; empty: it keeps nothing


class Process(msgspec.Struct, frozen=True, kw_only=True):
    role: str  # gateway | prefill | decode | kv | nats | redis
    id: str
    command: tuple[str, ...]
    node: str = ""
    settings: dict[str, Any] = {}
    environ: dict[str, str] = {}  # beside the settings
    probe_url: str = ""  # serves /ready and /metrics; empty for NATS and Redis
    drain_s: float = 5.0


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    cluster: str
    address: str
    served_model_name: str
    model_path: str
    arrangement: str
    shm_dir: str
    place: Place
    nats_url: str
    nats_port: int
    redis_socket: str
    processes: tuple[Process, ...]


class Rooms(msgspec.Struct, frozen=True, kw_only=True):
    """Bytes."""

    arena: int  # of each node
    kv: int  # of each engine; 0 on GPUs
    total: int


def ports_needed(options: UpOptions) -> int:
    own = options.gateways if _own_probes(options) else 0
    stores = options.nodes * (2 if options.nodes > 1 else 1)  # probes, and one to listen to each other
    return 1 + stores + options.prefill + options.decode + own  # NATS, kv_transfer, workers, gateways


def nodes_of(options: UpOptions) -> tuple[list[str], list[str]]:
    """The node of each prefill and of each decode worker.

    Prefill workers are on the first nodes and decode workers on the others, as many as their share of the workers: so
    every hand-off goes from one node to another.
    """
    nodes = [f"node-{n}" for n in range(options.nodes)]
    workers = options.prefill + options.decode
    first = min(max(1, round(options.nodes * options.prefill / workers)), options.nodes - 1) if options.prefill else 0
    ours, others = (nodes[:first], nodes[first:]) if options.nodes > 1 else (nodes, nodes)
    prefill = [ours[n % len(ours)] for n in range(options.prefill)]
    return prefill, [others[n % len(others)] for n in range(options.decode)]


def plan(options: UpOptions, machine: Machine, model: Model, programs: Programs, place: Place) -> Plan:
    """Raises UserError when it does not fit, SettingsError when a service would refuse its settings."""
    rooms = _rooms(options, machine, model)
    _refuse_what_does_not_fit(options, machine, rooms)
    nats_port, *probe_ports = place.ports
    kv_ports, probe_ports = _split(probe_ports, options.nodes)
    peer_ports, probe_ports = _split(probe_ports, options.nodes if options.nodes > 1 else 0)
    redis_socket = f"{place.run_folder}/redis.sock"
    given = {
        **options.given,
        "cluster": f"baton-{options.port}",
        "nats_url": f"nats://{LOOPBACK}:{nats_port}",
        "redis_url": f"unix://{redis_socket}",
        "probe_host": LOOPBACK,
        "model": model.path,
        "revision": options.revision,
        "served_model_name": options.served_model_name or model.name,
        "arrangement": options.arrangement,
        "engine": options.engine,
        **({"sim_speed": f"{options.sim_speed:g}", "sim_kv": options.sim_kv} if options.engine == "sim" else {}),
        "keys": options.keys,
        "host": options.host,
        "port": options.port,
        "shm_dir": options.shm_dir,
        "arena_gib": round(rooms.arena / GIB, 4),
        "kv_gib": round(rooms.kv / GIB, 4),
    }
    address = f"{'https' if options.given.get('https_cert') else 'http'}://{_reachable(options.host)}:{options.port}"
    services = [
        *_stores(given, programs, place, kv_ports, peer_ports),
        *_workers(
            options, machine, given, programs, place=place, ports=probe_ports[: options.prefill + options.decode]
        ),
        *_gateways(options, given, programs, address, probe_ports[options.prefill + options.decode :]),
    ]
    return Plan(
        cluster=given["cluster"],
        address=address,
        served_model_name=given["served_model_name"],
        model_path=model.path,
        arrangement=options.arrangement,
        shm_dir=options.shm_dir,
        place=place,
        nats_url=f"nats://{OPERATOR}:{password(place, OPERATOR)}@{LOOPBACK}:{nats_port}",
        nats_port=nats_port,
        redis_socket=redis_socket,
        processes=(*_brokers(programs, place, redis_socket), *(_with_login(process, place) for process in services)),
    )


def password(place: Place, user: str) -> str:
    """Of a user of this cluster's NATS."""
    return hmac.new(place.token.encode(), user.encode(), "sha256").hexdigest()


def _with_login(process: Process, place: Place) -> Process:
    login = {"nats_user": process.role, "nats_password": password(place, process.role)}
    return msgspec.structs.replace(process, settings={**process.settings, **login})


def resolved(process: Process) -> CommonSettings:
    """The settings as the service itself will read them."""
    return load(SERVICES[process.role], to_environ(process.settings))


def _brokers(programs: Programs, place: Place, redis_socket: str) -> tuple[Process, Process]:
    return (
        Process(role="nats", id="nats-0", command=(*programs["nats"], "--config", f"{place.run_folder}/nats.conf")),
        Process(
            role="redis",
            id="redis-0",
            # Port 0: no TCP at all. Only keys and usage are more than a cache.
            command=(
                *programs["redis"],
                *("--port", "0", "--unixsocket", redis_socket, "--unixsocketperm", "700"),
                *("--save", "", "--appendonly", "yes" if place.redis_folder else "no"),
                *("--dir", place.redis_folder or place.run_folder, "--daemonize", "no"),
                *("--maxmemory", "256mb", "--maxmemory-policy", EVICTION),
            ),
        ),
    )


def _split(ports: list[int], count: int) -> tuple[list[int], list[int]]:
    return ports[:count], ports[count:]


def _stores(
    given: Mapping[str, Any], programs: Programs, place: Place, ports: Sequence[int], peer_ports: Sequence[int]
) -> list[Process]:
    """One a node. One alone listens to nobody."""
    processes = []
    for number, port in enumerate(ports):
        values = {**given, **_node(place, f"node-{number}")}
        if peer_ports:
            own = {"peer_secret": place.peer_secret, "peer_host": LOOPBACK, "peer_port": peer_ports[number]}
            values.update(own)
        processes.append(_service("kv", f"kv-{number}", values, programs, probe_port=port))
    return processes


def _node(place: Place, node: str) -> dict[str, str]:
    """What the processes of a node share."""
    return {"node": node, "kv_socket": f"{place.run_folder}/{node}.sock"}


def _workers(
    options: UpOptions,
    machine: Machine,
    given: Mapping[str, Any],
    programs: Programs,
    *,
    place: Place,
    ports: Sequence[int],
) -> list[Process]:
    ids = [("prefill", f"prefill-{n}") for n in range(options.prefill)]
    ids += [("decode", f"decode-{n}") for n in range(options.decode)]
    is_sim = options.engine == "sim"
    # A sim worker is a few threads that mostly sleep.
    cores = [""] * len(ids) if is_sim else core_shares(machine, len(ids))
    gpus, gpu_memory = ([""] * len(ids), 0.0) if is_sim else gpu_shares(machine, len(ids), options.engine_args)
    nodes = [node for pool in nodes_of(options) for node in pool]
    processes = []
    for (role, worker_id), node, port, core_list, gpu in zip(ids, nodes, ports, cores, gpus, strict=True):
        engine_args = dict(options.engine_args)
        if gpu_memory and "gpu_memory_utilization" not in engine_args:
            engine_args["gpu_memory_utilization"] = gpu_memory
        values = {**given, **_node(place, node), "engine_args": engine_args}
        values["cpu_cores"] = given.get("cpu_cores", core_list)
        environ = {"CUDA_VISIBLE_DEVICES": gpu} if gpu else {}
        if not is_sim:
            environ["VLLM_RPC_BASE_PATH"] = (
                place.run_folder
            )  # a killed engine leaves its sockets: they go with the folder
        processes.append(_service(role, worker_id, values, programs, probe_port=port, environ=environ))
    return processes


def _gateways(
    options: UpOptions, given: Mapping[str, Any], programs: Programs, address: str, ports: Sequence[int]
) -> list[Process]:
    if not _own_probes(options):
        return [_service("gateway", "gateway-0", given, programs, probe_url=address)]
    shared = {**given, "share_port": options.gateways > 1}
    return [_service("gateway", f"gateway-{n}", shared, programs, probe_port=port) for n, port in enumerate(ports)]


def _own_probes(options: UpOptions) -> bool:
    """One gateway alone is asked where everybody asks it, unless its certificate is one that only its clients trust."""
    return options.gateways > 1 or bool(options.given.get("https_cert"))


def core_shares(machine: Machine, workers: int) -> list[str]:
    """Each worker's cores such as "0-3", or "" where there are too few to give everyone its own.

    One hardware thread of each core: the second one shares the units that the kernels keep busy.
    """
    cores = [threads[0] for threads in machine.cores]
    if len(cores) < workers:
        cores = sorted(thread for threads in machine.cores for thread in threads)
    if machine.gpus or len(cores) < workers:
        return [""] * workers
    share, left = divmod(len(cores), workers)
    shares, start = [], 0
    for worker in range(workers):
        end = start + share + (1 if worker < left else 0)
        shares.append(_ranges(cores[start:end]))
        start = end
    return shares


def gpu_shares(machine: Machine, workers: int, engine_args: Mapping[str, Any]) -> tuple[list[str], float]:
    """Each worker's GPUs, and the share of GPU memory for each engine where they must share (0: vLLM's default)."""
    if not machine.gpus:
        return [""] * workers, 0.0
    width = int(engine_args.get("tensor_parallel_size", 1)) * int(engine_args.get("pipeline_parallel_size", 1))
    groups = len(machine.gpus) // width
    if not groups:
        raise UserError(f"an engine needs {width} GPUs and there are {len(machine.gpus)}: lower tensor_parallel_size")
    names = [",".join(machine.gpus[n % groups * width : (n % groups + 1) * width]) for n in range(workers)]
    crowd = math.ceil(workers / groups)
    return names, 0.0 if crowd == 1 else math.floor(GPU_SHARE / crowd * 100) / 100


def _service(
    role: str,
    service_id: str,
    given: Mapping[str, Any],
    programs: Programs,
    *,
    probe_port: int = 0,
    probe_url: str = "",
    environ: Mapping[str, str] | None = None,
) -> Process:
    known = SERVICES[role].__struct_fields__
    settings = {key: value for key, value in given.items() if key in known and value != ""}
    settings["id"] = service_id
    if not probe_url:
        settings["probe_port"] = probe_port
        probe_url = f"http://{LOOPBACK}:{probe_port}"
    process = Process(
        role=role,
        id=service_id,
        command=tuple(programs[role]),
        node=given.get("node", ""),
        settings=settings,
        environ=dict(environ or {}),
        probe_url=probe_url,
    )
    return msgspec.structs.replace(process, drain_s=resolved(process).drain_s)


def _rooms(options: UpOptions, machine: Machine, model: Model) -> Rooms:
    if options.engine == "sim":
        return _sim_rooms(options, machine)
    prompt = model.kv_bytes(_max_len(options, model), _value_bytes(options))
    least_arena = ARENA_PROMPTS * prompt
    arena = _usual_arena(options, machine)
    arena = int(options.arena_gib * GIB) or max(arena, least_arena)
    kv = 0
    if not machine.gpus:
        wanted = min(KV_PROMPTS * prompt, int(machine.memory_bytes * KV_SHARE))
        kv = int(options.kv_gib * GIB) or max(SMALL_KV_BYTES, wanted, prompt)
    weights = 0 if machine.gpus else model.weights_bytes
    workers = options.prefill + options.decode
    total = workers * (WORKER_BYTES + weights + kv) + options.nodes * arena + _service_bytes(options)
    return Rooms(arena=arena, kv=kv, total=total)


def _sim_rooms(options: UpOptions, machine: Machine) -> Rooms:
    """Room for as many tokens with their bytes as without. Raises SettingsError for the engine's arguments."""
    shape = resolve(options.engine_args, has_kv=options.sim_kv == "on")
    prompt = math.ceil(shape.max_model_len / shape.block_size) * shape.block_bytes
    arena = _usual_arena(options, machine)
    blocks = max(arena, ARENA_PROMPTS * prompt) // shape.block_bytes + 2  # the arena has a head, too
    arena = int(options.arena_gib * GIB) or max(LEAST_ARENA_BYTES, blocks * (shape.slot_bytes + SLOT_WORD_BYTES))
    wanted = min(KV_PROMPTS * prompt, int(machine.memory_bytes * KV_SHARE))
    kv = int(options.kv_gib * GIB) or max(SMALL_KV_BYTES, wanted, prompt)
    pages = kv // shape.block_bytes * (shape.slot_bytes + SIM_BLOCK_BYTES)
    workers = options.prefill + options.decode
    total = workers * (SIM_WORKER_BYTES + pages) + options.nodes * arena + _service_bytes(options)
    return Rooms(arena=arena, kv=kv, total=total)


def _usual_arena(options: UpOptions, machine: Machine) -> int:
    free = int(machine.free_shm_bytes * GPU_SHARE) // options.nodes
    return min(ARENA_BYTES, int(machine.memory_bytes * ARENA_SHARE), free)


def _service_bytes(options: UpOptions) -> int:
    return SERVICE_BYTES + (options.gateways - 1) * GATEWAY_BYTES + (options.nodes - 1) * STORE_BYTES


def _refuse_what_does_not_fit(options: UpOptions, machine: Machine, rooms: Rooms) -> None:
    shorter = "use a shorter --engine-arg max_model_len=N"
    what = "workers" if options.gateways == 1 else "workers or gateways"
    arenas = options.nodes * rooms.arena
    if arenas > machine.free_shm_bytes:
        which = "the KV arena needs" if options.nodes == 1 else f"the KV arenas of {options.nodes} nodes need"
        raise UserError(
            f"shared memory has {_gib(machine.free_shm_bytes)} free in {options.shm_dir} and {which} "
            f"{_gib(arenas)}: enlarge it (docker: --shm-size), pass a smaller --arena-gib, or {shorter}"
        )
    if rooms.total > machine.free_memory_bytes:
        raise UserError(
            f"this needs about {_gib(rooms.total)} of memory and {_gib(machine.free_memory_bytes)} is free: "
            f"start fewer {what}, pass a smaller --kv-gib or --arena-gib, or {shorter}"
        )


def _max_len(options: UpOptions, model: Model) -> int:
    wanted = options.engine_args.get("max_model_len")
    return wanted if isinstance(wanted, int) and wanted > 0 else model.max_len


def _value_bytes(options: UpOptions) -> int:
    return 2 if options.engine_args.get("dtype") in ("bfloat16", "float16", "half") else WIDEST_VALUE_BYTES


def _reachable(host: str) -> str:
    """How this machine itself names the address that the gateway listens on."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host
    if address.is_unspecified:
        address = ipaddress.ip_address(LOOPBACK if address.version == 4 else "::1")
    return str(address) if address.version == 4 else f"[{address}]"


def _ranges(cores: Sequence[int]) -> str:
    """[0, 1, 2, 5] -> "0-2,5"."""
    parts: list[list[int]] = []
    for core in cores:
        if parts and core == parts[-1][-1] + 1:
            parts[-1].append(core)
        else:
            parts.append([core])
    return ",".join(f"{part[0]}-{part[-1]}" if len(part) > 1 else str(part[0]) for part in parts)


def _gib(size: int) -> str:
    return f"{size / GIB:.1f} GiB" if size >= GIB // 10 else f"{size / 1024**2:.0f} MiB"
