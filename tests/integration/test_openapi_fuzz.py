"""schemathesis reads the gateway's own OpenAPI document and sends what it allows and what it forbids: never a 5xx.

The answers must be what the document says, and what it forbids must be refused. The other way round is not checked:
rules between parameters (min_tokens below max_tokens) cannot be written in the document.
"""

import asyncio
import sys
from pathlib import Path

from tests.support.gateway_cluster import assert_nothing_left

EXAMPLES = 25  # an operation, beside the boundary values that schemathesis derives from each parameter
LIMIT_S = 180.0
FUZZ = (
    "--phases=examples,coverage,fuzzing,stateful",
    "--exclude-checks=positive_data_acceptance",
    "--seed=1",
    "--generation-deterministic",
    "--no-color",
)


async def test_no_input_is_a_server_error(cluster, tmp_path):
    cluster.settings = {"arrangement": "unsplit"}
    async with cluster.gateway() as running:
        await cluster.add(running, "decode-0")
        fuzzer = await asyncio.create_subprocess_exec(
            Path(sys.executable).with_name("st"),
            "run",
            f"{running.url}/openapi.json",
            f"--max-examples={EXAMPLES}",
            *FUZZ,
            cwd=tmp_path,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        try:
            async with asyncio.timeout(LIMIT_S):
                said, _ = await fuzzer.communicate()
        finally:
            if fuzzer.returncode is None:
                fuzzer.kill()
                await fuzzer.wait()
        report = said.decode()
        assert fuzzer.returncode == 0, report
        assert "6 passed" in report, report  # it has really seen every operation
        await assert_nothing_left(running)
        assert cluster.workers["decode-0"].jobs, "nothing that was sent was good enough to be served"
