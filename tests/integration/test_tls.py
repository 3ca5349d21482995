"""TLS by setting: real servers that want it, and what is said when certificates are not what they should be."""

import asyncio
import contextlib
import os
import ssl
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import httpx
import pytest

from services.gateway.__main__ import check_https
from services.launcher.key_store import RedisStore
from services.launcher.refusal import UserError
from shared import subjects, wire
from shared.access.connection import open_redis
from shared.bus import Bus
from shared.bus_login import Account
from shared.errors import SettingsError
from shared.prefix_index import open_redis as open_index
from shared.redis_login import check_login
from shared.settings import GatewaySettings
from shared.tls import Tls
from tests.support.certificates import Authority, Pair
from tests.support.gateway_cluster import Cluster
from tests.support.nats import nats_server
from tests.support.redis import RedisServer

ROOT = Path(__file__).parents[2]
HERE = "127.0.0.1"
START_S = 30.0


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture(scope="module")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("stranger"))


@pytest.fixture(scope="module")
def pair(authority: Authority) -> Pair:
    return authority.sign(HERE)


@pytest.fixture(scope="module")
def mutual(authority: Authority, pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A NATS that wants a certificate from everybody."""
    more = f'tls {{ cert_file: "{pair.cert}", key_file: "{pair.key}", ca_file: "{authority.ca}", verify: true }}\n'
    with nats_server(tmp_path_factory.mktemp("nats"), more=more) as url:
        yield url.replace("nats://", "tls://")


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shared.bus.CONNECT_S", 0.5)


async def join(url: str, tls: Tls) -> Bus:
    return await Bus.connect(url, "test", Account(user="u", password="p", tls=tls))  # noqa: S106


async def test_nats_over_mutual_tls(authority: Authority, pair: Pair, mutual: str) -> None:
    tls = Tls(ca=authority.ca, cert=pair.cert, key=pair.key)
    one, two = await join(mutual, tls), await join(mutual, tls)
    try:

        async def pong(_: wire.AnyMessage, __: object) -> wire.Message:
            return wire.Pong(id="w")

        await one.serve(subjects.ping("c", "w"), pong)
        await one.flush()
        assert await two.request(subjects.ping("c", "w"), wire.Ping(), wire.Pong, timeout_s=5) == wire.Pong(id="w")
    finally:
        await one.close()
        await two.close()


async def test_nats_of_a_stranger_is_refused(stranger: Authority, pair: Pair, mutual: str) -> None:
    with pytest.raises(SettingsError, match=r"setting 'nats_url': no TLS with tls://.*certificate verify failed"):
        await join(mutual, Tls(ca=stranger.ca, cert=pair.cert, key=pair.key))


async def test_nats_under_another_name_is_refused(authority: Authority, pair: Pair, tmp_path: Path) -> None:
    other = authority.sign("nats.example")
    more = f'tls {{ cert_file: "{other.cert}", key_file: "{other.key}" }}\n'
    with nats_server(tmp_path / "nats", more=more) as url, pytest.raises(SettingsError, match="tls_ca"):
        await join(url, Tls(ca=authority.ca))


async def test_nats_refuses_who_shows_no_certificate(authority: Authority, mutual: str) -> None:
    with pytest.raises(SettingsError, match="setting 'nats_url'"):
        await join(mutual, Tls(ca=authority.ca))


async def test_a_server_without_tls_hears_no_password(authority: Authority) -> None:
    """Whoever stands between could say that the server offers no TLS."""
    said: list[bytes] = []

    async def plain(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b'INFO {"server_id":"x","version":"2.10.0","max_payload":1048576,"auth_required":true}\r\n')
        with contextlib.suppress(ConnectionError):
            while line := await reader.readline():
                said.append(line)
        writer.close()

    async with await asyncio.start_server(plain, HERE, 0) as server:
        port = server.sockets[0].getsockname()[1]
        with pytest.raises(SettingsError, match="the server offers no TLS"):
            await join(f"tls://{HERE}:{port}", Tls(ca=authority.ca))
        assert said == []
        with pytest.raises(SettingsError, match="no NATS server answers"):
            await join(f"nats://{HERE}:{port}", Tls(ca=authority.ca))
        assert any(b'"pass": "p"' in line for line in said)


@pytest.fixture
async def redis_url(authority: Authority, pair: Pair, tmp_path: Path) -> AsyncIterator[str]:
    """A real Redis behind TLS that wants a certificate; its own build has none, so a few lines stand before it."""
    server = RedisServer(tmp_path, "--requirepass", "secret")
    server.start()
    context = Tls(ca=authority.ca, cert=pair.cert, key=pair.key).server()

    async def copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(65536):
                writer.write(data)
        writer.close()

    async def forward(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        inner_reader, inner_writer = await asyncio.open_unix_connection(server.path)
        async with asyncio.TaskGroup() as both:
            both.create_task(copy(reader, inner_writer))
            both.create_task(copy(inner_reader, writer))

    async with await asyncio.start_server(forward, HERE, 0, ssl=context) as front:
        yield f"rediss://:secret@{HERE}:{front.sockets[0].getsockname()[1]}/0"
        front.close()
    server.stop()


async def test_redis_over_mutual_tls(authority: Authority, pair: Pair, redis_url: str) -> None:
    tls = Tls(ca=authority.ca, cert=pair.cert, key=pair.key)
    for redis in (open_redis(redis_url, tls=tls), open_index(redis_url, tls)):
        async with redis:
            await check_login(redis)
            await redis.set("k", "v")
            assert await redis.get("k") == b"v"


async def test_redis_with_a_wrong_password_or_certificate(
    authority: Authority, stranger: Authority, pair: Pair, redis_url: str
) -> None:
    good = Tls(ca=authority.ca, cert=pair.cert, key=pair.key)
    wrong = Tls(ca=stranger.ca, cert=pair.cert, key=pair.key)
    for url, tls, words in (
        (redis_url.replace("secret", "guess"), good, "setting 'redis_url': Redis refuses this user or password"),
        (redis_url.replace(":secret@", ""), good, "setting 'redis_url': Redis refuses this user or password"),
        (redis_url, wrong, "setting 'redis_url': no TLS with Redis: CERTIFICATE_VERIFY_FAILED"),
    ):
        async with open_redis(url, tls=tls) as redis:
            with pytest.raises(SettingsError, match=words):
                await check_login(redis)


async def test_commands_about_keys_reach_it_too(
    authority: Authority, pair: Pair, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = RedisStore(redis_url, "c")
    with pytest.raises(UserError, match="Redis does not answer"):
        await asyncio.to_thread(store.read)
    for part, path in (("CA", authority.ca), ("CERT", pair.cert), ("KEY", pair.key)):
        monkeypatch.setenv(f"BATON_TLS_{part}", path)
    assert await asyncio.to_thread(store.read) == []


async def test_redis_that_is_away_is_no_reason_to_stop(tmp_path: Path) -> None:
    async with open_redis(f"unix://{tmp_path}/nobody.sock") as redis:
        await check_login(redis)


async def test_the_gateway_serves_https(authority: Authority, pair: Pair, nats_url: str, tiny_model: Path) -> None:
    cluster = Cluster(nats_url, str(tiny_model))
    cluster.settings = {"https_cert": pair.cert, "https_key": pair.key}
    async with cluster.gateway() as running:
        try:
            await cluster.add(running, "prefill-0", "decode-0")
            url = running.url.replace("http://", "https://")
            body = {"model": "tiny", "prompt": "hello", "max_tokens": 3, "stream": True}
            async with httpx.AsyncClient(verify=ssl.create_default_context(cafile=authority.ca)) as client:
                answer = await client.post(f"{url}/v1/completions", json=body)
                assert answer.status_code == 200
                assert '"finish_reason":"length"' in answer.text
                assert answer.text.endswith("data: [DONE]\n\n")
                assert (await client.get(f"{url}/health")).status_code == 200
            async with httpx.AsyncClient() as unknowing:
                with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
                    await unknowing.get(f"{url}/health")
                with pytest.raises(httpx.HTTPError):
                    await unknowing.get(f"{running.url}/health")
        finally:
            for worker in cluster.workers.values():
                await worker.die()


def make_bad_files(folder: Path) -> None:
    (folder / "empty").touch()
    (folder / "text").write_text("no certificate")


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"tls_ca": "nowhere"}, "setting 'tls_ca': cannot read {}/nowhere: No such file or directory"),
        ({"tls_ca": "empty"}, "setting 'tls_ca': {}/empty holds no certificate in PEM"),
        ({"tls_ca": "text"}, "setting 'tls_ca': {}/text holds no certificate in PEM"),
        ({"tls_cert": "text"}, "missing setting 'tls_key': it belongs to 'tls_cert'"),
        ({"tls_key": "text"}, "missing setting 'tls_cert': it belongs to 'tls_key'"),
        ({"tls_cert": "nowhere", "tls_key": "text"}, "setting 'tls_cert': cannot read {}/nowhere"),
        ({"tls_cert": "text", "tls_key": "text"}, "setting 'tls_cert': {}/text and {}/text are not a certificate"),
    ],
)
def test_files_that_cannot_be_used_name_their_setting(tmp_path: Path, files: dict[str, str], words: str) -> None:
    make_bad_files(tmp_path)
    paths = {key: str(tmp_path / name) for key, name in files.items()}
    tls = Tls(ca=paths.get("tls_ca", ""), cert=paths.get("tls_cert", ""), key=paths.get("tls_key", ""))
    with pytest.raises(SettingsError) as refusal:
        tls.client()
    assert str(refusal.value).startswith(words.replace("{}", str(tmp_path)))


def test_a_key_of_another_certificate(authority: Authority, pair: Pair) -> None:
    other = authority.sign("other.example")
    with pytest.raises(SettingsError, match=r"setting 'tls_key': .* is not the key of the certificate"):
        Tls(cert=pair.cert, key=other.key).client()
    settings = GatewaySettings(id="g", model="m", https_cert=pair.cert, https_key=other.key)
    with pytest.raises(SettingsError, match="setting 'https_key'"):
        check_https(settings)


@pytest.mark.parametrize("service", ["services.gateway", "services.kv_transfer", "services.decode_worker"])
def test_a_service_with_a_wrong_file_ends_with_one_line(service: str, nats_url: str, tiny_model: Path) -> None:
    own = {key: value for key, value in os.environ.items() if not key.startswith(("BATON_", "OTEL_"))}
    environ = own | {
        "BATON_ID": "one",
        "BATON_NATS_URL": nats_url,
        "BATON_MODEL": str(tiny_model),
        "BATON_ENGINE": "sim",
        "BATON_PORT": "0",
        "BATON_KV_SOCKET": "/tmp/baton-unused.sock" if service == "services.kv_transfer" else "",
        "BATON_ARENA_GIB": "0.001",
        "BATON_TLS_CA": "/nowhere.pem",
    }
    done = subprocess.run(
        [sys.executable, "-m", service],
        env=environ,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=START_S,
        check=False,
    )
    assert done.returncode == 2
    assert "setting 'tls_ca': cannot read /nowhere.pem" in done.stderr.strip().splitlines()[-1]
    assert "Traceback" not in done.stderr
