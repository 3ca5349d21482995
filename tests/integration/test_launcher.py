"""The launcher as its user meets it: real processes, NATS and Redis; stand-ins for Baton's own services."""

import asyncio
import json
import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import nats
import nats.errors
import psutil
import pytest
import redis

from services.launcher.state import ClusterFolder, ClusterRecord
from tests.support.launches import Launches, launches, until

CONFIG = {"num_hidden_layers": 1, "num_attention_heads": 1, "hidden_size": 8, "max_position_embeddings": 128}


@pytest.fixture
def baton(tmp_path: Path) -> Iterator[Launches]:
    model = tmp_path / "small-model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(CONFIG))
    with launches(tmp_path, model) as found:
        yield found


def record_of(baton: Launches) -> ClusterRecord:
    record = ClusterFolder(baton.home, baton.port).read()
    assert record is not None
    return record


def refused(baton: Launches, *args: str, **environ: str) -> str:
    """What `up` says when it refuses: one line, exit code 2, nothing left."""
    done = baton.run("up", *args, **environ)
    assert done.returncode == 2, done
    lines = done.stderr.splitlines()
    assert len(lines) == 1, done.stderr
    assert baton.left() == []
    return lines[0]


def test_up_says_where_it_is_and_ctrl_c_leaves_nothing(baton: Launches) -> None:
    up = baton.ready()
    assert any(f"curl http://127.0.0.1:{baton.port}/v1/chat/completions" in line for line in up.lines)
    assert not any("dashboard" in line for line in up.lines)  # the stand-in has none
    assert len(baton.pids) == 8  # NATS, Redis, four services, two engines
    assert baton.left()
    assert up.end(signal.SIGINT) == 0
    assert baton.left() == []
    # The gateway stops taking requests before the workers go, and they before the store.
    order = (baton.stand_ins / "order").read_text().split()
    assert order[0] == "gateway-0"
    assert set(order[1:3]) == {"prefill-0", "decode-0"}
    assert order[3:] == ["kv-0"]


def test_status_tells_the_states_and_exits_by_them(baton: Launches) -> None:
    code, seen = baton.status()
    assert (code, seen["ready"]) == (2, False)
    up = baton.ready("--prefill", "2")
    code, seen = baton.status()
    assert code == 0
    assert {key: seen[key] for key in ("ready", "address", "model", "arrangement")} == {
        "ready": True,
        "address": f"http://127.0.0.1:{baton.port}",
        "model": "small-model",
        "arrangement": "auto",
    }
    assert seen["model_path"] == str(baton.model)
    roles = [(service["role"], service["id"], service["state"]) for service in seen["services"]]
    assert roles == [
        ("nats", "nats-0", "ready"),
        ("redis", "redis-0", "ready"),
        ("kv", "kv-0", "ready"),
        ("prefill", "prefill-0", "ready"),
        ("prefill", "prefill-1", "ready"),
        ("decode", "decode-0", "ready"),
        ("gateway", "gateway-0", "ready"),
    ]
    worker = seen["services"][3]
    assert (worker["node"], worker["takes"], worker["engine"]) == ("node-0", ["prefill"], "vllm")
    assert worker["metrics_url"].startswith("http://127.0.0.1:")
    assert set(worker) == {"role", "id", "pid", "node", "state", "takes", "engine", "metrics_url"}
    assert "small-model at" in baton.run("status").stdout
    up.end(signal.SIGTERM)
    assert baton.status()[0] == 2


def test_a_cluster_that_is_not_ready_says_so(baton: Launches) -> None:
    (baton.stand_ins / "prefill-0.slow").touch()
    up = baton.up()
    up.until_line("prefill-0 loading the engine … ")
    code, seen = baton.status()
    assert (code, seen["services"][3]["state"]) == (0, "starting")  # the gateway has a path through decode-0
    baton.remember()
    assert up.end() == 1
    assert baton.left() == []


