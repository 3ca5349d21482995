"""The Kubernetes manifests: valid by their schemas, and true of the code."""

import inspect
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from cloudcoil.models.keda.v1alpha1 import ScaledObject
from cloudcoil.models.prometheus_operator.v1 import PodMonitor, PrometheusRule
from jsonschema import Draft202012Validator

from shared import bus_users
from shared.settings import SERVICES, KvSettings, _convert, load
from tests.support.manifests import CLUSTERS, OVERLAYS, ROOT, built, of_kind, pods, settings_of

CUSTOM = {"ScaledObject": ScaledObject, "PodMonitor": PodMonitor, "PrometheusRule": PrometheusRule}
# Pods of Baton's own, and the service whose settings they read.
OWN = {"gateway": "gateway", "prefill": "prefill", "decode": "decode", "kv-transfer": "kv"}
OUT_S = 15  # for an engine and its interpreter to end
SPOT_S = 120  # what a spot node is given
KUBERNETES = "1.37"


def strict(schema: Any) -> Any:
    """A model's schema that refuses what the model does not name, as the API server does."""
    if isinstance(schema, list):
        return [strict(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    known = {key: strict(value) for key, value in schema.items()}
    if isinstance(known.get("properties"), dict) and "additionalProperties" not in known:
        known["additionalProperties"] = False
    return known


def wrong_with(document: dict[str, Any]) -> list[str]:
    if model := CUSTOM.get(document["kind"]):
        schema = strict(model.model_json_schema(by_alias=True))
        return [f"{error.json_path}: {error.message}" for error in Draft202012Validator(schema).iter_errors(document)]
    try:
        kubernetes_validate.validate(document, KUBERNETES, strict=True)
    except kubernetes_validate.ValidationError as error:
        return [error.message]
    return []


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_object_is_valid(overlay: str) -> None:
    wrong = {f"{one['kind']}/{one['metadata']['name']}": wrong_with(one) for one in built(overlay)}
    assert {name: errors for name, errors in wrong.items() if errors} == {}


@pytest.mark.parametrize(
    ("kind", "where"),
    [
        ("Deployment", ("spec", "template", "spec")),
        ("StatefulSet", ("spec", "template", "spec", "containers", 0)),
        ("NetworkPolicy", ("spec",)),
        ("ScaledObject", ("spec",)),
        ("ScaledObject", ("spec", "advanced", "horizontalPodAutoscalerConfig")),
    ],
)
def test_an_unknown_field_is_noticed(kind: str, where: tuple[str | int, ...]) -> None:
    document = yaml.safe_load(yaml.safe_dump(of_kind("k8s/overlays/gpu", kind)[0]))
    assert wrong_with(document) == []
    place = document
    for step in where:
        place = place[step]
    place["surprise"] = 1
    assert "surprise" in "".join(wrong_with(document))


@pytest.mark.parametrize("overlay", CLUSTERS)
@pytest.mark.parametrize(("name", "service"), OWN.items())
def test_every_variable_is_a_setting_and_has_a_fitting_value(overlay: str, name: str, service: str) -> None:
    everyone = set().union(*(cls.__struct_fields__ for cls in SERVICES.values()))
    container = pods(overlay)[name]["spec"]["containers"][0]
    hints = {field: hint for cls in SERVICES.values() for field, hint in inspect.get_annotations(cls).items()}
    values = settings_of(overlay, container)
    for variable, value in values.items():
        if not variable.startswith("BATON_"):
            continue
        key = variable.removeprefix("BATON_").lower()
        assert key in everyone, f"{variable} in {overlay} is not a setting"
        if key in SERVICES[service].__struct_fields__ and value and key in hints:
            _convert(key, value, hints[key])
    if service != "gateway":
        assert values["BATON_KV_SOCKET"] == "/run/baton/kv.sock"
    assert values["BATON_NATS_USER"] == service
    assert service in bus_users.ROLES


@pytest.mark.parametrize("overlay", CLUSTERS)
@pytest.mark.parametrize("name", OWN)
def test_a_drain_has_the_time_it_was_given(overlay: str, name: str) -> None:
    pod = pods(overlay)[name]["spec"]
    container = pod["containers"][0]
    pause_s = container.get("lifecycle", {}).get("preStop", {}).get("sleep", {}).get("seconds", 0)
    drain_s = float(settings_of(overlay, container)["BATON_DRAIN_S"])
    assert pod["terminationGracePeriodSeconds"] >= pause_s + drain_s + OUT_S
    assert pod["terminationGracePeriodSeconds"] <= SPOT_S


@pytest.mark.parametrize("overlay", CLUSTERS)
@pytest.mark.parametrize("name", OWN)
def test_probes_are_apart_and_ask_where_the_service_listens(overlay: str, name: str) -> None:
    container = pods(overlay)[name]["spec"]["containers"][0]
    ports = {port["name"]: str(port["containerPort"]) for port in container["ports"]}
    values = settings_of(overlay, container)
    assert ports["probes"] == values["BATON_PROBE_PORT"]
    assert values["BATON_PROBE_HOST"] == "0.0.0.0"
    if name == "gateway":
        assert ports["http"] == values["BATON_PORT"]
    if name == "kv-transfer":
        assert ports["peers"] == values["BATON_PEER_PORT"]
    paths = {kind: container[f"{kind}Probe"]["httpGet"] for kind in ("startup", "readiness", "liveness")}
    assert {probe["port"] for probe in paths.values()} == {"probes"}
    assert paths["readiness"]["path"] == "/ready"
    assert paths["liveness"]["path"] == "/health"


@pytest.mark.parametrize("overlay", CLUSTERS)
def test_every_container_is_confined(overlay: str) -> None:
    for name, pod in pods(overlay).items():
        spec = pod["spec"]
        assert spec["automountServiceAccountToken"] is False, name
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}, name
        for container in [*spec["containers"], *spec.get("initContainers", [])]:
            context = container["securityContext"]
            assert context["allowPrivilegeEscalation"] is False, container["name"]
            assert context["readOnlyRootFilesystem"] is True, container["name"]
            assert context["capabilities"]["drop"] == ["ALL"], container["name"]
            assert container["resources"]["limits"]["memory"], container["name"]
            assert container["resources"]["requests"], container["name"]
        for container in spec["containers"]:
            assert {**spec["securityContext"], **container["securityContext"]}["runAsNonRoot"] is True, name


@pytest.mark.parametrize("overlay", CLUSTERS)
def test_no_password_is_in_a_manifest(overlay: str) -> None:
    assert of_kind(overlay, "Secret") == []
    for pod in pods(overlay).values():
        for container in pod["spec"]["containers"]:
            for one in container.get("env", []):
                if re.search("PASSWORD|SECRET", one["name"]):
                    assert set(one["valueFrom"]) == {"secretKeyRef"}, one["name"]


@pytest.mark.parametrize("overlay", CLUSTERS)
def test_store_and_workers_of_a_node_share_one_folder_and_fit_its_arena(overlay: str) -> None:
    all_pods = pods(overlay)
    folders = set()
    for name in ("prefill", "decode", "kv-transfer"):
        spec = all_pods[name]["spec"]
        (volume,) = [one["hostPath"]["path"] for one in spec["volumes"] if one["name"] == "node"]
        (mount,) = [one for one in spec["containers"][0]["volumeMounts"] if one["name"] == "node"]
        folders.add((volume, mount["mountPath"], mount["subPathExpr"], spec["securityContext"].get("runAsUser", 10001)))
    assert folders == {("/dev/shm/baton", "/run/baton", "$(NAMESPACE)", 10001)}
    store = all_pods["kv-transfer"]["spec"]["containers"][0]
    arena_gib = float(settings_of(overlay, store)["BATON_ARENA_GIB"])
    assert store["resources"]["limits"]["memory"] in {f"{int((arena_gib + 0.25) * 1024)}Mi", "2560Mi", "132Gi"}
    gib = {"Mi": 1 / 1024, "Gi": 1}
    limit = store["resources"]["limits"]["memory"]
    assert float(limit[:-2]) * gib[limit[-2:]] >= arena_gib + 0.25


@pytest.mark.parametrize("overlay", CLUSTERS)
def test_policies_let_through_what_services_connect_to_and_deny_the_rest(overlay: str) -> None:
    policies = {one["metadata"]["name"]: one["spec"] for one in of_kind(overlay, "NetworkPolicy")}
    assert policies["default-deny"]["policyTypes"] == ["Ingress", "Egress"]
    assert "ingress" not in policies["default-deny"]
    components = {pod["metadata"]["labels"]["app.kubernetes.io/component"] for pod in pods(overlay).values()}
    assert components == {"gateway", "prefill", "decode", "kv", "nats", "redis"}

    def chosen(selector: dict[str, Any]) -> set[str]:
        chosen_by = set(components)
        labels = selector.get("matchLabels", {})
        if "app.kubernetes.io/component" in labels:
            chosen_by &= {labels["app.kubernetes.io/component"]}
        for one in selector.get("matchExpressions", []):
            chosen_by &= set(one["values"])
        return chosen_by

    def pairs(direction: str, peer: str) -> set[tuple[str, str, Any]]:
        """(who is chosen, the other, port)."""
        return {
            (own, other, port["port"])
            for spec in policies.values()
            for rule in spec.get(direction, [])
            for one in rule.get(peer, [])
            if "podSelector" in one
            for own in chosen(spec["podSelector"])
            for other in chosen(one["podSelector"])
            for port in rule["ports"]
        }

    wanted = {(one, "nats", 4222) for one in ("gateway", "prefill", "decode", "kv")}
    wanted |= {("gateway", "redis", 6379), ("kv", "redis", 6379), ("kv", "kv", 9200), ("nats", "nats", 6222)}
    assert pairs("egress", "to") == wanted
    assert {(other, own, port) for own, other, port in pairs("ingress", "from")} == wanted


def test_the_users_of_nats_are_those_of_the_code() -> None:
    made = bus_users.authorization("baton", bus_users.from_environment)
    assert (ROOT / "k8s/base/nats/users.conf").read_text() == made, "python -m shared.bus_users baton"
    nats = pods("k8s/overlays/local")["nats"]["spec"]["containers"][0]
    given = {one["name"] for one in nats["env"]}
    assert set(re.findall(r"\$(NATS_\w+)", made)) <= given


def test_with_tls_nothing_is_said_in_plain_text() -> None:
    overlay = "k8s/overlays/gpu"
    for name, service in OWN.items():
        container = pods(overlay)[name]["spec"]["containers"][0]
        values = settings_of(overlay, container)
        assert all(url.startswith("tls://") for url in values["BATON_NATS_URL"].split(","))
        assert values.get("BATON_REDIS_URL", "rediss://").startswith("rediss://")
        assert values["BATON_PEER_TLS"] == "on"
        (mount,) = [one for one in container["volumeMounts"] if one["name"] == "tls"]
        for key, file in (("CA", "ca.crt"), ("CERT", "tls.crt"), ("KEY", "tls.key")):
            assert values[f"BATON_TLS_{key}"] == f"{mount['mountPath']}/{file}", service
    (config,) = [one for one in of_kind(overlay, "ConfigMap") if one["metadata"]["name"].startswith("nats-config")]
    assert "verify: true" in config["data"]["tls.conf"]
    assert "--tls-port 6379" in str(pods(overlay)["redis"]["spec"]["containers"][0]["command"])


def test_the_rules_are_those_that_were_tested() -> None:
    (rule,) = of_kind("k8s/observability", "PrometheusRule")
    assert rule["spec"] == yaml.safe_load((ROOT / "k8s/observability/prometheus/rules.yaml").read_text())


def test_every_metric_that_scales_a_tier_is_one_of_ours() -> None:
    source = "".join(path.read_text() for folder in ("services", "shared") for path in (ROOT / folder).rglob("*.py"))
    scaled = {one["metadata"]["name"]: one["spec"] for one in of_kind("k8s/overlays/gpu", "ScaledObject")}
    assert set(scaled) == {"prefill", "decode", "gateway"}
    for name, spec in scaled.items():
        queries = "".join(trigger["metadata"].get("query", "") for trigger in spec["triggers"])
        metrics = set(re.findall(r"\bbaton_\w+", queries))
        assert metrics, name
        for metric in metrics:
            plain = re.sub(r"_(bucket|count|sum|total)$", "", metric)
            assert f'"{metric}"' in source or f'"{plain}"' in source, metric
        behaviour = spec["advanced"]["horizontalPodAutoscalerConfig"]["behavior"]
        assert behaviour["scaleUp"]["stabilizationWindowSeconds"] == 60
        assert behaviour["scaleDown"]["stabilizationWindowSeconds"] == 300
    assert scaled["prefill"]["minReplicaCount"] == 0
    # Who scales sets the number, and not who applies the manifests.
    assert not [one for one in of_kind("k8s/overlays/gpu", "Deployment") if "replicas" in one["spec"]]


def test_the_monitor_finds_the_pods_and_their_port() -> None:
    (monitor,) = of_kind("k8s/observability", "PodMonitor")
    for name in OWN:
        pod = pods("k8s/overlays/gpu")[name]
        wanted = monitor["spec"]["selector"]["matchLabels"].items()
        assert wanted <= pod["metadata"]["labels"].items()
        ports = {port["name"] for port in pod["spec"]["containers"][0]["ports"]}
        assert {endpoint["port"] for endpoint in monitor["spec"]["podMetricsEndpoints"]} <= ports


def test_a_node_of_kubernetes_may_have_dots() -> None:
    values = {"BATON_NODE": "ip-10-0-0-1.ec2.internal", "BATON_KV_SOCKET": "/x", "BATON_ID": "kv-0"}
    assert load(KvSettings, values).node == "ip-10-0-0-1-ec2-internal"


def test_weights_are_copied_once_and_whole(tmp_path: Path) -> None:
    """The init container's own script, in folders of the test's own."""
    (init,) = [one for one in pods("k8s/overlays/gpu")["decode"]["spec"]["initContainers"] if one["name"] == "weights"]
    model = settings_of("k8s/overlays/gpu", init)["BATON_MODEL"]
    published, cache = tmp_path / "published", tmp_path / "cache"
    version = model.removeprefix("/models/")
    (published / version / "sub").mkdir(parents=True)
    (published / version / "config.json").write_text("{}")
    (published / version / "sub" / "weights").write_bytes(b"w" * 1000)
    cache.mkdir()
    words = [word.replace("/cache/", f"{cache}/").replace("/published/", f"{published}/") for word in init["command"]]
    environ = {"PATH": os.environ["PATH"], "BATON_MODEL": model}
    both = [subprocess.Popen(words, env={**environ, "HOSTNAME": f"decode-{n}"}) for n in range(2)]
    assert [one.wait(timeout=30) for one in both] == [0, 0]
    assert (cache / version / "sub" / "weights").read_bytes() == b"w" * 1000
    assert [path.name for path in (cache / version).parent.iterdir()] == [Path(version).name]
    # Another start finds it, and asks the claim for nothing.
    (published / version / "config.json").unlink()
    assert subprocess.run(words, env={**environ, "HOSTNAME": "decode-2"}, check=False, timeout=30).returncode == 0
    assert (cache / version / "config.json").exists()
