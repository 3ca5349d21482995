"""Settings of every service: defaults < YAML file (BATON_CONFIG) < BATON_* variables; checked once, at start.

One frozen type per service, built only in its `__main__.py` and passed to constructors. A key that no service knows
is an error that names it. Fields in `SECRETS` and `PASSWORDS` are redacted when settings are shown.
"""

import os
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar

import msgspec
import yaml

from shared.errors import SettingsError
from shared.tls import Tls

Positive = Annotated[float, msgspec.Meta(gt=0)]
Count = Annotated[int, msgspec.Meta(ge=1)]
Port = Annotated[int, msgspec.Meta(ge=0, le=65535)]  # 0: the kernel chooses
Speed = Annotated[float, msgspec.Meta(gt=0)]  # of the real one; inf is one, too
Switch = Annotated[str, msgspec.Meta(pattern="^(on|off)$")]
Name = Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]{0,62}$")]  # a NATS subject token


class CommonSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What every service has."""

    cluster: Name = "baton"
    id: Name = msgspec.field(default_factory=lambda: socket.gethostname().partition(".")[0])  # unique in the cluster
    nats_url: str = "nats://127.0.0.1:4222"  # several servers: separated by commas; tls://… where TLS must be
    nats_user: str = ""  # the service's role where each has its own, see shared/bus_users.py
    nats_password: str = ""
    redis_url: str = "redis://127.0.0.1:6379/0"  # or unix:///path, or rediss://… for TLS
    tls_ca: str = ""  # PEM file: who may sign the certificates of NATS, Redis and other stores; empty: the system's
    tls_cert: str = ""  # PEM file: this service's own, shown to them; with tls_key
    tls_key: str = ""
    probe_host: str = "127.0.0.1"  # /health /ready /metrics of this service
    probe_port: Port = 0
    log_format: Annotated[str, msgspec.Meta(pattern="^(human|json)$")] = "human"
    log_level: Annotated[str, msgspec.Meta(pattern="^(debug|info|warning|error)$")] = "info"
    drain_s: Positive = 30.0  # how long running requests may go on after SIGTERM
    telemetry: Switch = "on"  # off: no spans, and nothing counted for each token

    @property
    def tls(self) -> Tls:
        return Tls(ca=self.tls_ca, cert=self.tls_cert, key=self.tls_key)


class Target(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a service tier is promised; admission refuses what cannot have it."""

    ttft_s: Positive = 2.0  # from the request's arrival to its first token
    itl_s: Positive = 0.1  # between two tokens


