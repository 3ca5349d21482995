"""What `--engine-arg` means to the sim engine, checked, with the profile's figures where nothing is given."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from shared.errors import SettingsError
from shared.kv.messages import Geometry
from shared.settings import Count
from shared.worker.sim.contents import FORMAT
from shared.worker.sim.pages import DIGEST_BYTES, WORD_BYTES
from shared.worker.sim.profile import Profile, load_profile

DEFAULT_PROFILE = "llama2-70b-h100"
KV_BYTES_PER_TOKEN = 2048
TRUE_SIZE = "true"  # also as JSON's true, which is what `--engine-arg kv_bytes_per_token=true` becomes


class SimArguments(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """As given; names are vLLM's where it has one."""

    profile: str = DEFAULT_PROFILE  # a shipped profile's name, or a file's path
    max_model_len: Count | None = None
    block_size: Count = 32
    max_num_seqs: Count | None = None
    max_num_batched_tokens: Count | None = None
    enable_prefix_caching: bool = True
    kv_bytes_per_token: int | bool | str = KV_BYTES_PER_TOKEN


class SimShape(msgspec.Struct, frozen=True, kw_only=True):
    """Resolved: what an engine needs to know of itself before it has a byte of memory."""

    profile: Profile
    max_model_len: int
    block_size: int
    max_running: int
    token_budget: int
    prefix_caching: bool
    token_bytes: int
    has_kv: bool  # False: a slot holds a digest of its block only

    @property
    def block_bytes(self) -> int:
        """What a block counts for in the engine's KV memory, whether or not its bytes are there."""
        return self.block_size * self.token_bytes

    @property
    def slot_bytes(self) -> int:
        return self.block_bytes if self.has_kv else DIGEST_BYTES

    def fingerprint(self, model: str, vocabulary: int) -> str:
        """What must be equal before one engine may read another's blocks."""
        facts = ("sim", FORMAT, self.profile.name, Path(model).name, vocabulary, self.block_size, self.slot_bytes)
        return hashlib.sha256(repr(facts).encode()).hexdigest()[:32]

    def geometry(self, model: str, vocabulary: int) -> Geometry:
        return Geometry(
            fingerprint=self.fingerprint(model, vocabulary),
            block_size=self.block_size,
            slot_bytes=self.slot_bytes,
            ranks=1,
            max_model_len=self.max_model_len,
        )


def resolve(arguments: Mapping[str, Any], *, has_kv: bool) -> SimShape:
    """Raises SettingsError that names the argument and what may be given."""
    known = SimArguments.__struct_fields__
    if unknown := sorted(set(arguments) - set(known)):
        raise SettingsError(f"--engine-arg {unknown[0]}: not one of the sim engine's, which are {', '.join(known)}")
    try:
        given = msgspec.convert(dict(arguments), SimArguments, strict=False)
    except msgspec.ValidationError as error:
        raise SettingsError(f"--engine-arg: {error}") from error
    profile = load_profile(given.profile)
    token_bytes = _token_bytes(given.kv_bytes_per_token, profile)
    return SimShape(
        profile=profile,
        max_model_len=given.max_model_len or profile.max_model_len,
        block_size=given.block_size,
        max_running=given.max_num_seqs or profile.max_running,
        token_budget=given.max_num_batched_tokens or profile.token_budget,
        prefix_caching=given.enable_prefix_caching,
        token_bytes=token_bytes,
        has_kv=has_kv,
    )


def _token_bytes(given: int | bool | str, profile: Profile) -> int:
    if given is True or given == TRUE_SIZE:
        return profile.kv_bytes_per_token
    try:
        size = 0 if given is False else int(given)
    except ValueError:
        size = 0
    if size < WORD_BYTES or size % WORD_BYTES:
        raise SettingsError(
            f"--engine-arg kv_bytes_per_token={given}: must be a multiple of {WORD_BYTES} bytes, "
            f"or {TRUE_SIZE} for the profile's true size"
        )
    return size
