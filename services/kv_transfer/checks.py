"""What a call must look like before the store acts on it, so that no bad call can half happen."""

from services.kv_transfer.leases import Lease
from shared.errors import InvalidRequest
from shared.kv.messages import Commit, Reserve, Wait

MAX_NAME_CHARS = 256
MAX_WAIT_S = 86400.0


def check_reserve(call: Reserve) -> None:
    if not 0 < len(call.lease) <= MAX_NAME_CHARS:
        raise InvalidRequest(f"a lease's id has 1 … {MAX_NAME_CHARS} characters")
    if not call.keys or len(set(call.keys)) != len(call.keys):
        raise InvalidRequest("a reservation must name keys, each once")
    if not 0 < call.ttl_s <= MAX_WAIT_S or not 0 <= call.wait_s <= MAX_WAIT_S:
        raise InvalidRequest(f"ttl_s and wait_s must be in 0 … {MAX_WAIT_S:g} s, ttl_s not 0")


def check_wait(call: Wait) -> None:
    if not 0 <= call.timeout_s <= MAX_WAIT_S:
        raise InvalidRequest(f"timeout_s must be in 0 … {MAX_WAIT_S:g} s")


def check_commit(call: Commit, lease: Lease) -> None:
    if not lease.write or len(call.blocks) != len(call.checksums):
        raise InvalidRequest("commit needs a write lease and a checksum for each block")
    if any(not 0 <= position < len(lease.keys) for position in call.blocks):
        raise InvalidRequest("commit names a block that the lease does not have")
    if any(not 0 <= checksum < 1 << 64 for checksum in call.checksums):
        raise InvalidRequest("a checksum is an unsigned 64-bit number")
