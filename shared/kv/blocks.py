"""Content-addressed names of KV blocks: a chained hash, so that a key stands for its whole prefix."""

import hashlib
import math

KEY_BYTES = 16


def block_keys(
    tokens: bytes, block_size: int, *, fingerprint: str, salt: bytes = b"", extra: bytes = b""
) -> list[bytes]:
    """Keys of a prompt's blocks, the final, partly filled one included.

    Args:
        tokens: packed little-endian uint32 ids.
        block_size: tokens in a block.
        fingerprint: of the engine (model, layout …); blocks of different fingerprints never meet.
        salt: the tenant's; an HMAC made by the gateway, so tenants cannot name each other's blocks.
        extra: LoRA and multimodal ids.

    Returns:
        ceil(len / block_size) keys of KEY_BYTES each. Key i covers tokens 0 … min((i+1) * block_size, len).
    """
    step = block_size * 4
    previous = hashlib.blake2b(
        b"|".join((fingerprint.encode(), str(block_size).encode(), salt.hex().encode(), extra.hex().encode())),
        digest_size=KEY_BYTES,
    ).digest()
    keys = []
    for start in range(0, len(tokens), step):
        previous = hashlib.blake2b(previous + tokens[start : start + step], digest_size=KEY_BYTES).digest()
        keys.append(previous)
    return keys


def blocks_of(tokens: int, block_size: int) -> int:
    """Blocks that hold this many tokens, the last one perhaps partly filled."""
    return math.ceil(tokens / block_size)
