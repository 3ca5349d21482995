"""`baton down`: stop a cluster, and clean up after a launcher that was killed."""

import contextlib

import psutil

from services.launcher.state import ClusterFolder, ClusterRecord, lives
from services.launcher.sweep import sweep, until_gone

STOP_S = 30.0  # beyond what the services grant their requests


def down(folder: ClusterFolder, port: int) -> int:
    record = folder.read()
    if record is None:
        print(f"No cluster runs on port {port}.")
        return 0
    if lives(record.pid, record.born):
        print("Stopping: running requests may finish.")
        _stop_launcher(record)
    left = folder.read()
    if left is not None:
        found = sweep(folder, left)
        print(f"The launcher was killed: cleaned up, {found} of its processes had to be stopped.")
    print("Stopped; nothing is left running.")
    return 0


def _stop_launcher(record: ClusterRecord) -> None:
    """It drains tier by tier, so the longest drains add up."""
    drains = {service.role: float(service.settings.get("drain_s", 30.0)) for service in record.services}
    with contextlib.suppress(psutil.NoSuchProcess):
        launcher = psutil.Process(record.pid)
        launcher.terminate()
        if until_gone([launcher], sum(drains.values()) + STOP_S):
            launcher.kill()
            until_gone([launcher], STOP_S)