def test_brokers_keep_others_out_and_allow_what_baton_needs(baton: Launches) -> None:
    baton.ready()
    record = record_of(baton)
    assert "@" in record.nats_url

    async def max_payload(url: str) -> int:
        client = await nats.connect(url, allow_reconnect=False, max_reconnect_attempts=0, connect_timeout=5)
        try:
            return client.max_payload
        finally:
            await client.close()

    assert asyncio.run(max_payload(record.nats_url)) == 8 * 1024 * 1024
    host = record.nats_url.split("@")[1]
    with pytest.raises((nats.errors.Error, OSError)):
        asyncio.run(max_payload(f"nats://{host}"))
    cache = redis.Redis(unix_socket_path=f"{record.run_folder}/redis.sock")
    assert cache.config_get("maxmemory")["maxmemory"] == str(256 * 1024 * 1024)
    assert cache.config_get("maxmemory-policy")["maxmemory-policy"] == "volatile-ttl"
    assert cache.config_get("save")["save"] == ""
    assert Path(record.run_folder).stat().st_mode & 0o077 == 0
    listening = {
        connection.laddr.ip
        for pid in baton.pids
        for connection in psutil.Process(pid).net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN
    }
    assert listening == {"127.0.0.1"}


def test_a_second_up_on_the_port_is_refused_and_another_port_is_not(baton: Launches, tmp_path: Path) -> None:
    first = baton.ready()
    done = baton.run("up")
    assert done.returncode == 2
    assert "a cluster already runs on port" in done.stderr
    assert baton.status()[0] == 0
    second_folder = tmp_path / "second"
    second_folder.mkdir()
    with launches(second_folder, baton.model) as second:
        second.home = baton.home
        other = second.ready()
        assert other.end() == 0
        assert second.left() == []
    assert baton.status()[0] == 0
    assert first.end() == 0


def test_a_taken_port_is_refused(baton: Launches) -> None:
    with socket.create_server(("127.0.0.1", baton.port)):
        assert f"cannot listen on 127.0.0.1:{baton.port} (Address already in use)" in refused(baton)


@pytest.mark.parametrize(
    ("args", "environ", "words"),
    [
        (("--model", "/nowhere/at/all"), {}, "there is no model folder /nowhere/at/all"),
        (("--arena-gib", "1000000"), {}, "shared memory has"),
        (("--kv-gib", "1000000"), {}, "of memory and"),
        (("--nodes", "3"), {}, "--nodes must be"),
        (("--no-such-option",), {}, "unrecognized arguments: --no-such-option"),
        ((), {"BATON_NO_SUCH_KEY": "1"}, "unknown setting BATON_NO_SUCH_KEY"),
        ((), {"BATON_DRAIN_S": "soon"}, "drain_s"),
    ],
)
def test_refusals(baton: Launches, args: tuple[str, ...], environ: dict[str, str], words: str) -> None:
    assert words in refused(baton, *args, **environ)


@pytest.mark.parametrize("service_id", ["kv-0", "decode-0", "gateway-0"])
def test_a_child_that_ends_at_start_is_quoted_and_nothing_stays(baton: Launches, service_id: str) -> None:
    (baton.stand_ins / f"{service_id}.exit").write_text("some noise\nsetting 'x': this is what is wrong\n")
    said = refused(baton)
    assert f"{service_id} ended while starting (exit code 3): setting 'x': this is what is wrong" in said
    assert f"logs/{service_id}.log" in said


def test_a_worker_that_dies_comes_back(baton: Launches) -> None:
    up = baton.ready()
    host, engine = baton.pids_of("prefill-0")
    os.kill(host, signal.SIGKILL)
    assert "prefill-0 died (SIGKILL" in up.until_line("starting it again in 1 s")
    until(lambda: not psutil.pid_exists(engine), "its engine is gone too")
    up.until_line("prefill-0 is back")
    code, seen = baton.status()
    assert code == 0
    assert seen["services"][3]["pid"] == baton.pids_of("prefill-0")[0] != host
    os.kill(baton.pids_of("prefill-0")[0], signal.SIGKILL)
    up.until_line("starting it again in 2 s")
    code, seen = baton.status()
    assert (code, seen["services"][3]["state"]) == (0, "lost")
    baton.remember()
    assert up.end() == 0
    assert baton.left() == []


def test_a_process_that_answers_nobody_is_killed_and_comes_back(baton: Launches) -> None:
    up = baton.ready()
    os.kill(baton.pids_of("decode-0")[0], signal.SIGSTOP)
    up.until_line("decode-0 gives no answer: killed")
    assert "decode-0 died (SIGKILL" in up.until_line("starting it again")
    up.until_line("decode-0 is back")
    baton.remember()
    assert up.end() == 0
    assert baton.left() == []


