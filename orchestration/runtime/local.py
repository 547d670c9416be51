"""One rank per role, in this process: for a debugger, and for tests that should be fast."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

from actors.devices import give
from actors.profiling import traced
from actors.rewards.source import RewardError
from actors.worker import RankSpec, Worker, process_group_of_one
from conf.schema import Config
from orchestration.errors import RunError
from orchestration.runtime.dispatch import Pieces
from orchestration.runtime.group import Group, RoleRequest
from orchestration.runtime.turns import in_turns, load_in_turns


class LocalGroup:
    """A role's only rank."""

    size = 1

    def __init__(self, name: str, rank: Worker) -> None:
        self.name, self.rank = name, rank

    def map(self, method: Callable[..., Any], *pieces: Pieces[Any], **common: Any) -> Pieces[Any]:
        return Pieces(self._call(method, pieces, common), [])

    def each(self, method: Callable[..., Any], *pieces: Pieces[Any], **common: Any) -> Pieces[Any]:
        return Pieces([self._call(method, pieces, common)], [])

    def _call(self, method: Callable[..., Any], pieces: Sequence[Pieces[Any]], common: dict[str, Any]) -> Any:
        """A fault of ours is left as it is, for the debugger; what a reward that the user brings did wrong ends the run with its text."""
        try:
            # by name, as on a cluster: `Worker` declares what roles override. A function that stands in for a method is called as it is.
            bound = getattr(self.rank, method.__name__, None) or functools.partial(method, self.rank)
            with traced(self.rank, method.__name__):
                return bound(*(p.items for p in pieces), **_plain(common))
        except RewardError as cause:
            raise RunError(f"{self.name} rank 0 failed in {method.__name__}: {cause}") from cause


def _plain(common: dict[str, Any]) -> dict[str, Any]:
    """Common arguments that are pieces (weights, say) stand for their first item."""
    return {name: value.items[0] if isinstance(value, Pieces) else value for name, value in common.items()}


class LocalRuntime:
    """Calls are made at once and in order, so there is nothing to wait for."""

    def __init__(self, config: Config) -> None:
        self.config = config
        give(config.placement.policy.gpus)  # as all of them, which is checked
        process_group_of_one()

    def start(self, requests: Sequence[RoleRequest]) -> dict[str, Group]:
        groups: dict[str, Group] = {}
        for request in requests:
            rank = request.role(self.config, request.checkpoint, RankSpec(request.name, 0, 1, request.place.threads))
            groups[request.name] = LocalGroup(request.name, rank)
        if self.config.placement.sleep:
            load_in_turns(list(groups.values()), self.wait)
            return in_turns(groups, self.wait)
        for group in groups.values():
            group.each(Worker.load)
        return groups

    def put(self, items: Sequence[Any]) -> Pieces[Any]:
        return Pieces(list(items), [])

    def wait(self, *pieces: Pieces[Any], what: str) -> None:
        pass

    def get(self, pieces: Pieces[Any], what: str) -> list[Any]:
        return list(itertools.chain(pieces.items))

    def stop(self) -> None:
        pass

    def close(self) -> None:
        pass
