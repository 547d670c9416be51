"""HAProxy as Ray Serve starts it, kept to the address that was asked for and to this user.

Serve's configuration has its statistics and metrics on all addresses, and a socket for commands that every user of the machine may write
to. Serve runs the program that `RAY_SERVE_HAPROXY_BINARY_PATH` names, with the configuration's file as an argument, at the start and after
each change: that is this file, which rewrites the configuration and then becomes HAProxy. It needs nothing but Python's own library.
"""

from __future__ import annotations

import os
import re
import shlex
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

UNUSED = ("frontend prometheus", "listen stats")
"""Sections that nobody here asks: Serve reads its figures from the socket, and the service counts its own requests."""
SECTION = re.compile(r"^[a-z]")
BIND = re.compile(r"^\s*bind\s+(?P<host>\S*):\d+")
NOBODYS_LOG = "log 127.0.0.1:514 local0 info"
"""Serve's default: a line for each request to whatever takes syslog here, from a socket on all addresses. Another target stays."""
EVERYBODY = re.compile(r"(stats socket .*)mode 666\b")


class OpenToOthers(Exception):
    """The configuration has another form than that of Ray 2.60: what it opens is not known."""


def closed(configuration: str, host: str) -> str:
    """Serve's configuration without what nobody asked for.

    Args:
        host: the only address that may be listened on.

    Raises:
        OpenToOthers: something would be reachable all the same.
    """
    kept, dropped = [], False
    for line in configuration.splitlines():
        if SECTION.match(line):
            dropped = line.strip() in UNUSED
        if not dropped and line.strip() != NOBODYS_LOG:
            kept.append(EVERYBODY.sub(r"\1mode 600", line))
    for line in kept:
        bound = BIND.match(line)
        if bound and bound["host"] not in (host, "*" if host in ("0.0.0.0", "::") else host):
            raise OpenToOthers(f"HAProxy would listen on {bound['host'] or 'all addresses'}, not on {host} alone: {line.strip()}")
        if line.lstrip().startswith("stats socket") and " mode 600 " not in f"{line} ":
            raise OpenToOthers(f"other users could give HAProxy commands: {line.strip()}")
    return "\n".join(kept) + "\n"


def environment(folder: Path, host: str, program: str) -> dict[str, str]:
    """What has Serve start HAProxy by way of this file.

    Args:
        folder: of this user alone; HAProxy's configuration, sockets and state go there.
        host: the only address that may be listened on.
        program: HAProxy itself.
    """
    start = folder / "haproxy"
    words = shlex.join([sys.executable, "-I", "-S", str(Path(__file__).resolve()), program, host])
    start.write_text(f'#!/bin/sh\nexec {words} "$@"\n', encoding="utf-8")
    start.chmod(0o700)
    files = folder / "h"  # a short name: Serve adds its node's, and the paths of sockets are limited
    files.mkdir(mode=0o700)
    return {
        "RAY_SERVE_HAPROXY_BINARY_PATH": str(start),
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(files / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(files / "admin.sock"),
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": str(files / "metrics.sock"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(files),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(files / "server-state"),
    }


def main(words: Sequence[str]) -> None:
    """Become HAProxy.

    Args:
        words: HAProxy itself, the address, and then the words that Serve gives to HAProxy.
    """
    program, host, *given = words
    for flag, value in pairwise(given):
        if flag == "-f":
            file = Path(value)
            try:
                file.write_text(closed(file.read_text(encoding="utf-8"), host), encoding="utf-8")
            except OpenToOthers as cause:
                sys.exit(f"chatray: {cause}")
    os.execv(program, [program, *given])


if __name__ == "__main__":
    main(sys.argv[1:])
