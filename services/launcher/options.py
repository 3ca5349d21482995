"""The command line, and what `baton up` was asked for: flags over BATON_* variables over the YAML file."""

import argparse
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import msgspec
import yaml

from services.launcher.key_flags import add_keys_flags
from services.launcher.refusal import UserError
from shared.settings import CONFIG_KEY, LAUNCHER_KEYS, PREFIX, SERVICES, Speed, Switch

DEMO_MODEL = Path(__file__).resolve().parents[2] / "models" / "demo"
DEMO_NAME = "baton-demo"
DEFAULT_PORT = 8000
USUAL_KEYS = "usual"  # --keys without a value
# The launcher gives every process its own; one value from the shell for all of them could only break the cluster.
OWN_KEYS = frozenset(
    {
        *("cluster", "id", "node", "nats_url", "redis_url", "probe_host", "probe_port", "share_port", "kv_socket"),
        *("nats_user", "nats_password", "peer_secret", "peer_host", "peer_port", "peer_address"),
    }
)
MOST_GATEWAYS = 64


class UpOptions(msgspec.Struct, frozen=True, kw_only=True):
    prefill: int = 1
    decode: int = 1
    nodes: int = 1
    gateways: int = 1
    arrangement: str = "auto"
    model: str = str(DEMO_MODEL)
    revision: str = ""
    served_model_name: str = ""
    engine: str = "vllm"
    engine_args: dict[str, Any] = {}
    sim_speed: Speed = 1.0
    sim_kv: Switch = "on"
    arena_gib: float = 0.0  # 0: the launcher chooses
    kv_gib: float = 0.0  # 0: the launcher chooses
    host: str = "127.0.0.1"
    port: int = DEFAULT_PORT
    keys: str = ""  # a file's full path, or redis
    detach: bool = False
    shm_dir: str = "/dev/shm"  # noqa: S108 - shared memory is this folder on Linux
    given: dict[str, Any] = {}  # settings from variables and file, for every service that knows the key


def given_settings(environ: Mapping[str, str]) -> dict[str, Any]:
    """BATON_* variables over the YAML file. Refuses keys that no service knows and those the launcher sets itself."""
    values = _from_yaml(environ.get(CONFIG_KEY, ""))
    values.update(
        (key[len(PREFIX) :].lower(), value)
        for key, value in environ.items()
        if key.startswith(PREFIX) and key != CONFIG_KEY and key not in LAUNCHER_KEYS
    )
    known = set().union(*(set(cls.__struct_fields__) for cls in SERVICES.values()))
    for key in values:
        if key not in known:
            raise UserError(f"unknown setting {PREFIX}{key.upper()}: known are {', '.join(sorted(known - OWN_KEYS))}")
        if key in OWN_KEYS:
            raise UserError(f"{PREFIX}{key.upper()} is set by the launcher for each process: unset it")
    return values


def up_options(flags: argparse.Namespace, given: Mapping[str, Any]) -> UpOptions:
    """Resolve. Raises UserError for what is not offered."""
    values: dict[str, Any] = {
        key: given[key] for key in UpOptions.__struct_fields__ if key in given and key != "engine_args"
    }
    for key in UpOptions.__struct_fields__:
        if getattr(flags, key, None) is not None:
            values[key] = getattr(flags, key)
    values["engine_args"] = _engine_args(given.get("engine_args", {}), getattr(flags, "engine_arg", None) or [])
    values["given"] = {key: value for key, value in given.items() if key not in UpOptions.__struct_fields__}
    if isinstance(values.get("sim_kv"), bool):
        values["sim_kv"] = "on" if values["sim_kv"] else "off"  # YAML reads the bare words so
    if values.get("keys"):
        values["keys"] = _keys(str(values["keys"]))
    if "model" not in values and "served_model_name" not in values:
        values["served_model_name"] = DEMO_NAME
    try:
        options = msgspec.convert(values, UpOptions, strict=False)
    except msgspec.ValidationError as error:
        raise UserError(f"a setting has a wrong value: {error}") from error
    if options.engine != "sim" and (sim := [key for key in ("sim_speed", "sim_kv") if key in values]):
        raise UserError(f"--{sim[0].replace('_', '-')} is for the sim engine: add --engine sim, or leave it out")
    if options.decode < 1:
        raise UserError("--decode must be at least 1: decode workers produce the output")
    if options.prefill < 0 or (options.prefill < 1 and options.arrangement == "split"):
        raise UserError("--prefill must be at least 1 with --arrangement split, and never negative")
    if not 1 <= options.nodes <= options.prefill + options.decode:
        raise UserError(
            f"--nodes must be between 1 and the number of workers ({options.prefill + options.decode}), "
            f"not {options.nodes}: a node without a worker would hold nothing"
        )
    if not 1 <= options.gateways <= MOST_GATEWAYS:
        raise UserError(f"--gateways must be between 1 and {MOST_GATEWAYS}, not {options.gateways}")
    return options


