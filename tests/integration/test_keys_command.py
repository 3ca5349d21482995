"""`baton keys`, on a file, on a Redis, and on a whole sim cluster that wants keys."""

import json
import os
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest
from redis import Redis

from services.launcher.__main__ import main
from services.launcher.state import ClusterFolder
from shared.access import key_file, usage_table
from shared.access.key import digest
from tests.support.cluster import Cluster, running_cluster
from tests.support.redis import RedisServer

MODEL = "baton-demo"
WAIT_S = 60.0


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("BATON_KEYS", "BATON_REDIS_URL", "BATON_CLUSTER", "BATON_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("BATON_HOME", str(tmp_path))
    return tmp_path


def said(capsys: pytest.CaptureFixture[str], *words: str, code: int = 0) -> tuple[str, str]:
    assert main(["keys", *words]) == code
    captured = capsys.readouterr()
    return captured.out, captured.err


def test_keys_in_a_file(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, err = said(capsys, "list")
    assert f"No keys in {home}/keys.yaml" in out
    more = ["--name", "for tests", "--tier", "flex", "--model", "m", "--requests-per-minute", "5"]
    secret, err = said(capsys, "add", "--tenant", "acme", *more)
    secret = secret.strip()
    assert secret.startswith("sk-baton-")
    assert secret not in err
    assert "never shown again" in err
    (key,) = key_file.read(home / "keys.yaml")
    assert (key.hash, key.tenant, key.name, key.tiers) == (digest(secret), "acme", "for tests", ["flex"])
    assert (key.models, key.requests_per_minute, key.tokens_per_minute) == (["m"], 5, 0)
    other, _ = said(capsys, "add", "--tenant", "beta", "--port", "8299")
    table, _ = said(capsys, "list")
    assert re.search(rf"^{key.id} +acme +for tests +flex +m +5 +- +20\d\d-\d\d-\d\d$", table, re.MULTILINE)
    as_json, _ = said(capsys, "list", "--json")
    assert [one["tenant"] for one in json.loads(as_json)] == ["acme", "beta"]
    for shown in (table, as_json, (home / "keys.yaml").read_text()):
        assert secret not in shown
        assert other.strip() not in shown
    assert digest(secret) not in table + as_json
    out, _ = said(capsys, "revoke", key.id)
    assert f"Revoked {key.id}" in out
    _, err = said(capsys, "revoke", key.id, code=2)
    assert err.startswith(f"baton: there is no key {key.id}")
    assert [one.tenant for one in key_file.read(home / "keys.yaml")] == ["beta"]


def test_a_file_that_is_named(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "mine.yaml"
    said(capsys, "add", "--tenant", "acme", "--file", str(path))
    assert len(key_file.read(path)) == 1
    assert not (home / "keys.yaml").exists()
    path.write_text("nonsense")
    _, err = said(capsys, "list", "--file", str(path), code=2)
    assert err.count("\n") == 1
    assert "mine.yaml" in err


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["add"], "--tenant"),
        (["add", "--tenant", "a b"], "tenant"),
        (["add", "--tenant", "a", "--tier", "fast"], "fast"),
        (["add", "--tenant", "a", "--requests-per-minute", "-1"], "requests_per_minute"),
        (["usage"], "no cluster runs"),
        (["usage", "--days", "0"], "--days"),
        ([], "add|list|revoke|usage"),
    ],
)
def test_what_cannot_be(home: Path, capsys: pytest.CaptureFixture[str], words: list[str], why: str) -> None:
    _, err = said(capsys, *words, code=2)
    assert why in err
    assert err.count("\n") == 1
    assert list(home.iterdir()) == []


def test_up_refuses_keys_that_are_not_there(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["up", "--keys", "--port", "8298", "--engine", "sim"]) == 2
    assert f"there is no {home}/keys.yaml" in capsys.readouterr().err


