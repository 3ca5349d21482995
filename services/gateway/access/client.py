"""Who asks: what a request carries of its key, from the edge to its end. Never the key itself."""

import hmac
from dataclasses import dataclass

from services.gateway.access.buckets import Amount
from shared.access.key import TIERS, Key
from shared.errors import ModelNotFound, TierNotAllowed

SALT_BYTES = 16
NO_SECRET = b"baton"  # salts differ all the same, and no client can name a block


@dataclass(frozen=True, slots=True, kw_only=True)
class Client:
    tenant: str
    key_id: str  # public
    tiers: frozenset[str]
    models: frozenset[str]  # empty: all
    limits: Amount  # a minute; 0: no limit

    @classmethod
    def of(cls, key: Key) -> "Client":
        return cls(
            tenant=key.tenant,
            key_id=key.id,
            tiers=frozenset(key.tiers),
            models=frozenset(key.models),
            limits=Amount(key.requests_per_minute, key.tokens_per_minute),
        )

    @property
    def is_limited(self) -> bool:
        return bool(self.limits.requests or self.limits.tokens)

    def sees(self, model: str) -> bool:
        return not self.models or model in self.models

    def salt(self, secret: str, own: str = "") -> bytes:
        """Of its tenant's KV blocks: tenants neither find nor time each other's. Without keys there is none.

        `own`: `cache_salt`, which the client itself says. It divides a tenant's blocks further and reaches no other's.
        """
        key = secret.encode() or NO_SECRET
        of_tenant = b"" if self is ANONYMOUS else hmac.digest(key, self.tenant.encode(), "sha256")[:SALT_BYTES]
        if not own:
            return of_tenant
        return hmac.digest(of_tenant or key, own.encode(), "sha256")[:SALT_BYTES]

    def check(self, *, model: str, tier: str) -> None:
        """Raises ModelNotFound, as for a model that nobody has, or TierNotAllowed."""
        if not self.sees(model):
            raise unknown_model()
        if tier not in self.tiers:
            allowed = ", ".join(one for one in TIERS if one in self.tiers)
            raise TierNotAllowed(
                f"service_tier: this key may not use {tier!r}; it may use: {allowed}", param="service_tier"
            )


def unknown_model() -> ModelNotFound:
    return ModelNotFound("the model does not exist here; GET /v1/models lists what does", param="model")


ANONYMOUS = Client(tenant="anonymous", key_id="", tiers=frozenset(TIERS), models=frozenset(), limits=Amount(0, 0))