class Targets(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """By OpenAI's `service_tier`. flex has time."""

    priority: Target = Target()
    default: Target = Target()
    flex: Target = Target(ttft_s=20.0)


class Weights(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Shares of the service tiers while several wait."""

    priority: Positive = 8.0
    default: Positive = 4.0
    flex: Positive = 1.0


class Prices(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a process of each role costs an hour, its share of the machine included."""

    currency: Annotated[str, msgspec.Meta(pattern="^[A-Z]{3}$")] = "USD"
    gateway: Annotated[float, msgspec.Meta(ge=0)] = 0.0
    prefill: Annotated[float, msgspec.Meta(ge=0)] = 0.0
    decode: Annotated[float, msgspec.Meta(ge=0)] = 0.0
    kv: Annotated[float, msgspec.Meta(ge=0)] = 0.0


class GatewaySettings(CommonSettings, frozen=True, kw_only=True):
    model: str  # folder or Hugging Face id; the gateway reads its tokenizer and chat template
    revision: str = ""
    served_model_name: str = ""  # default: the folder's name, or the id
    host: str = "127.0.0.1"
    port: Port = 8000
    https_cert: str = ""  # PEM file, shown to clients; with https_key. Empty: plain HTTP
    https_key: str = ""
    share_port: bool = False  # with other gateways; then /ready and /metrics of this one are on probe_port, too
    arrangement: Annotated[str, msgspec.Meta(pattern="^(auto|split|unsplit)$")] = "auto"
    local_prefill_tokens: Annotated[int, msgspec.Meta(ge=0)] = 256  # auto, before speeds are known
    placement: Annotated[str, msgspec.Meta(pattern="^(predicted|least_loaded)$")] = "predicted"
    admission: Switch = "on"  # off: nothing is refused for its target, for comparison
    targets: Targets = Targets()  # e.g. {"default": {"ttft_s": 1.0}}
    tier_weights: Weights = Weights()
    keys: str = ""  # of clients: empty for none, a YAML file's path, or redis
    tenant_secret: str = ""  # the salts of tenants' KV blocks are derived from it; the same in every gateway
    allow_anonymous: bool = False  # without keys: serve more than loopback
    max_body_bytes: Count = 4 * 1024 * 1024
    max_bodies_bytes: Count = 256 * 1024 * 1024  # of all bodies that are arriving or being checked
    max_n: Count = 16
    max_prompts: Count = 32  # in one completion request
    max_requests: Count = 4096  # in flight or queued in this gateway
    max_queued_tokens: Count = 2_000_000  # prompt tokens waiting in this gateway
    queue_s: Positive = 30.0  # how long a request may wait for a worker, whatever its target
    index_s: Positive = 0.05  # how long the prefix index may take to answer
    request_s: Positive = 600.0  # for a whole request
    progress_s: Positive = 60.0  # a stream without a row for this long is stalled
    handoff_s: Positive = 30.0  # how long decode waits for blocks before it recomputes
    prices: Prices = Prices()  # e.g. {"prefill": 2.5, "decode": 2.5}; what tokens cost is worked out from them
    request_log: Switch = "on"  # one line for each request, when it has ended
    trace_ratio: Annotated[float, msgspec.Meta(ge=0, le=1)] = 1.0  # of requests whose trace is kept whatever happens,
    traces_per_s: Positive = 50.0  # no more than so many; as many failed, slow and retried ones are kept beside them
    max_connections: Count = 16_384  # of clients; fewer where the limit on open files is lower
    header_s: Positive = 10.0  # for a request's head to arrive
    body_s: Positive = 30.0  # for its body
    write_s: Positive = 30.0  # a client that takes no bytes for this long is cut off
    header_wait_s: Positive = 15.0  # then headers go out and ': waiting' comments keep the stream alive

    def target(self, tier: str) -> Target:
        target: Target = getattr(self.targets, tier)
        return target


class WorkerSettings(CommonSettings, frozen=True, kw_only=True):
    """Of prefill and decode workers alike: their defaults for `takes` differ, in their `__main__.py`."""

    model: str
    revision: str = ""
    served_model_name: str = ""
    engine: Annotated[str, msgspec.Meta(pattern="^(vllm|sim)$")] = "vllm"
    engine_args: dict[str, Any] = {}  # any vLLM engine argument, e.g. {"dtype": "float32"}; for sim its own few
    sim_speed: Speed = 1.0  # sim: step times are divided by it; inf: no step takes time
    sim_kv: Switch = "on"  # sim: off moves 64 bytes a block instead of the KV
    takes: list[str] = []  # prefill, decode; empty: the service's default
    node: Name = "node-0"
    kv_socket: str = ""  # of the node's kv_transfer
    max_waiting: Annotated[int, msgspec.Meta(ge=0)] = 4  # jobs accepted beyond what the engine runs at once
    prefill_jobs: Count = 64  # prompts a prefill worker takes at once; gateways bind by time, and fewer
    cpu_cores: str = ""  # e.g. "0" or "0-3": threads are pinned there; empty: all
    kv_gib: Annotated[float, msgspec.Meta(ge=0)] = 0.0  # the engine's own KV cache on CPU; 0: the engine's default
    reserve_s: Positive = 5.0  # how long a job waits for slots in the node's store
    # Blocks of other nodes: auto asks for them when that has been faster than computing; the others are to compare.
    pull: Annotated[str, msgspec.Meta(pattern="^(auto|always|never)$")] = "auto"
    lease_s: Positive = 120.0  # a lease that is not released by then is revoked
    wedge_s: Positive = 60.0  # an engine without a sign of life for this long ends the worker; no step may take longer


class KvSettings(CommonSettings, frozen=True, kw_only=True):
    node: Name = "node-0"
    kv_socket: str  # unix socket it listens on
    arena_gib: Annotated[float, msgspec.Meta(ge=0)] = 0.0  # 0: min(2 GiB, 10 % of memory)
    shm_dir: str = "/dev/shm"  # noqa: S108 - shared memory is this folder on Linux
    peer_secret: str = ""  # stores of other nodes must know it, too; empty: blocks stay on this node
    peer_host: str = "127.0.0.1"  # where other nodes' stores are listened to
    peer_port: Port = 0
    peer_address: str = ""  # host, or host:port, as other nodes reach it; empty: peer_host
    peer_tls: Switch = "off"  # on: with tls_ca, tls_cert and tls_key, which every store then needs
    peer_s: Annotated[float, msgspec.Meta(ge=0.1)] = 2.0  # a peer that is silent or takes nothing for so long has gone


SERVICES: dict[str, type[CommonSettings]] = {
    "gateway": GatewaySettings,
    "prefill": WorkerSettings,
    "decode": WorkerSettings,
    "kv": KvSettings,
}
SECRETS = frozenset({"nats_url", "redis_url"})  # may hold passwords
PASSWORDS = frozenset({"nats_password", "peer_secret", "tenant_secret"})  # are nothing else
PREFIX = "BATON_"
CONFIG_KEY = "BATON_CONFIG"
# Read by the launcher, not by a service.
LAUNCHER_KEYS = frozenset({"BATON_HOME", "BATON_API_KEY"})

S = TypeVar("S", bound=CommonSettings)


def load(cls: type[S], environ: Mapping[str, str] | None = None) -> S:
    """Build one service's settings. Raises SettingsError naming the key."""
    env = os.environ if environ is None else environ
    values = _from_yaml(env.get(CONFIG_KEY, ""))
    values.update(_from_env(env))
    known = set(cls.__struct_fields__)
    everyone = set().union(*(set(s.__struct_fields__) for s in SERVICES.values()))
    for key in values:
        if key not in everyone:
            raise SettingsError(f"unknown setting {key!r}: known are {', '.join(sorted(known))}")
    mine = {key: value for key, value in values.items() if key in known}
    if isinstance(mine.get("node"), str):
        mine["node"] = mine["node"].replace(".", "-")  # Kubernetes' have dots, which would divide a subject
    for field in msgspec.structs.fields(cls):
        if field.name in mine:
            mine[field.name] = _convert(field.name, mine[field.name], field.type)
        elif field.required:
            raise SettingsError(f"missing setting {field.name!r}: set {PREFIX}{field.name.upper()}")
    return cls(**mine)


def shown(settings: CommonSettings) -> dict[str, Any]:
    """For the log and `baton config`: secrets redacted."""
    values: dict[str, Any] = msgspec.to_builtins(settings)
    hidden = {key for key in SECRETS if "@" in str(values.get(key))} | {key for key in PASSWORDS if values.get(key)}
    return {key: "***" if key in hidden else value for key, value in values.items()}


def served_name(model: str, given: str) -> str:
    """What clients call a model: the given name, else the folder's, else the repository id.

    Gateway and workers must agree on it: a gateway hears only workers of its own model.
    """
    if given:
        return given
    folder = Path(model).expanduser()
    return folder.resolve().name if folder.is_dir() else model


def to_environ(values: Mapping[str, Any]) -> dict[str, str]:
    """The BATON_* variables that give a child process these values."""
    return {
        PREFIX + key.upper(): value if isinstance(value, str) else msgspec.json.encode(value).decode()
        for key, value in values.items()
    }


def _from_yaml(path: str) -> dict[str, Any]:
    if not path:
        return {}
    try:
        loaded = yaml.safe_load(Path(path).read_text()) or {}
    except (OSError, yaml.YAMLError) as error:
        raise SettingsError(f"{CONFIG_KEY}: cannot read {path}: {error}") from error
    if not isinstance(loaded, dict):
        raise SettingsError(f"{CONFIG_KEY}: {path} must hold a mapping of settings")
    return loaded


def _from_env(env: Mapping[str, str]) -> dict[str, Any]:
    return {
        key[len(PREFIX) :].lower(): value
        for key, value in env.items()
        if key.startswith(PREFIX) and key != CONFIG_KEY and key not in LAUNCHER_KEYS
    }


def _convert(key: str, value: Any, kind: Any) -> Any:
    # Variables are strings: lists and maps are written as JSON there.
    if isinstance(value, str) and value.startswith(("[", "{")):
        try:
            value = msgspec.json.decode(value)
        except msgspec.DecodeError as error:
            raise SettingsError(f"setting {key!r}: not valid JSON: {error}") from error
    if isinstance(value, bool) and kind is Switch:
        value = "on" if value else "off"  # YAML reads the bare words so
    try:
        return msgspec.convert(value, kind, strict=False)
    except msgspec.ValidationError as error:
        raise SettingsError(f"setting {key!r}: {error}") from error
