"""A worker process that holds a lease and is in the middle of a copy, until it is killed.

Run as `python -m tests.support.kv_victim SOCKET GEOMETRY_JSON`; prints `holding` when it holds everything.
"""

import asyncio
import sys

import msgspec

from shared.kv.client import KvClient
from shared.kv.messages import Geometry
from shared.kv.rank_client import RankClient


async def main(path: str, geometry: Geometry) -> None:
    rank = RankClient(path, session="victim", worker="victim-0", rank=0)
    rank.attach(geometry)
    host = KvClient(path, session="victim", worker="victim-0")
    await host.connect()
    keys = [bytes([1, number]) * 8 for number in range(3)]
    await host.reserve(lease="held", request="r", keys=keys, write=True, ttl_s=60)
    rank.begin_copy("held")
    print("holding", flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], msgspec.json.decode(sys.argv[2], type=Geometry)))
