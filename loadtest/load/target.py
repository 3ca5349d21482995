"""What a run is aimed at: found out before the load begins, so that a wrong address is one line and no run."""

import contextlib
import ipaddress
import json
import socket
import subprocess
import sys
from typing import Any
from urllib.parse import urlsplit

import httpx
import msgspec
import psutil

from loadtest.load.bodies import CHAT, Tokeniser
from loadtest.load.client import Endpoint
from loadtest.load.levels import Place, engine_facts
from loadtest.load.prompts import WORDS
from loadtest.result import Target
from shared.errors import SettingsError

ASK_S = 10.0
CALIBRATE_S = 60.0
STATUS_S = 30.0
WORKERS = ("prefill", "decode")
FEW, MANY = 8, 208  # words of the two messages that a tokeniser is measured with


class Found(msgspec.Struct, frozen=True, kw_only=True):
    """`places`: whose levels can be read. `max_model_len`: None where the server does not say.

    `model_path` and `engine`: of a cluster on this machine, its files and what its workers say of their engine.
    """

    target: Target
    endpoint: Endpoint
    max_model_len: int | None
    places: list[Place]
    model_path: str = ""
    engine: dict[str, str] = {}


def look(url: str, model: str | None, headers: tuple[tuple[str, str], ...]) -> Found:
    """Raises SettingsError when nothing answers there, or nothing that serves a model."""
    endpoint, base = _endpoint(url, headers)
    name, max_model_len = _model(base, model, dict(headers))
    status = _status(endpoint)
    services = status.get("services", []) if status else []
    places = [
        Place(role=one["role"], id=one["id"], metrics_url=one["metrics_url"])
        for one in services
        if one.get("metrics_url")
    ]
    facts = _engine(places)
    return Found(
        target=_target(base, name, status, services, facts),
        endpoint=endpoint,
        max_model_len=max_model_len,
        places=places or [Place(role="gateway", id="gateway", metrics_url=f"{base}/metrics")],
        model_path=str(status.get("model_path") or "") if status else "",
        engine=facts,
    )


def calibrated(found: Found) -> Tokeniser | None:
    """How many words make a token, from the usage of two short chats; None when the server would not say."""
    base, model = found.target.url, found.target.model
    with httpx.Client(timeout=CALIBRATE_S, headers=dict(found.endpoint.headers), trust_env=False) as client:
        counted = [_prompt_tokens(client, base, model, words) for words in (FEW, MANY)]
    few, many = counted
    if few is None or many is None or many <= few:
        return None
    tokens_a_word = (many - few) / (MANY - FEW)
    return Tokeniser(words_a_token=1 / tokens_a_word, overhead_tokens=max(0.0, few - FEW * tokens_a_word))


def _prompt_tokens(client: httpx.Client, base: str, model: str, words: int) -> int | None:
    content = " ".join(WORDS[index * 7 % len(WORDS)] for index in range(words))
    body = {"model": model, "messages": [{"role": "user", "content": content}], "max_tokens": 1}
    try:
        answer = client.post(f"{base}{CHAT}", json=body)
        return int(answer.json()["usage"]["prompt_tokens"])
    except (httpx.HTTPError, ValueError, KeyError, TypeError):
        return None


