"""Ray's workers forked from one process that has imported Ray: hundreds start in seconds, and share its memory.

Run with a socket's path, it is the server. Nodes of a test cluster whose `setup_worker_path` is this file run it for each worker, and it
asks the server, named by FORK_SERVER, for a fork in its place.
"""

from __future__ import annotations

import json
import os
import runpy
import signal
import socket
import sys

ADDRESS = "FORK_SERVER"


def serve(path: str) -> None:
    """Fork for every request until killed, together with all forks, as a process group; prints a line when it listens."""
    import ray._private.runtime_env.context
    import ray._private.workers.default_worker  # noqa: F401  # every fork has it then

    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(path)
        listening.listen(1024)
        print("listening", flush=True)
        while True:
            asking, _ = listening.accept()
            request = asking.makefile("rb").read()
            if os.fork() == 0:
                listening.close()
                work(*json.loads(request))  # `asking` closes with this process, and whoever asked ends too
            asking.close()


def work(words: list[str], environment: dict[str, str], folder: str) -> None:
    """Become a worker: what Ray's setup_worker.py does, without a new interpreter."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    context = next((word.split("=", 1)[1] for word in words if word.startswith("--serialized-runtime-env-context=")), "{}")
    fixed = {name: os.environ[name] for name in ("RAY_JOB_ID", "RAY_RAYLET_PID") if name in os.environ}
    os.environ.clear()
    os.environ.update(environment | fixed | (json.loads(context).get("env_vars") or {}))
    os.chdir(folder)
    sys.argv = [word for word in words[1:] if not word.startswith(("--serialized-runtime-env-context=", "--language="))]
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    finally:
        os._exit(0)


def ask(path: str) -> None:
    """Have a worker forked in this process's place, and end when it does."""
    with socket.socket(socket.AF_UNIX) as server:
        server.connect(path)
        server.sendall(json.dumps([sys.argv, dict(os.environ), os.getcwd()]).encode())
        server.shutdown(socket.SHUT_WR)
        server.recv(1)


if __name__ == "__main__":
    if ADDRESS in os.environ:
        ask(os.environ[ADDRESS])
    else:
        serve(sys.argv[1])
