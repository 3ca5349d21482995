"""docker-compose.yml as compose itself understands it. Needs no engine."""

import pytest

from tests.support.containers import compose_config


@pytest.mark.parametrize("profile", ["", "gpu", "observability"])
def test_the_file_is_valid(profile: str) -> None:
    services = compose_config(COMPOSE_PROFILES=profile)["services"]
    extra = {
        "": set(),
        "gpu": {"prefill-worker-gpu", "decode-worker-gpu"},
        "observability": {"prometheus", "otel-collector"},
    }
    usual = {"gateway", "prefill-worker", "decode-worker", "kv-transfer", "nats", "redis", "secrets"}
    assert set(services) == usual | extra[profile]


def test_variables_choose_engine_model_and_port() -> None:
    services = compose_config(BATON_ENGINE="sim", BATON_MODEL="/a/model", BATON_PORT="8123")["services"]
    assert services["prefill-worker"]["build"]["target"] == "worker-sim"
    assert services["prefill-worker"]["image"] == services["decode-worker"]["image"] == "baton/worker-sim"
    assert services["gateway"]["ports"][0]["published"] == "8123"
    assert any(volume["source"] == "/a/model" for volume in services["decode-worker"]["volumes"])
    assert services["decode-worker"]["environment"]["BATON_ENGINE"] == "sim"
