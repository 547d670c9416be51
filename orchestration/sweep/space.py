"""The search space: which settings of PPO are varied, in which ranges, and under which conditions.

What a dimension may be stands in `conf/sweeps.py`. Only settings of PPO may be varied: the trials share their SFT model and reward model.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from conf.schema import Config
from orchestration import config as configuration
from orchestration.config import setting, with_settings
from orchestration.errors import RequestError

LENGTHS = {"uniform": 2, "loguniform": 2, "quniform": 3, "int": 2, "logint": 2, "qint": 3}
"""Kinds of ranges, and how many numbers each is made of."""
WHOLE, LOGARITHMIC = ("int", "logint", "qint"), ("loguniform", "logint")
RESERVED = ("ppo.steps", "ppo.judge", "ppo.rewards", "ppo.kl.budget")
"""Settings of PPO that are the same in all trials: how long they are, and what they are judged by."""

Values = dict[str, Any]
"""Setting -> value, of the dimensions that are in force."""


@dataclass(frozen=True)
class Dimension:
    """One setting that is varied."""

    key: str
    kind: str
    """`choice`, or one of `LENGTHS`."""
    of: tuple[Any, ...]
    """The choices, or the two ends of the range, both included, and its step if it has one."""
    when: tuple[tuple[str, tuple[Any, ...]], ...] = ()
    """Other dimensions, and the values of which each must have one for this one to be in force."""

    def in_force(self, values: Mapping[str, Any]) -> bool:
        return all(key in values and values[key] in allowed for key, allowed in self.when)

    def sample(self, rng: random.Random) -> Any:
        """A value drawn from the dimension."""
        if self.kind == "choice":
            return rng.choice(self.of)
        low, high = self.of[:2]
        if self.kind == "int":
            return rng.randint(low, high)
        return self.fitted(math.exp(rng.uniform(math.log(low), math.log(high))) if self.kind in LOGARITHMIC else rng.uniform(low, high))

    def fitted(self, value: float) -> Any:
        """The nearest value that the range has."""
        low, high = self.of[:2]
        if len(self.of) == 3:
            step = self.of[2]
            value = low + min(round((value - low) / step), math.floor((high - low) / step + 1e-9)) * step
        value = min(max(value, low), high)
        return round(value) if self.kind in WHOLE else value

    def moved(self, value: Any, factor: float, rng: random.Random) -> Any:
        """A value a little off this one: a choice's neighbour, or `factor` times or a `factor`th of it within the range."""
        if self.kind == "choice":
            if value not in self.of:
                return self.sample(rng)
            return self.of[min(max(self.of.index(value) + rng.choice((-1, 1)), 0), len(self.of) - 1)]
        return self.fitted(value * rng.choice((factor, 1 / factor)))

    def ends(self) -> tuple[Any, ...]:
        """The values to check the setting with: all choices, or both ends."""
        return self.of if self.kind == "choice" else self.of[:2]

    def holds(self, value: Any) -> bool:
        """Whether the dimension has this value."""
        if self.kind == "choice":
            return value in self.of
        number = isinstance(value, int if self.kind in WHOLE else int | float) and not isinstance(value, bool)
        return number and self.of[0] <= value <= self.of[1]


@dataclass(frozen=True)
class Space:
    """All dimensions, each after those that it depends on."""

    dimensions: tuple[Dimension, ...]

    def sample(self, rng: random.Random) -> Values:
        """Values of the dimensions that are in force with each other."""
        return self.chosen(lambda dimension: dimension.sample(rng))

    def chosen(self, choose: Callable[[Dimension], Any]) -> Values:
        """What `choose` gives for each dimension that is in force with the values chosen before."""
        values: Values = {}
        for dimension in self.dimensions:
            if dimension.in_force(values):
                values[dimension.key] = choose(dimension)
        return values

    def explored(self, values: Values, resample: float, factor: float, rng: random.Random) -> Values:
        """Values a little off these (PBT's exploration, Jaderberg et al. 1711.09846, 4.1.1)."""

        def choose(dimension: Dimension) -> Any:
            if dimension.key not in values or rng.random() < resample:
                return dimension.sample(rng)
            return dimension.moved(values[dimension.key], factor, rng)

        return self.chosen(choose)

    def of(self, config: Config) -> Values:
        """The values that the experiment's own settings have."""
        return self.chosen(lambda dimension: setting(config, dimension.key))


def parsed(given: Mapping[str, Any], config: Config) -> Space:
    """The space of `sweep.space`, checked against the settings that it varies.

    Raises:
        RequestError: with every mistake found.
    """
    mistakes: list[str] = []
    flat = {key: content for key, content in _flat(given, "") if content is not None}
    if not flat:
        mistakes.append("sweep.space: it is empty; name at least one setting, e.g. sweep.space.ppo.lr={loguniform: [1e-5, 1e-3]}")
    found = [d for key, content in flat.items() if (d := _dimension(key, content, config, mistakes)) is not None]
    mistakes += _wrong_conditions(found, flat)
    if mistakes:
        raise RequestError(mistakes)
    ordered = _ordered(found)
    if len(ordered) < len(found):
        circle = ", ".join(d.key for d in found if d not in ordered)
        raise RequestError(f"sweep.space: the conditions of {circle} go round in a circle; take `when` from one of them")
    return Space(tuple(ordered))


