"""`baton trace`: what one request did, hop by hop, or which requests there are to look at."""

import json
import shutil
from typing import Any

import httpx

from services.launcher.refusal import UserError
from services.launcher.state import ClusterFolder
from services.launcher.waterfall import listing, waterfall

ANSWER_S = 10.0
LISTED = 20
NARROWEST = 72
PLAIN_WIDTH = (160, 24)  # where there is no terminal


def trace(folder: ClusterFolder, port: int, wanted: str | None, *, order: str, as_json: bool, key: str) -> int:
    """`order`: last or slowest, where no id is given; empty: list the last ones."""
    record = folder.read()
    address = record.address if record else f"http://127.0.0.1:{port}"  # perhaps started in another way
    headers = {"authorization": f"Bearer {key}"} if key else {}
    with httpx.Client(base_url=address, timeout=ANSWER_S, trust_env=False, headers=headers) as client:
        if not (wanted or order):
            found = _get(client, port, f"/dashboard/traces?limit={LISTED}")
            print(json.dumps(found, indent=2) if as_json else listing(found["traces"]))
            return 0
        if not wanted:
            first = _get(client, port, f"/dashboard/traces?order={order}&limit=1")["traces"]
            if not first:
                raise UserError("no trace is kept: no request has come yet, or telemetry is off")
            wanted = first[0]["trace_id"]
        found = _get(client, port, f"/dashboard/traces/{wanted}")
    width = max(NARROWEST, shutil.get_terminal_size(PLAIN_WIDTH).columns)
    print(json.dumps(found, indent=2) if as_json else waterfall(found, width))
    return 0


def _get(client: httpx.Client, port: int, path: str) -> dict[str, Any]:
    try:
        answer = client.get(path)
        body: dict[str, Any] = answer.json()
    except (httpx.HTTPError, ValueError) as error:
        raise UserError(f"nothing answers at {client.base_url}: start a cluster with baton up --port {port}") from error
    if answer.status_code != httpx.codes.OK:
        hint = "; baton trace takes it from BATON_API_KEY" if answer.status_code == httpx.codes.UNAUTHORIZED else ""
        raise UserError(str(body.get("error", {}).get("message", f"HTTP {answer.status_code}")) + hint)
    return body
