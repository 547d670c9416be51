"""The reward: one score for each reply, the weighted sum of what its sources say (`ppo.rewards`; by default one frozen reward model)."""

from __future__ import annotations

import torch
from torch import Tensor

from actors.algorithms.running import Moments
from actors.batch import Rollouts
from actors.engine import Engine
from actors.rank import off_device
from actors.rewards.function import FunctionSource
from actors.rewards.source import RewardError, Rows, Source, Texts
from actors.worker import Worker
from conf.rewards import FunctionReward, HttpReward, RewardSource

TOTAL = ""
"""What the sum is called among the sources, whose names are never empty."""


class Reward(Worker):
    """One rank of the reward."""

    def load(self) -> None:
        self.texts: Texts | None = None
        self.described: dict[str, Moments] = {}
        self.sources = [(source.name, source.weight, self._source(source)) for source in self.config.ppo.sources()]

    def _source(self, settings: RewardSource) -> Source:
        if isinstance(settings, FunctionReward):
            return FunctionSource(settings)
        if isinstance(settings, HttpReward):
            from actors.rewards.http import HttpSource

            return HttpSource(settings)
        from actors.rewards.model import ModelSource

        return ModelSource(self.config, settings.name, settings.path or self.checkpoint)

    @off_device
    def prepare(self, texts: Texts) -> None:
        """Learn what sources that read text need; may be left out with `ppo.rewards` empty and a model of the policy's tokenizer."""
        self.texts = texts

    def score(self, pieces: list[Rollouts], first: bool = True) -> list[Tensor]:
        """[B] for each piece: the score of the whole reply.

        Args:
            first: whether this begins a batch; other calls go on with it, and `describe` is of all of it.

        Raises:
            RewardError: a source gave none.
        """
        if self.texts is None and self.config.ppo.rewards:
            raise RewardError("ppo.rewards: the reward role was not told the conversations (Reward.prepare)")
        rows = Rows(pieces, self.texts)
        total = torch.zeros(len(rows))
        before = {} if first else self.described
        self.described = {}
        for name, weight, source in self.sources:
            found = source.score(rows)
            self.described[name] = before.get(name, Moments()).merged(Moments.of(found))
            total += weight * found
        if not bool(total.isfinite().all()):
            raise RewardError("ppo.rewards: the weighted sum of the scores is not finite; lower the sources' weights, or what they give")
        self.described[TOTAL] = before.get(TOTAL, Moments()).merged(Moments.of(total))
        return list(total.split([len(piece) for piece in pieces]))

    def engines(self) -> list[Engine]:
        return [source.engine for _, _, source in self.sources if hasattr(source, "engine")]

    @off_device
    def describe(self) -> dict[str, Moments]:
        """Moments of this rank's scores of the last batch, of each source by name, and of their sum as `TOTAL`."""
        return self.described