def _flat(given: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    """(setting, what is said of it): names may be dotted or nested; what comes later counts, and null takes one out."""
    found: dict[str, Any] = {}
    for name, content in given.items():
        nested = isinstance(content, Mapping) and not any(kind in content for kind in (*LENGTHS, "choice", "when"))
        if nested and f"{prefix}{name}" not in configuration.leaves(Config):
            found |= dict(_flat(content, f"{prefix}{name}."))
        else:
            found[f"{prefix}{name}"] = content
    yield from found.items()


def _dimension(key: str, content: Any, config: Config, mistakes: list[str]) -> Dimension | None:
    """None, and why, where it is none."""
    at = f"sweep.space.{key}"
    try:
        setting(config, key)
    except KeyError:
        known = [name for name in configuration.leaves(Config) if name.startswith("ppo.")]
        mistakes.append(f"{at}: no such setting; did you mean {configuration.nearest(key, known)[0]}?")
        return None
    if not key.startswith("ppo."):
        mistakes.append(
            f"{at}: trials share the SFT model and the reward model, so only settings of ppo may be varied; sweep it in runs of its own"
        )
        return None
    if key.startswith(RESERVED):
        mistakes.append(f"{at}: all trials have the same, or their scores could not be compared; give {key}=… to the sweep instead")
        return None
    kinds = [name for name in content if name != "when"] if isinstance(content, Mapping) else []
    if len(kinds) != 1 or kinds[0] not in (*LENGTHS, "choice"):
        mistakes.append(f"{at}={content!r}: one of {', '.join(('choice', *LENGTHS))} is needed, e.g. {{loguniform: [1e-5, 1e-3]}}")
        return None
    of = _numbers(at, kinds[0], content[kinds[0]], mistakes)
    dimension = Dimension(key, kinds[0], of, _conditions(at, content.get("when"), mistakes))
    mistakes += [f"{at}: {mistake}" for mistake in _not_settings(dimension, config)] if dimension.of else []
    return dimension


def _numbers(at: str, kind: str, given: Any, mistakes: list[str]) -> tuple[Any, ...]:
    """What the dimension is made of; nothing, and why, where it is wrong."""
    if not isinstance(given, list | tuple):
        mistakes.append(f"{at}: {kind} wants a list, and {given!r} is none")
        return ()
    wrong = ""
    if kind == "choice":
        wrong = "" if len(given) > 1 else "choose from two values at least"
        wrong = wrong or ("a value stands there twice" if any(item in given[:n] for n, item in enumerate(given)) else "")
    else:
        number = int if kind in WHOLE else int | float
        names = "[low, high, step]" if LENGTHS[kind] == 3 else "[low, high]"
        if len(given) != LENGTHS[kind] or not all(isinstance(item, number) and not isinstance(item, bool) for item in given):
            wrong = f"{kind} wants {'whole ' if kind in WHOLE else ''}numbers {names}"
        elif not all(math.isfinite(item) for item in given):
            wrong = f"{kind} wants finite numbers"
        elif given[0] >= given[1]:
            wrong = "the lower end must be below the upper one"
        elif kind in LOGARITHMIC and given[0] <= 0:
            wrong = f"{kind} wants ends above 0"
        elif len(given) == 3 and not 0 < given[2] <= given[1] - given[0]:
            wrong = "the step must be above 0 and no larger than the range"
    if wrong:
        mistakes.append(f"{at}.{kind}={list(given)!r}: {wrong}")
        return ()
    return tuple(float(item) for item in given) if kind in ("uniform", "loguniform", "quniform") else tuple(given)


def _conditions(at: str, given: Any, mistakes: list[str]) -> tuple[tuple[str, tuple[Any, ...]], ...]:
    if given is None:
        return ()
    if not isinstance(given, Mapping) or not given:
        mistakes.append(f"{at}.when={given!r}: it names other settings of the space, e.g. when: {{ppo.advantage: gae}}")
        return ()
    return tuple((key, tuple(value) if isinstance(value, list) else (value,)) for key, value in given.items())


def _not_settings(dimension: Dimension, config: Config) -> Iterator[str]:
    """Values that the setting cannot have. What they contradict beside their type is seen in the trials' own settings."""
    for value in dimension.ends():
        try:
            with_settings(config, {dimension.key: value})
        except RequestError as error:
            typed = [text for text in error.mistakes if text.startswith(f"{dimension.key}={value!r}:")]
            yield from typed


def _wrong_conditions(found: Sequence[Dimension], flat: Mapping[str, Any]) -> Iterator[str]:
    known = {dimension.key: dimension for dimension in found}
    for dimension in found:
        for key, allowed in dimension.when:
            at = f"sweep.space.{dimension.key}.when.{key}"
            if key not in flat:
                yield f"{at}: no dimension of this space; those are {', '.join(flat)}"
            elif key in known and known[key].of:
                yield from (f"{at}={value!r}: {key} never has this value" for value in allowed if not known[key].holds(value))


def _ordered(found: Sequence[Dimension]) -> list[Dimension]:
    """Each after those that it depends on; those in a circle are left out."""
    ordered: list[Dimension] = []
    while True:
        done = {dimension.key for dimension in ordered}
        ready = [d for d in found if d.key not in done and all(key in done for key, _ in d.when)]
        if not ready:
            return ordered
        ordered += ready