def _endpoint(url: str, headers: tuple[tuple[str, str], ...]) -> tuple[Endpoint, str]:
    """And the address without a trailing slash or /v1."""
    parts = urlsplit(url if "://" in url else f"http://{url}")
    try:
        port = parts.port or (443 if parts.scheme == "https" else 80)
    except ValueError:
        raise SettingsError(f"--url {url}: the port is not a number from 1 to 65535") from None
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise SettingsError(f"--url {url}: give an address such as http://127.0.0.1:8000")
    prefix = parts.path.rstrip("/").removesuffix("/v1")
    try:
        found = socket.getaddrinfo(parts.hostname, port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise SettingsError(f"--url {url}: {parts.hostname} cannot be resolved: {error.strerror}") from None
    endpoint = Endpoint(
        host=_reachable([str(one[4][0]) for one in found], port),
        port=port,
        tls=parts.scheme == "https",
        authority=parts.netloc.rpartition("@")[2],
        server_name=parts.hostname,
        prefix=prefix,
        headers=headers,
    )
    return endpoint, f"{parts.scheme}://{endpoint.authority}{prefix}"


def _reachable(hosts: list[str], port: int) -> str:
    """The first address that takes a connection: `localhost` may stand for two, and a server listen on one."""
    for host in hosts if len(hosts) > 1 else ():
        with contextlib.suppress(OSError), socket.create_connection((host, port), timeout=ASK_S):
            return host
    return hosts[0]


def _model(base: str, wanted: str | None, headers: dict[str, str]) -> tuple[str, int | None]:
    """The model's name and length."""
    try:
        answer = httpx.get(f"{base}/v1/models", headers=headers, timeout=ASK_S, trust_env=False)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise SettingsError(
            f"{base} does not answer: {error or type(error).__name__}; start a cluster there (baton up), or give --url"
        ) from None
    models = _listed(answer)
    if not models:
        if wanted is not None:
            return wanted, None
        raise SettingsError(
            f"{base}/v1/models lists no model (HTTP {answer.status_code}): is it an OpenAI-compatible server? "
            "--model NAME goes without the list"
        )
    chosen = next((one for one in models if one["id"] == wanted), None) if wanted is not None else models[0]
    if chosen is None:
        raise SettingsError(f"--model {wanted}: not served at {base}; it has {', '.join(str(m['id']) for m in models)}")
    length = chosen.get("max_model_len")
    return str(chosen["id"]), length if isinstance(length, int) and length > 1 else None


def _listed(answer: httpx.Response) -> list[dict[str, Any]]:
    """Empty for whatever is no list of models."""
    if answer.status_code != httpx.codes.OK:
        return []
    with contextlib.suppress(ValueError, KeyError, TypeError):
        return [one for one in answer.json()["data"] if isinstance(one, dict) and "id" in one]
    return []


def _status(endpoint: Endpoint) -> dict[str, Any] | None:
    """`baton status` of a cluster on this machine; None where there is none."""
    if not _is_here(endpoint.host):
        return None
    command = (sys.executable, "-m", "services.launcher", "status", "--json", "--port", str(endpoint.port))
    with contextlib.suppress(OSError, subprocess.SubprocessError, ValueError):
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=STATUS_S)
        status = json.loads(done.stdout)
        if isinstance(status, dict) and status.get("services"):
            return status
    return None


def _engine(places: list[Place]) -> dict[str, str]:
    """Of the first worker that answers; all have the same."""
    for place in places:
        if place.role in WORKERS:
            with contextlib.suppress(httpx.HTTPError, httpx.InvalidURL):
                if facts := engine_facts(httpx.get(place.metrics_url, timeout=ASK_S, trust_env=False).text):
                    return facts
    return {}


def _target(
    base: str, model: str, status: dict[str, Any] | None, services: list[dict[str, Any]], facts: dict[str, str]
) -> Target:
    if status is None:
        return Target(url=base, model=model)
    engines = {str(one["engine"]) for one in services if one.get("engine")}
    workers = {role: sum(one["role"] == role for one in services) for role in WORKERS}
    return Target(
        url=base,
        model=model,
        engine=engines.pop() if len(engines) == 1 else "unknown",
        profile=facts.get("profile", ""),
        arrangement=str(status.get("arrangement") or "unknown"),
        workers={role: count for role, count in workers.items() if count},
    )


def _is_here(host: str) -> bool:
    if ipaddress.ip_address(host).is_loopback:
        return True
    return any(host == one.address for addresses in psutil.net_if_addrs().values() for one in addresses)
