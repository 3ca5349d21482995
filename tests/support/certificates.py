"""An authority of the test's own, and what it signs."""

from dataclasses import dataclass
from pathlib import Path

import trustme


@dataclass(frozen=True)
class Pair:
    cert: str
    key: str


class Authority:
    def __init__(self, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        self._folder = folder
        self._authority = trustme.CA()
        self.ca = str(folder / "ca.pem")
        self._authority.cert_pem.write_to_path(self.ca)

    def sign(self, *names: str) -> Pair:
        """For these host names or addresses."""
        signed = self._authority.issue_cert(*names)
        stem = names[0].replace("*", "any")
        pair = Pair(cert=str(self._folder / f"{stem}.crt"), key=str(self._folder / f"{stem}.key"))
        signed.private_key_pem.write_to_path(pair.key)
        Path(pair.cert).write_bytes(b"".join(blob.bytes() for blob in signed.cert_chain_pems))
        return pair
