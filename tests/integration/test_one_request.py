"""docs/architecture.md says which functions a request goes through, in which order: this one is followed there."""

import asyncio
import re
import sys
from pathlib import Path

from tests.support.running_gateway import MODEL

ROOT = Path(__file__).parents[2]
GATEWAY = ROOT / "services" / "gateway"
ROW = re.compile(r"^\| \d+ \| `([\w/.]+)` `(\w+)` \|", re.MULTILINE)
MOST = 15
# What the stages use: each is read from where it is called.
USED = {
    "http/app.py",
    "http/pieces.py",
    "http/reading.py",
    "http/requests.py",
    "http/tokenizer.py",
    "request/answer.py",
    "request/context.py",
    "request/receipt.py",
    "request/resume.py",
}


def told() -> list[tuple[str, str]]:
    text = (ROOT / "docs" / "architecture.md").read_text()
    return ROW.findall(text.split("## One request")[1].split("\n## ")[0])


async def test_a_request_goes_through_the_functions_that_are_told_and_no_others(cluster):
    stages = told()
    assert 0 < len(stages) <= MOST
    entered: dict[tuple[str, str], None] = {}

    def follow(frame, event, _):
        if event == "call" and frame.f_code.co_filename.startswith(str(GATEWAY)):
            path = Path(frame.f_code.co_filename).relative_to(GATEWAY).as_posix()
            entered.setdefault((path, frame.f_code.co_name))

    async with cluster.gateway() as running:
        _, decode = await cluster.add(running, "prefill-0", "decode-0")
        messages = [{"role": "user", "content": "hello"}]
        asked = {"model": MODEL, "messages": messages, "max_tokens": 3}
        await running.client.chat.completions.create(**asked)  # what is made once is not this request's
        go_on = asyncio.Event()
        decode.script.pause_after = (1, go_on)
        sys.setprofile(follow)
        try:
            stream = await running.client.chat.completions.create(**asked, stream=True)
            chunks = [await anext(stream) for _ in range(2)]  # the role, and the first token
            go_on.set()
            chunks += [chunk async for chunk in stream]
            await running.until_idle()
        finally:
            sys.setprofile(None)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == " 0 1 2"
    assert [one for one in entered if one in stages] == stages
    rooms = {path for path, _ in entered if path.startswith(("http/", "request/"))}
    assert rooms - USED <= {path for path, _ in stages}
