"""`baton logs`: what the processes wrote, of all or of one, then as it is written."""

import sys
import time
from pathlib import Path

from services.launcher.refusal import UserError
from services.launcher.state import ClusterFolder

FOLLOW_S = 0.2


def logs(folder: ClusterFolder, port: int, service_id: str | None, *, follow: bool) -> int:
    files = sorted(folder.logs.glob("*.log"))
    if not files:
        raise UserError(f"there are no logs of port {port} in {folder.logs}: nothing was started there yet")
    if service_id is not None:
        known = [file.stem for file in files]
        if service_id not in known:
            raise UserError(f"there is no log of {service_id}: there are {', '.join(known)}")
        files = [folder.log(service_id)]
    readers = [_Reader(file, prefix=f"{file.stem} | " if len(files) > 1 else "") for file in files]
    while True:
        said = [reader.print_new() for reader in readers]
        if not follow:
            return 0
        if not any(said):
            time.sleep(FOLLOW_S)  # a file cannot be waited for with the standard library


class _Reader:
    def __init__(self, file: Path, prefix: str) -> None:
        self._file = file
        self._prefix = prefix
        self._at = 0

    def print_new(self) -> bool:
        """Print whole lines written since; says whether there were any."""
        try:
            with self._file.open("rb") as file:
                if self._file.stat().st_size < self._at:
                    self._at = 0  # a new cluster began it again
                file.seek(self._at)
                lines = file.read().splitlines(keepends=True)
        except FileNotFoundError:
            return False
        for line in lines:
            self._at += len(line)
            print(f"{self._prefix}{line.decode(errors='replace').rstrip()}")
        sys.stdout.flush()
        return bool(lines)
