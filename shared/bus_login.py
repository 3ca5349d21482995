"""How a service makes itself known to NATS: servers, user, TLS; and what it says when it is not let in.

Invariants: user and password hold for every server, also those that a cluster tells of; who has a user of its own
listens for answers on inboxes that other users may not read.
"""

from collections.abc import Sequence
from typing import Any
from urllib.parse import unquote, urlsplit, urlunsplit

import msgspec

from shared.tls import Tls

INBOX = "_INBOX"


class Account(msgspec.Struct, frozen=True, kw_only=True):
    user: str = ""
    password: str = ""
    tls: Tls = Tls()


def inbox(user: str) -> str:
    """Below it a user's answers come in."""
    return f"{INBOX}.{user}" if user else INBOX


def login(urls: str, account: Account) -> tuple[list[str], str, dict[str, Any]]:
    """Servers without what is secret, the user, and nats-py's options. Raises SettingsError for TLS files."""
    user, password, servers = account.user, account.password, []
    for url in filter(None, urls.split(",")):
        parts = urlsplit(url.strip() if "://" in url else f"nats://{url.strip()}")
        user, password = user or unquote(parts.username or ""), password or unquote(parts.password or "")
        servers.append(urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2])))
    options: dict[str, Any] = {"tls": account.tls.client()}  # for when the server wants it
    if user and not password:
        return servers, "", {**options, "token": user}  # how NATS writes a token into a url
    if user:
        options |= {"user": user, "password": password}
    return servers, user, options


def not_joined(servers: Sequence[str], said: Sequence[str]) -> str:
    """The line with which a service ends that could not join. `said`: the errors on the way; the last may tell less."""
    where = ", ".join(servers)
    for why in said:
        lower = why.lower()
        if "authorization" in lower or "authentication" in lower:
            return f"setting 'nats_user': {where} refuses this user, password or token"
        if "certificate" in lower or "tls" in lower or "ssl" in lower:
            return f"setting 'nats_url': no TLS with {where}: {why} (see tls_ca, tls_cert and tls_key)"
    return f"setting 'nats_url': no NATS server answers at {where}: {said[-1] if said else 'silence'}"