@pytest.mark.parametrize("how", ["down", "up"])
def test_what_a_killed_launcher_left_is_cleaned(baton: Launches, how: str) -> None:
    (baton.stand_ins / "decode-0.stuck").touch()  # does not even notice that its parent is gone
    up = baton.ready()
    up.popen.kill()
    up.popen.wait()
    (baton.shm / f"baton-baton-{baton.port}-node-0").touch()  # as a store leaves it that is killed
    foreign = baton.shm / f"baton-baton-{baton.port}1-node-0"
    foreign.touch()
    code, seen = baton.status()
    assert (code, seen["ready"]) == (1, False)
    old = baton.pids.copy()
    if how == "up":
        (baton.stand_ins / "decode-0.stuck").unlink()
        assert baton.ready().end() == 0
    else:
        assert "nothing is left running" in baton.run("down").stdout
    assert baton.pids >= old
    assert baton.left() == [str(foreign)]


def test_down_stops_a_running_cluster_and_is_content_without_one(baton: Launches) -> None:
    assert baton.run("down").returncode == 0
    up = baton.ready()
    done = baton.run("down")
    assert (done.returncode, up.popen.wait(60)) == (0, 0)
    assert baton.left() == []


def test_a_second_ctrl_c_stops_at_once(baton: Launches) -> None:
    (baton.stand_ins / "decode-0.stuck").touch()
    up = baton.ready(BATON_DRAIN_S="600")
    up.popen.send_signal(signal.SIGINT)
    up.until_line("Stopping")
    assert up.end(signal.SIGINT) == 0
    assert baton.left() == []


def test_what_does_not_end_in_time_is_killed(baton: Launches) -> None:
    (baton.stand_ins / "decode-0.stuck").touch()
    up = baton.ready(BATON_DRAIN_S="0.1")
    assert up.end() == 0
    assert any("decode-0 did not end within" in line for line in up.lines)
    assert baton.left() == []


def test_detach_returns_when_ready_and_the_cluster_goes_on(baton: Launches) -> None:
    done = baton.run("up", "--detach")
    assert done.returncode == 0
    assert "Ready after" in done.stdout
    baton.remember()
    assert baton.status()[0] == 0
    os.kill(baton.pids_of("decode-0")[0], signal.SIGKILL)
    log = baton.home / str(baton.port) / "logs" / "launcher.log"
    until(lambda: "decode-0 is back" in log.read_text(), "the launcher in the background starts it again")
    baton.remember()
    assert baton.run("down").returncode == 0
    assert baton.left() == []


def test_detach_fails_as_up_does(baton: Launches) -> None:
    (baton.stand_ins / "decode-0.exit").write_text("no such device")
    assert "decode-0 ended while starting (exit code 3): no such device" in refused(baton, "--detach")


def test_chat_logs_config_and_tap(baton: Launches) -> None:
    up = baton.ready()
    done = baton.run("chat", "one two three")
    assert (done.returncode, done.stdout.split()) == (0, ["one", "two", "three"])
    refusal = baton.run("chat", "refuse me")
    assert (refusal.returncode, refusal.stderr) == (2, "baton: the queue is full\n")
    broken = baton.run("chat", "break off")
    assert (broken.returncode, broken.stderr.strip()) == (1, "baton: the worker was lost")

    assert baton.run("logs", "decode-0").stdout.splitlines() == ["decode-0 begins", "decode-0 serves"]
    assert "kv-0 | kv-0 serves" in baton.run("logs").stdout
    assert "there is no log of decode-9" in baton.run("logs", "decode-9").stderr

    config = baton.run("config").stdout
    assert "lease_s: 120.0" in config
    assert record_of(baton).nats_url not in config
    assert "nats_password: '***'" in config

    seen = baton.run("tap", "beat.>", "--count", "2").stdout.splitlines()
    assert len(seen) == 2
    assert f"baton-{baton.port}.beat." in seen[0]
    assert '"role"' in seen[0]
    assert up.end() == 0
    assert "nothing answers at" in baton.run("chat", "hello").stderr
    assert "no cluster runs on port" in baton.run("tap").stderr


def test_config_without_a_cluster_shows_what_up_would_do(baton: Launches) -> None:
    done = baton.run("config", "--model", str(baton.model), "--decode", "2", "--engine-arg", "dtype=float32")
    assert done.returncode == 0
    assert "decode-1:" in done.stdout
    assert "dtype: float32" in done.stdout
    assert "nats_password: '***'" in done.stdout
