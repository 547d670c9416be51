"""What a moderator is, which one the settings name, and what follows from its scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from conf.moderation import Moderation
from orchestration.errors import RequestError
from orchestration.serving.moderation.verdict import Action, Verdict

WARN, BLOCK = 0.5, 0.9
"""Thresholds of categories that come without any of their own."""

Limits = Mapping[str, Mapping[str, float]]


class ModerationError(Exception):
    """A text could not be scored, and may not pass unscored."""


class Moderator(Protocol):
    """Scores texts. May be called from several threads, though not at the same time."""

    name: str
    """Names kind and version, for audits."""
    categories: tuple[str, ...]
    defaults: Limits
    """Thresholds to use where the settings name none."""

    def scores(self, texts: Sequence[str]) -> list[dict[str, float]]:
        """For each text a score from 0 to 1 by category; {}: let through unmoderated, by the settings.

        Raises:
            ModerationError: there are no scores, and none may be assumed.
        """


class Off:
    """Lets everything through."""

    def __init__(self) -> None:
        self.name, self.categories, self.defaults = "off", tuple[str, ...](), dict[str, dict[str, float]]()

    def scores(self, texts: Sequence[str]) -> list[dict[str, float]]:
        return [{} for _ in texts]


def open_moderator(settings: Moderation) -> Moderator:
    """The moderator that the settings name, ready to score.

    Raises:
        RequestError: a setting is missing, or what it names is not there or is not what it should be.
    """
    match settings.kind:
        case "off":
            return Off()
        case "trained":
            from orchestration.serving.moderation.trained import Trained

            return Trained(settings)
        case "huggingface":
            from orchestration.serving.moderation.huggingface import HuggingFace

            return HuggingFace(settings)
        case "openai":
            from orchestration.serving.moderation.endpoint import Endpoint

            return Endpoint(settings)


def thresholds_of(settings: Moderation, moderator: Moderator) -> Limits:
    """The thresholds in force.

    Raises:
        RequestError: the settings name a category that the moderator does not know.
    """
    unknown = sorted(set(settings.thresholds) - set(moderator.categories))
    if unknown and moderator.categories:
        raise RequestError(f"moderation.thresholds: {', '.join(unknown)}: no such category; {moderator.name} has {', '.join(moderator.categories)}")
    for category, limits in settings.thresholds.items():
        if limits.get("block", 1.0) < limits.get("warn", 0.0):
            raise RequestError(f"moderation.thresholds.{category}: blocks from {limits['block']} on, below its warning at {limits['warn']}")
    return settings.thresholds or moderator.defaults


def fixed(categories: Sequence[str]) -> Limits:
    """The same thresholds for every category."""
    return {category: {"warn": WARN, "block": BLOCK} for category in categories}


def decide(scores: Mapping[str, float], thresholds: Limits) -> Verdict:
    """What follows from a text's scores: `block` if any category reaches its `block`, `warn` if any reaches its `warn`."""
    reached: dict[str, Action] = {}
    for category, score in scores.items():
        limits = thresholds.get(category, {})
        if "block" in limits and score >= limits["block"]:
            reached[category] = "block"
        elif "warn" in limits and score >= limits["warn"]:
            reached[category] = "warn"
    action: Action = "block" if "block" in reached.values() else "warn" if reached else "allow"
    return Verdict(dict(scores), action, tuple(sorted(reached, key=lambda category: -scores[category])))