def test_keys_and_usage_in_a_redis(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    server = RedisServer(tmp_path)
    monkeypatch.setenv("BATON_KEYS", "redis")
    monkeypatch.setenv("BATON_REDIS_URL", server.url)
    monkeypatch.setenv("BATON_CLUSTER", "far")
    _, err = said(capsys, "list", code=2)
    assert "Redis does not answer" in err
    server.start()
    try:
        secret, _ = said(capsys, "add", "--tenant", "acme")
        (listed,) = json.loads(said(capsys, "list", "--json")[0])
        with Redis(unix_socket_path=str(server.path)) as redis:
            assert redis.hlen("baton:far:keys") == 1
            assert secret.strip() not in str(redis.hgetall("baton:far:keys"))
            for tenant, count in (("acme", 3), ("beta", 5)):
                redis.hincrby(usage_table.day_name("far", usage_table.today()), f"{tenant}\tORG/M\tprompt", count)
        said(capsys, "revoke", listed["id"])
        assert json.loads(said(capsys, "list", "--json")[0]) == []
        (row,) = json.loads(said(capsys, "usage", "--json", "--tenant", "acme", "--days", "2")[0])
        assert (row["day"], row["model"], row["prompt"]) == (usage_table.today(), "ORG/M", 3)
        assert re.search(r"beta +ORG/M +0 +5 +0 +0", said(capsys, "usage")[0])
    finally:
        server.stop()


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    options = ["--engine=sim", "--sim-speed=inf", "--gateways=2", "--keys=redis", "--host=0.0.0.0"]
    small = [
        "--prefill=0",
        "--arrangement=unsplit",
        "--arena-gib=0.05",
        "--kv-gib=0.1",
        "--engine-arg=max_model_len=512",
    ]
    with running_cluster(tmp_path_factory.mktemp("home"), *options, *small) as cluster:
        yield cluster


def until(true, what: str) -> None:
    """For what nothing announces across processes."""
    deadline = time.monotonic() + WAIT_S
    while not true():
        assert time.monotonic() < deadline, f"not within {WAIT_S:.0f} s: {what}"
        time.sleep(0.1)


def ask(cluster: Cluster, key: str) -> int:
    body = {"model": MODEL, "prompt": "hello", "max_tokens": 4}
    # A connection of its own: the kernel chooses the gateway.
    answer = httpx.post(
        f"{cluster.url}/v1/completions", json=body, headers={"authorization": f"Bearer {key}"}, timeout=30
    )
    return answer.status_code


def always(cluster: Cluster, key: str, status: int) -> bool:
    return all(ask(cluster, key) == status for _ in range(8))


def test_a_cluster_that_wants_keys(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("BATON_HOME", str(cluster.home))
    port = ["--port", str(cluster.port)]
    with pytest.raises(openai.AuthenticationError):
        cluster.client().models.list()
    key = said(capsys, "add", "--tenant", "acme", "--requests-per-minute", "1000", *port)[0].strip()

    def listed() -> list[str]:
        return [one["id"] for one in json.loads(said(capsys, "list", "--json", *port)[0])]

    def used() -> int:
        return sum(row["requests"] for row in json.loads(said(capsys, "usage", "--json", *port)[0]))

    (key_id,) = listed()
    until(lambda: always(cluster, key, 200), "both gateways know the key")
    assert main(["chat", "hello", "--max-tokens", "4", *port]) == 2
    assert "BATON_API_KEY" in capsys.readouterr().err
    monkeypatch.setenv("BATON_API_KEY", key)
    assert main(["chat", "hello", "--max-tokens", "4", *port]) == 0
    assert capsys.readouterr().out.strip()
    until(lambda: used() >= 9, "usage is written")
    before = used()
    record = ClusterFolder(cluster.home, cluster.port).read()
    assert record is not None
    os.kill(next(service.pid for service in record.services if service.role == "redis"), signal.SIGKILL)
    monkeypatch.delenv("BATON_API_KEY")

    def is_back() -> bool:
        code = main(["keys", "list", "--json", *port])
        return code == 0 and key_id in capsys.readouterr().out

    until(is_back, "Redis is back, with its keys")
    assert used() == before
    assert always(cluster, key, 200)
    said(capsys, "revoke", key_id, *port)
    until(lambda: always(cluster, key, 401), "both gateways have let it go")
    for path in (cluster.home / str(cluster.port)).rglob("*"):
        assert not path.is_file() or key.encode() not in path.read_bytes(), path
