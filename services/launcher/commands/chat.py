"""`baton chat`: one message through the gateway, the answer as it comes."""

import json
import sys
from typing import Any

import httpx

from services.launcher.refusal import UserError
from services.launcher.state import ClusterFolder

ANSWER_S = 600.0
UNAUTHORIZED = httpx.codes.UNAUTHORIZED


def chat(folder: ClusterFolder, port: int, text: str, *, temperature: float, max_tokens: int, key: str = "") -> int:
    record = folder.read()
    address = record.address if record else f"http://127.0.0.1:{port}"  # perhaps started in another way
    headers = {"authorization": f"Bearer {key}"} if key else {}
    with httpx.Client(base_url=address, timeout=ANSWER_S, trust_env=False, headers=headers) as client:
        try:
            body = {
                "model": record.model if record else _first_model(client),
                "messages": [{"role": "user", "content": text}],
                "temperature": temperature,
                "max_tokens": max_tokens,
                "stream": True,
            }
            with client.stream("POST", "/v1/chat/completions", json=body) as answer:
                if answer.status_code != httpx.codes.OK:
                    hint = "; baton chat takes it from BATON_API_KEY" if answer.status_code == UNAUTHORIZED else ""
                    raise UserError(_message(answer.read()) + hint)
                return _print_stream(answer)
        except httpx.ConnectError as error:
            raise UserError(f"nothing answers at {address}: start a cluster with baton up --port {port}") from error
        except httpx.HTTPError as error:
            print(f"\nbaton: the answer was cut off: {type(error).__name__}", file=sys.stderr)
            return 1


def _print_stream(answer: httpx.Response) -> int:
    for line in answer.iter_lines():
        if not line.startswith("data: "):
            continue
        data = line.removeprefix("data: ")
        if data == "[DONE]":
            print()
            return 0
        event = json.loads(data)
        if "error" in event:
            print(f"\nbaton: {_error_text(event)}", file=sys.stderr)
            return 1
        for choice in event.get("choices", []):
            print(choice.get("delta", {}).get("content") or "", end="", flush=True)
    print("\nbaton: the answer was cut off", file=sys.stderr)
    return 1


def _first_model(client: httpx.Client) -> str:
    answer = client.get("/v1/models")
    if answer.status_code != httpx.codes.OK:
        raise UserError(_message(answer.content))
    return str(answer.json()["data"][0]["id"])


def _message(body: bytes) -> str:
    try:
        return _error_text(json.loads(body))
    except (ValueError, KeyError, TypeError):
        return "the gateway refused without saying why: see baton logs gateway-0"


def _error_text(event: dict[str, Any]) -> str:
    return str(event["error"]["message"])
