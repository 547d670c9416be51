"""The contract between stages and runtimes. `tests/contract` holds both runtimes to it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from actors.worker import Worker
from conf.machines import RolePlacement
from orchestration.runtime.dispatch import Pieces


@dataclass(frozen=True)
class RoleRequest:
    """A role to start: which class, from which weights, on how many ranks."""

    name: str
    role: type[Worker]
    checkpoint: str
    place: RolePlacement


class Group(Protocol):
    """The ranks of one role."""

    name: str
    size: int

    def map(self, method: Callable[..., Any], *pieces: Pieces[Any], **common: Any) -> Pieces[Any]:
        """Pieces in, as many pieces out. Each rank's `method` gets a list of its pieces for each argument, and the common ones."""

    def each(self, method: Callable[..., Any], *pieces: Pieces[Any], **common: Any) -> Pieces[Any]:
        """One result per rank."""


class Runtime(Protocol):
    """Starts groups and waits for them."""

    def start(self, requests: Sequence[RoleRequest]) -> dict[str, Group]:
        """All roles, loaded and ready.

        Raises:
            RunError: they were not ready by `deadlines.start`, or a rank failed; says which and how.
        """

    def put(self, items: Sequence[Any]) -> Pieces[Any]:
        """Values of the driver as pieces."""

    def wait(self, *pieces: Pieces[Any], what: str) -> None:
        """Block until they are there; nothing is fetched.

        Raises:
            RunError: after `deadlines.step`, naming `what` and the state of each rank; or as soon as a rank fails.
        """

    def get(self, pieces: Pieces[Any], what: str) -> list[Any]:
        """Wait for the pieces and fetch them."""

    def stop(self) -> None:
        """End all ranks of this runtime's groups; groups can be started again."""

    def close(self) -> None:
        """End everything, the cluster included if it was started here."""
