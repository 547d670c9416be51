"""The moderator that `chatray moderation train` makes, and the one that chatray comes with."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from conf.moderation import Moderation
from orchestration.serving.moderation.linear import LinearModel
from orchestration.serving.moderation.moderators import Limits

DEFAULT = Path(__file__).with_name("default.safetensors")
"""Trained on 720 texts of openai/moderation-api-release (MIT), and texts that are harmless; its header says how."""


class Trained:
    """A classifier from a file."""

    def __init__(self, settings: Moderation) -> None:
        path = Path(settings.path) if settings.path else DEFAULT
        self.model = LinearModel.load(path)
        self.name = f"trained:{path.stem}"
        self.categories = self.model.categories
        self.defaults: Limits = self.model.thresholds()

    def scores(self, texts: Sequence[str]) -> list[dict[str, float]]:
        found = self.model.probabilities(texts)
        return [dict(zip(self.categories, map(float, row), strict=True)) for row in found]
