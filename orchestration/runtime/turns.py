"""Roles that share devices work in turns (`placement.sleep`): at no time are two of them awake.

The driver keeps the order, since it alone sees all calls. Before one goes to a role that sleeps, the role at work finishes what it was
asked for and goes to sleep. Locks inside ranks could not do this: two roles' collectives would wait for each other's locks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from actors.rank import is_off_device
from actors.worker import Worker
from orchestration.runtime.dispatch import Pieces
from orchestration.runtime.group import Group


class Wait(Protocol):
    """A runtime's `wait`."""

    def __call__(self, *pieces: Pieces[Any], what: str) -> None: ...


class Turns:
    """Whose turn it is."""

    def __init__(self, wait: Wait) -> None:
        self.wait = wait
        self.at_work: Group | None = None
        self.last: Pieces[Any] = Pieces([], [])
        """The last call to the role at work, without its results. Ranks work on one call at a time: after the last they are free."""

    def take(self, group: Group) -> None:
        """Wake this role, after the one at work has gone to sleep.

        Raises:
            RunError: a call of the role at work failed, or did not end in time.
        """
        if self.at_work is group:
            return
        self.rest(group.name)
        self.at_work = group
        self.last = group.each(Worker.wake)

    def rest(self, following: str) -> None:
        """Let the role at work finish, and sleep."""
        before, self.at_work = self.at_work, None
        if before is not None:
            self.wait(self.last, what=f"{before.name} to finish, so that {following} can have the devices")
            self.wait(before.each(Worker.sleep), what=f"{before.name} to leave the devices to {following}")


class GroupInTurns:
    """A group that works when it is its turn; stages see no difference."""

    def __init__(self, group: Group, turns: Turns) -> None:
        self.group, self.turns = group, turns
        self.name, self.size = group.name, group.size

    def map(self, method: Callable[..., Any], *pieces: Pieces[Any], **common: Any) -> Pieces[Any]:
        return self._call(self.group.map, method, pieces, common)

    def each(self, method: Callable[..., Any], *pieces: Pieces[Any], **common: Any) -> Pieces[Any]:
        return self._call(self.group.each, method, pieces, common)

    def _call(
        self, send: Callable[..., Pieces[Any]], method: Callable[..., Any], pieces: Sequence[Pieces[Any]], common: dict[str, Any]
    ) -> Pieces[Any]:
        if is_off_device(method):
            return send(method, *pieces, **common)
        self.turns.take(self.group)
        found = send(method, *pieces, **common)
        self.turns.last = Pieces([], found.calls)
        return found


def load_in_turns(groups: Sequence[Group], wait: Wait) -> None:
    """Load one role after the other, each asleep before the next begins."""
    for group in groups:
        wait(group.each(Worker.load), what=f"{group.name} to load its weights")
        wait(group.each(Worker.sleep), what=f"{group.name} to go to sleep")


def in_turns(groups: Mapping[str, Group], wait: Wait) -> dict[str, Group]:
    """The groups, all of them asleep, as groups that work in turns."""
    turns = Turns(wait)
    return {name: GroupInTurns(group, turns) for name, group in groups.items()}
