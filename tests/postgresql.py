"""A PostgreSQL server of the tests' own, in a folder of its own, reached by its socket only."""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

FOLDERS = ("/usr/lib/postgresql", "/usr/local/pgsql", "/usr/pgsql")


def binaries() -> Path | None:
    """Where `initdb` and `pg_ctl` are; distributions keep them off the path."""
    for name in ("initdb",):
        if found := shutil.which(name):
            return Path(found).resolve().parent
    found_below = sorted(path.parent for folder in FOLDERS for path in Path(folder).glob("**/bin/initdb"))
    return found_below[-1] if found_below else None


@contextlib.contextmanager
def server(bin_folder: Path) -> Iterator[str]:
    """The URL of a running server up to the name of a database; PostgreSQL does not run as root, so another user is taken then."""
    folder = Path(tempfile.mkdtemp(prefix="pg-", dir="/tmp"))  # a socket's path may have about 100 characters
    user: dict[str, str] = {}
    if os.getuid() == 0:
        name = next(name for name in ("postgres", "nobody") if any(entry.pw_name == name for entry in pwd.getpwall()))
        shutil.chown(folder, name)
        user = {"user": name}

    def call(*words: str) -> None:
        subprocess.run([str(word) for word in words], check=True, cwd=folder, stdout=subprocess.DEVNULL, timeout=120, **user)  # type: ignore[call-overload]

    data = folder / "data"
    try:
        call(str(bin_folder / "initdb"), "-D", str(data), "-U", "chatray", "-A", "trust", "-E", "UTF8", "--no-sync")
        options = f"-c listen_addresses='' -c unix_socket_directories={folder} -c fsync=off"
        call(str(bin_folder / "pg_ctl"), "-D", str(data), "-l", str(folder / "log"), "-w", "-t", "60", "-o", options, "start")
        try:
            yield f"postgresql://chatray@/{{}}?host={folder}"
        finally:
            call(str(bin_folder / "pg_ctl"), "-D", str(data), "-w", "-m", "immediate", "stop")
    finally:
        shutil.rmtree(folder, ignore_errors=True)
