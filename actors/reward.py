"""The reward model, frozen: one score for each reply."""

from __future__ import annotations

import torch
from torch import Tensor

from actors.batch import Rollouts
from actors.reward_network import load_reward_model, score
from actors.worker import Worker, make_engine


class Reward(Worker):
    """One rank of the reward model."""

    def load(self) -> None:
        self.engine = make_engine(self.config, load_reward_model(self.checkpoint, self.config.seed), None)

    @torch.no_grad()
    def score(self, pieces: list[Rollouts]) -> list[Tensor]:
        """[B] for each piece: the score of the whole reply, read as the network was trained to."""
        device, module = self.engine.device, self.engine.module
        return [
            score(self.engine, piece.tokens.to(device), piece.lengths.to(device), piece.mask.to(device), module).cpu() for piece in pieces
        ]