def port_option(flags: argparse.Namespace, given: Mapping[str, Any]) -> int:
    """The port that names the cluster."""
    try:
        port = int(given.get("port", DEFAULT_PORT) if flags.port is None else flags.port)
    except ValueError as error:
        raise UserError(f"BATON_PORT must be a number: {error}") from error
    if not 1 <= port <= 65535:
        raise UserError(f"--port must be between 1 and 65535, not {port}")
    return port


def read_flags(argv: Sequence[str] | None) -> argparse.Namespace:
    return _parser().parse_args(argv)


class _OneLineParser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see {self.prog} --help)")


def _parser() -> argparse.ArgumentParser:
    parser = _OneLineParser(
        prog="baton", description="Serve a model with prefill and decode split into separate tiers.", allow_abbrev=False
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, what in (
        ("up", "start a whole cluster on this machine"),
        ("status", "say what runs; exit 0 ready, 1 not ready, 2 no cluster"),
        ("down", "stop the cluster, also what a killed launcher left"),
        ("chat", "send one message through the gateway and stream the answer"),
        ("logs", "show the logs of all processes or of one"),
        ("trace", "draw what a request did, hop by hop; without an id, list the last requests"),
        ("tap", "print the traffic on the bus"),
        ("keys", "make, list and revoke API keys, and read what was used"),
        ("config", "print the resolved settings of every service, secrets redacted"),
    ):
        command = commands.add_parser(name, help=what, description=what, allow_abbrev=False)
        if name == "keys":
            add_keys_flags(command, DEFAULT_PORT)
            continue
        command.add_argument("--port", type=int, help=f"the cluster's port (default {DEFAULT_PORT})")
        if name in ("up", "config"):
            _add_up_flags(command)
        _add_own_flags(name, command)
    return parser


def _add_up_flags(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("--prefill", type=int, metavar="N", help="prefill workers (default 1)")
    add("--decode", type=int, metavar="N", help="decode workers (default 1)")
    add(
        "--nodes",
        type=int,
        metavar="N",
        help="logical nodes, each with its own KV store; prefill on the first, decode on the others, so that KV blocks "
        "go from node to node over TCP (default 1: through shared memory)",
    )
    add("--gateways", type=int, metavar="N", help="gateway processes on the one port (default 1)")
    add("--arrangement", choices=("auto", "split", "unsplit"), help="who computes prompts (default auto)")
    add("--model", metavar="PATH", help="a Hugging Face model folder or ORG/NAME (default: the demo model)")
    add("--served-model-name", metavar="NAME", help="what clients call it (default: the folder's name)")
    add("--engine", choices=("vllm", "sim"), help="vllm (default), or sim: a measured profile's timing, no model run")
    add("--engine-arg", action="append", metavar="KEY=VALUE", help="any argument of the engine; may be repeated")
    add("--sim-speed", metavar="X", help="sim: times the profile's speed, or inf for no waiting at all (default 1)")
    add("--sim-kv", choices=("on", "off"), help="sim: off hands over 64 bytes a block instead of the KV (default on)")
    add("--arena-gib", type=float, metavar="X", help="shared memory for KV blocks (default: chosen by memory)")
    add("--kv-gib", type=float, metavar="X", help="each engine's own KV cache on CPU (default: chosen by model)")
    add("--host", metavar="H", help="where the gateway listens (default 127.0.0.1; others need --keys)")
    add(
        "--keys",
        nargs="?",
        const=USUAL_KEYS,
        metavar="PATH|redis",
        help="let in only who has a key: from a file (default ~/.baton/keys.yaml) or the cluster's Redis",
    )


def _add_own_flags(name: str, command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    if name == "up":
        add("--detach", action="store_true", default=None, help="go on in the background once ready")
    elif name == "status":
        add("--json", action="store_true", help="as JSON")
    elif name == "chat":
        add("text", nargs="+", metavar="TEXT")
        add("--temperature", type=float, default=0.0, help="default 0: always the likeliest token")
        add("--max-tokens", type=int, default=512, help="default 512")
        add("--key", help="the API key (default: the variable BATON_API_KEY, which other users cannot see)")
    elif name == "logs":
        add("id", nargs="?", metavar="ID", help="e.g. prefill-0, gateway-0 or launcher")
        add("-f", "--follow", action="store_true", help="go on as lines are written")
    elif name == "trace":
        which = command.add_mutually_exclusive_group()
        which.add_argument("id", nargs="?", metavar="ID", help="of a request (x-request-id) or a trace")
        which.add_argument("--last", dest="order", action="store_const", const="last", help="the last request")
        which.add_argument("--slowest", dest="order", action="store_const", const="slowest", help="the slowest kept")
        add("--json", action="store_true", help="as JSON")
        add("--key", help="the API key, where one is needed (default: the variable BATON_API_KEY)")
    elif name == "tap":
        add("subject", nargs="?", metavar="SUBJECT", help="below the cluster's name, e.g. 'beat.>' (default all)")
        add("--count", type=int, default=0, metavar="N", help="stop after N messages")


def _keys(given: str) -> str:
    if given == "redis":
        return given
    return str(home() / "keys.yaml" if given == USUAL_KEYS else Path(given).expanduser().absolute())


def _engine_args(given: Any, flags: Sequence[str]) -> dict[str, Any]:
    try:
        values = json.loads(given) if isinstance(given, str) else dict(given)
    except (TypeError, ValueError) as error:
        raise UserError(f"BATON_ENGINE_ARGS must be a JSON object: {error}") from error
    if not isinstance(values, dict):
        raise UserError('BATON_ENGINE_ARGS must be a JSON object such as {"dtype": "float32"}')
    for flag in flags:
        key, equals, value = flag.partition("=")
        if not (key and equals):
            raise UserError(f"--engine-arg {flag}: write it as KEY=VALUE, e.g. --engine-arg max_model_len=4096")
        values[key.lstrip("-").replace("-", "_")] = _json_or_text(value)
    return values


def _json_or_text(value: str) -> Any:
    try:
        return json.loads(value)
    except ValueError:
        return value


def _from_yaml(path: str) -> dict[str, Any]:
    if not path:
        return {}
    try:
        loaded = yaml.safe_load(Path(path).read_text()) or {}
    except (OSError, yaml.YAMLError) as error:
        raise UserError(f"{CONFIG_KEY}: cannot read {path}: {error}".replace("\n", " ")) from error
    if not isinstance(loaded, dict):
        raise UserError(f"{CONFIG_KEY}: {path} must hold a mapping of settings")
    return loaded


def home(environ: Mapping[str, str] = os.environ) -> Path:
    """The folder of all clusters of this user."""
    return Path(environ.get("BATON_HOME") or "~/.baton").expanduser().absolute()
