"""docker-compose.yml, Dockerfile and the lock files against the code: nothing in them is misspelt or out of date."""

import re
import socket
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement

from shared.settings import CONFIG_KEY, PREFIX, SERVICES, CommonSettings, load

REPOSITORY = Path(__file__).parents[2]
COMPOSE = yaml.safe_load((REPOSITORY / "docker-compose.yml").read_text())
DOCKERFILE = (REPOSITORY / "Dockerfile").read_text()
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
SETTINGS = {PREFIX + key.upper() for service in SERVICES.values() for key in service.__struct_fields__} | {CONFIG_KEY}
BATONS = {
    name: service for name, service in COMPOSE["services"].items() if "BATON_CONFIG" in service.get("environment", {})
}


def test_every_variable_is_a_setting() -> None:
    written = (REPOSITORY / "docker-compose.yml").read_text() + DOCKERFILE
    assert not set(re.findall(r"\bBATON_[A-Z_]+", written)) - SETTINGS


@pytest.mark.parametrize("name", BATONS)
def test_a_variable_that_is_only_handed_on_does_not_hide_what_an_image_sets(name: str) -> None:
    handed_on = {key for key, value in BATONS[name]["environment"].items() if value is None}
    assert handed_on
    assert not handed_on & set(re.findall(r"\b([A-Z_]+)=", DOCKERFILE))


def test_the_services_that_are_there_and_who_can_reach_them() -> None:
    assert set(BATONS) == {
        "gateway",
        "kv-transfer",
        *(f"{role}-worker{kind}" for role in ("prefill", "decode") for kind in ("", "-gpu")),
    }
    published = {name: service["ports"] for name, service in COMPOSE["services"].items() if "ports" in service}
    assert set(published) == {"gateway", "prometheus"}
    assert all(port.startswith("127.0.0.1:") for ports in published.values() for port in ports)
    assert COMPOSE["networks"]["bus"]["internal"] is True
    for name in ("nats", "redis", "kv-transfer", "prefill-worker", "decode-worker"):
        assert COMPOSE["services"][name]["networks"] == ["bus"]


def test_who_is_given_no_id_takes_the_name_of_its_host() -> None:
    assert load(CommonSettings, {}).id == socket.gethostname().partition(".")[0]
    assert load(CommonSettings, {"BATON_ID": "decode-7"}).id == "decode-7"


@pytest.mark.parametrize("name", COMPOSE["services"])
def test_every_container_is_confined(name: str) -> None:
    service = COMPOSE["services"][name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["user"].split(":")[0] != "0"
    assert service["logging"]["options"]["max-size"]
    assert "mem_limit" in service
    assert name == "secrets" or service["restart"] == "unless-stopped"


@pytest.mark.parametrize("name", BATONS)
def test_containers_get_longer_than_a_drain_takes(name: str) -> None:
    drain_s = float(re.sub(r"\$\{BATON_DRAIN_S:-(.*)\}", r"\1", BATONS[name]["environment"]["BATON_DRAIN_S"]))
    if name != "kv-transfer":  # which drains nothing
        assert float(BATONS[name]["stop_grace_period"].rstrip("s")) > drain_s


def test_images_come_from_stock_bases_by_the_classic_frontend() -> None:
    assert not DOCKERFILE.startswith("# syntax=")
    stages = set(re.findall(r"^FROM \S+ AS (\S+)$", DOCKERFILE, re.MULTILINE))
    bases = set(re.findall(r"^FROM (\S+) AS", DOCKERFILE, re.MULTILINE)) - stages
    assert bases == {"python:3.11-slim"}
    assert stages >= {"gateway", "kv-transfer", "worker-sim", "worker-cpu", "worker-cuda", "worker-vllm"}


@pytest.mark.parametrize(
    ("lock", "extra"), [("base", None), ("cpu", "cpu"), ("cuda", "gpu")], ids=["base", "cpu", "cuda"]
)
def test_locks_hold_what_the_project_asks_for(lock: str, extra: str | None) -> None:
    """`requirements/lock.sh` makes them anew."""
    locked = _locked(lock) | (_locked("torch-cpu") if lock == "cpu" else {})
    wanted = [*PROJECT["dependencies"], *(PROJECT["optional-dependencies"][extra] if extra else [])]
    for line in wanted:
        requirement = Requirement(line)
        name = requirement.name.lower().replace("_", "-")
        assert name in locked, f"{name} is missing in requirements/{lock}.lock"
        assert requirement.specifier.contains(locked[name]), f"requirements/{lock}.lock has {name} {locked[name]}"


def _locked(name: str) -> dict[str, Any]:
    text = (REPOSITORY / "requirements" / f"{name}.lock").read_text()
    pins = re.findall(r"^([a-z0-9-]+)==(\S+) \\\n    --hash=sha256:[0-9a-f]{64}", text, re.MULTILINE)
    assert len(pins) == len(re.findall(r"^[a-z]", text, re.MULTILINE)), "a package without a hash"
    return dict(pins)
