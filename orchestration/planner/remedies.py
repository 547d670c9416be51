"""What to change so that a plan fits, each by planning again. The smallest are first.

Small is what changes least of what is learned and asked for. Single changes are tried, then pairs. Where those do not do, everything that
costs time alone is changed together, as far as it brings the plan nearer to fitting, and taken back again as far as it is not needed; then
the same with more machines, with another method, with shorter sequences, with adapters. Last comes a smaller model.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, islice

from conf.schema import Config
from orchestration import config as configuration
from orchestration.planner.changes import MACHINES, METHOD, TIME, Change, changes, combined, smaller_models
from orchestration.planner.machines import Node
from orchestration.planner.plan import Plan, plan

MOST = 5
"""Remedies that are given at most."""
PAIRS = 60
"""Pairs that are planned at most: an answer is wanted in seconds."""
SINGLE = (*TIME, *MACHINES)
TOGETHER = (
    TIME, (*TIME, *MACHINES), (*TIME, *METHOD), (*TIME, "longest"), (*TIME, *METHOD, "longest"), (*TIME, *METHOD, *MACHINES),
    (*TIME, "adapters"),
)  # fmt: skip
"""Families that are tried together, in this order; the last of each costs most."""
ROUNDS = 4
Chosen = dict[str, Change]


@dataclass(frozen=True)
class Remedy:
    """Changes that make it fit, planned and found to."""

    changes: tuple[str, ...]
    """Overrides."""
    binds: str
    """What is nearest to its limit then."""


def with_remedies(config: Config, found: Plan) -> Plan:
    """The plan with the changes that would make it fit, if it does not."""
    return found if found.fits else replace(found, remedies=remedies(config, found.nodes))


def remedies(config: Config, nodes: Sequence[Node]) -> list[Remedy]:
    """Those that fit, the smallest first. Of a family only the mildest is given."""
    trial = Trial(config, nodes)
    found = trial.fitting(((one,) for one in trial.singles()), set(TIME))
    if not found:
        found = trial.fitting(islice(trial.pairs(), PAIRS), set(TIME))
    same_machines = list(found)
    found += trial.fitting(((one,) for one in trial.singles()), set(MACHINES))
    for families in TOGETHER:
        if len(found) < MOST and not (same_machines and "adapters" not in families):
            more = trial.together(families)
            found += [more] if more and set(more.changes) not in [set(remedy.changes) for remedy in found] else []
    found.sort(key=lambda remedy: any(word.startswith("lora.rank=") for word in remedy.changes))
    return found[:MOST] or trial.smaller()


class Trial:
    """One request that does not fit, and what was tried with it."""

    def __init__(self, config: Config, nodes: Sequence[Node]) -> None:
        self.config, self.nodes = config, nodes
        self.choices = changes(config, nodes)
        self.known = set(configuration.contradictions(config, reads_data=False))
        self.planned: dict[tuple[str, ...], Plan | None] = {}

    def plan(self, chosen: Iterable[Change]) -> Plan | None:
        """The plan with these changes; None if they contradict each other."""
        chosen = list(chosen)
        tried, words = combined(self.config, chosen)
        if words not in self.planned:
            extra = max((change.nodes for change in chosen), default=0)
            more = [*self.nodes, *(replace(self.nodes[-1], name=f"node {len(self.nodes) + n}") for n in range(extra))]
            wrong = set(configuration.contradictions(tried, reads_data=False)) - self.known
            self.planned[words] = None if wrong else plan(tried, more, timed=False)
        return self.planned[words]

    def fits(self, chosen: Iterable[Change]) -> bool:
        found = self.plan(chosen)
        return found is not None and found.fits

    def remedy(self, chosen: Iterable[Change]) -> Remedy:
        chosen = list(chosen)
        found = self.plan(chosen)
        assert found is not None and found.fits
        return Remedy(combined(self.config, chosen)[1], found.binds)

    def singles(self) -> Iterator[Change]:
        yield from (change for family in SINGLE for change in self.choices.get(family, []))

    def pairs(self) -> Iterator[tuple[Change, ...]]:
        """Of the strongest of each family, which bounds the search."""
        yield from combinations([self.choices[family][-1] for family in TIME if family in self.choices], 2)

    def fitting(self, wanted: Iterable[tuple[Change, ...]], families: set[str]) -> list[Remedy]:
        """Of those within these families, the ones that fit, as mild as that allows."""
        found: list[Remedy] = []
        solved: set[tuple[str, ...]] = set()
        for chosen in wanted:
            names = tuple(change.family for change in chosen)
            if set(names) <= families and names not in solved and self.fits(chosen):
                solved.add(names)
                found.append(self.remedy(self._mildest({change.family: change for change in chosen}).values()))
        return found[:MOST]

    def together(self, families: Sequence[str]) -> Remedy | None:
        """Many changes at once: as many as bring it nearer, then as few and as mild as still fit."""
        chosen = self._nearer([family for family in families if family in self.choices])
        if not self.fits(chosen.values()):
            return None
        costliest_first = sorted(chosen, key=families.index, reverse=True)
        for family in costliest_first:
            less = {name: change for name, change in chosen.items() if name != family}
            if self.fits(less.values()):
                chosen = less
        return self.remedy(self._mildest({family: chosen[family] for family in costliest_first if family in chosen}).values())

    def _mildest(self, chosen: Chosen) -> Chosen:
        """The same families, each as mild as still fits, the first given the most of it."""
        for family in [*chosen]:
            milder = (chosen | {family: change} for change in self.choices[family])
            chosen = next(one for one in milder if self.fits(one.values()))
        return chosen

    def _nearer(self, families: Sequence[str]) -> Chosen:
        chosen: Chosen = {}
        least = self._excess(chosen)
        for _ in range(ROUNDS):
            before = dict(chosen)
            for family in families:
                options = [chosen | {family: change} for change in reversed(self.choices[family])]
                best = min(options, key=self._excess)
                if self._excess(best) <= least:
                    chosen, least = {name: best[name] for name in families if name in best}, self._excess(best)
            if chosen == before or least == 0:
                break
        return chosen

    def _excess(self, chosen: Chosen) -> float:
        found = self.plan(chosen.values())
        return found.excess if found else float("inf")

    def smaller(self) -> list[Remedy]:
        return next(([self.remedy([one])] for one in smaller_models(self.config) if self.fits([one])), [])
