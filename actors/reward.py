"""The reward model, frozen: one score for each reply."""

from __future__ import annotations

import torch
from torch import Tensor

from actors.batch import Rollouts
from actors.models import at_last
from actors.worker import Worker, make_engine, scalar_model


class Reward(Worker):
    """One rank of the reward model."""

    def load(self) -> None:
        self.engine = make_engine(self.config, scalar_model(self.checkpoint, self.config.seed), None)

    @torch.no_grad()
    def score(self, pieces: list[Rollouts]) -> list[Tensor]:
        """[B] for each piece: the score of the whole reply, read at its last token."""
        device = self.engine.device
        return [at_last(self.engine(piece.tokens.to(device)), piece.lengths.to(device)).cpu() for piece in pieces]
