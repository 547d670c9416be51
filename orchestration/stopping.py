"""A run that is asked to stop: SIGTERM, as `ray job stop`, `chatray jobs stop`, Kubernetes and Slurm send it.

A stage that can commit finishes its step, commits and ends with `Stopped`. All else ends at once, as by Ctrl-C: nothing of it could be
kept. A second SIGTERM does not wait for the commit.
"""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from orchestration.errors import RunError


class Stopped(RunError):
    """The run stopped because it was asked to. The same command goes on."""


class _Request:
    listening = asked = False
    commits = 0
    """How many blocks of `commits_first` this process is in."""


_request = _Request()


def listen() -> None:
    """Take SIGTERM as the wish to stop, from now on."""
    _request.listening = True
    listen_still()


def listen_still() -> None:
    """After `ray.init`, which sets a handler of its own that ends the process."""
    if _request.listening and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _on_signal)


def _on_signal(*_: Any) -> None:
    again, _request.asked = _request.asked, True
    if again or not _request.commits:
        raise KeyboardInterrupt
    print("chatray: asked to stop; the step in progress is finished and committed first", file=sys.stderr, flush=True)


def asked() -> bool:
    """Whether the run was asked to stop."""
    return _request.asked


@contextmanager
def commits_first() -> Iterator[None]:
    """While in here, the wish is only noted: the code looks at `asked`, commits, and raises what `stopped` gives."""
    _request.commits += 1
    try:
        yield
    finally:
        _request.commits -= 1


def between_stages() -> None:
    """Raises:
    Stopped: the wish came while a stage was at its end.
    """
    if asked():
        raise Stopped("stopped as asked, with all stages so far complete; the same command goes on")


def stopped(stage: str, step: int) -> Stopped:
    """What a stage ends with.

    Args:
        step: the one that was committed last; 0: none was, and none was done.
    """
    kept = f"step {step} is committed" if step else "no step of it was done yet"
    return Stopped(f"{stage}: stopped as asked; {kept}, and the same command goes on from there")
