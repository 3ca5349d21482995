"""A kv_transfer that other nodes reach through a fault proxy only. The folder is in PROXY_FOLDER."""

import os
import sys
from pathlib import Path

from services.kv_transfer.__main__ import main
from tests.support.fault_proxy import FaultProxy

if __name__ == "__main__":
    proxy = FaultProxy(Path(os.environ["PROXY_FOLDER"]), int(os.environ["BATON_PEER_PORT"]), seed=7)
    os.environ["BATON_PEER_ADDRESS"] = proxy.address
    sys.exit(main())
