"""A small service in place of a real one, for tests of the launcher: settings, probes, heartbeats, drain, files.

    python -m tests.support.stand_in ROLE

It behaves by the BATON_* settings that the real one would read. What it should do wrong is written into a folder
that the test owns (`STAND_IN_FOLDER`): `<id>.exit` makes it end at start with the file's text as its last words,
`<id>.stuck` makes it ignore SIGTERM, `<id>.slow` keeps it from getting ready.
It leaves `<id>.pid` there, and appends `<id>` to `order` when it ends.
"""

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import nats

from shared import subjects, wire
from shared.settings import SERVICES, CommonSettings, GatewaySettings, KvSettings, load


class Probes(BaseHTTPRequestHandler):
    reason: str | None = None
    model = ""

    def do_GET(self) -> None:
        if self.path == "/ready":
            body = {"ready": self.reason is None, "reason": self.reason}
            self._answer(200 if self.reason is None else 503, json.dumps(body), "application/json")
        elif self.path == "/v1/models":
            self._answer(200, json.dumps({"data": [{"id": self.model}]}), "application/json")
        else:
            self._answer(404, "", "text/plain")

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        text = body["messages"][0]["content"]
        if text == "refuse me":
            self._answer(429, json.dumps({"error": {"message": "the queue is full"}}), "application/json")
            return
        events: list[dict[str, Any]] = [{"choices": [{"delta": {"content": f"{word} "}}]} for word in text.split()]
        if text == "break off":
            events.append({"error": {"message": "the worker was lost"}})
        lines = [f"data: {json.dumps(event)}\n\n" for event in events]
        lines.append(": baton-receipt {}\n\ndata: [DONE]\n\n")
        self._answer(200, "".join(lines), "text/event-stream")

    def _answer(self, status: int, body: str, kind: str) -> None:
        data = body.encode()
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        pass


def main() -> int:
    role = sys.argv[1]
    settings = load(SERVICES[role])
    folder = Path(os.environ["STAND_IN_FOLDER"])
    stopped = threading.Event()
    stuck = (folder / f"{settings.id}.stuck").exists()
    signal.signal(signal.SIGTERM, lambda *_: None if stuck else stopped.set())
    print(f"{settings.id} begins")
    if (wrong := folder / f"{settings.id}.exit").exists():
        print(wrong.read_text(), file=sys.stderr)
        return 3
    # What an engine does: a process of its own in the worker's group, which must go with it.
    engine = subprocess.Popen(["sleep", "1000"]) if role in ("prefill", "decode") else None
    (folder / f"{settings.id}.pids").write_text(f"{os.getpid()} {engine.pid if engine else ''}".strip())
    with contextlib.ExitStack() as files:
        if isinstance(settings, KvSettings):
            arena = Path(settings.shm_dir) / f"baton-{settings.cluster}-{settings.node}"
            arena.write_bytes(b"kv")
            files.callback(arena.unlink)
            listener = files.enter_context(socket.socket(socket.AF_UNIX))
            listener.bind(settings.kv_socket)
        host, port = settings.probe_host, settings.probe_port
        if isinstance(settings, GatewaySettings):
            host, port = settings.host, settings.port
            Probes.model = settings.served_model_name
        if (folder / f"{settings.id}.slow").exists():
            Probes.reason = "loading the engine"
        server = ThreadingHTTPServer((host, port), Probes)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        print(f"{settings.id} serves", flush=True)
        asyncio.run(_beat(role, settings, stopped))
    with (folder / "order").open("a") as order:
        order.write(f"{settings.id}\n")
    return 0


async def _beat(role: str, settings: CommonSettings, stopped: threading.Event) -> None:
    """Heartbeats as the real ones send them, until stopped."""
    client = await nats.connect(settings.nats_url, user=settings.nats_user, password=settings.nats_password)
    takes = [role] if role in ("prefill", "decode") else []
    beat = wire.encode(wire.Heartbeat(role=role, id=settings.id, incarnation="1", takes=takes))
    while not stopped.is_set():
        await client.publish(subjects.beat(settings.cluster, role, settings.id), beat)
        await asyncio.to_thread(stopped.wait, 0.1)
    await client.close()


if __name__ == "__main__":
    sys.exit(main())
