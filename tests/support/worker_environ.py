"""What a worker process by itself is started with."""

import os
from pathlib import Path


def sim_worker(nats_url: str, model: Path, cluster: str) -> dict[str, str]:
    """The environment of a decode worker on the sim engine, without a store."""
    own = {key: value for key, value in os.environ.items() if not key.startswith(("BATON_", "OTEL_"))}
    return own | {
        "BATON_ID": "decode-0",
        "BATON_CLUSTER": cluster,
        "BATON_NATS_URL": nats_url,
        "BATON_MODEL": str(model),
        "BATON_ENGINE": "sim",
    }
