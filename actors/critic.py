"""The critic (the value model): the expected score to go at each token, started from the reward model."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from actors import lora
from actors.algorithms.masking import moments
from actors.algorithms.ppo import value_loss
from actors.batch import Dialogues, Experience, Rollouts
from actors.learning import in_passes, minibatches, optimizer_step
from actors.micro_batches import limit
from actors.models import before_each
from actors.sharding import Optimizer
from actors.worker import Worker, export, make_engine, scalar_model, warmed_up


class Critic(Worker):
    """One rank of the critic."""

    def load(self) -> None:
        ppo = self.config.ppo
        optimizer = Optimizer(ppo.critic_lr, ppo.weight_decay, ppo.max_grad_norm, ppo.adam_epsilon)
        model = lora.adapted(self.config, "critic", scalar_model(self.config, self.checkpoint))
        self.engine = make_engine(self.config, model, optimizer)
        self.engine.train(False)

    @torch.no_grad()
    def values(self, pieces: list[Rollouts]) -> list[Tensor]:
        """[B, T] for each piece: the value of the state in which each reply token was chosen."""
        return in_passes(self.engine, pieces, self._values, limit(self.config.engine, self.engine))

    def _values(self, rows: Dialogues | Experience) -> Tensor:
        device = self.engine.device
        return before_each(self.engine(rows.tokens.to(device), rows.lengths.to(device)), rows.mask.to(device))

    def update(self, experience: list[Experience], step: int) -> dict[str, float]:
        """The clipped value loss over this rank's share, in as many epochs and minibatches as the policy."""
        ppo = self.config.ppo
        share = Experience.join(experience)
        totals: dict[str, float] = {}
        for minibatch in minibatches(share, ppo.epochs, ppo.minibatches, (self.config.seed, step, self.spec.rank)):
            for name, value in self._learn(minibatch, warmed_up(ppo.critic_lr, step, ppo.warmup)).items():
                totals[name] = totals.get(name, 0.0) + value
        steps = ppo.epochs * ppo.minibatches
        return self._explained(share) | {name: value / steps for name, value in totals.items()}

    def _learn(self, minibatch: Experience, lr: float) -> dict[str, float]:
        tokens = float(self.engine.sum_over_ranks(minibatch.mask.sum().float()))
        total = torch.zeros(())

        def loss(rows: Experience) -> Tensor:
            rows = rows.to(self.engine.device)
            return value_loss(self._values(rows), rows.old_values, rows.returns, rows.mask, self.config.ppo.value_clip, tokens)

        norm = optimizer_step(self.engine, [(loss, minibatch)], limit(self.config.engine, self.engine), lr, total)
        return {"value_loss": float(self.engine.sum_over_ranks(total)), "critic_grad_norm": norm, "critic_lr": lr}

    def _explained(self, share: Experience) -> dict[str, float]:
        """Share of the returns' variance that the values explained, 1 at best."""
        reduce = self.engine.sum_over_ranks
        _, unexplained = moments(share.returns - share.old_values, share.mask, reduce)
        _, variance = moments(share.returns, share.mask, reduce)
        return {"explained_variance": float(1 - unexplained / variance.clamp(min=1e-8))}

    def save_state(self, folder: str) -> None:
        self.engine.save_state(Path(folder))

    def load_state(self, folder: str) -> None:
        self.engine.load_state(Path(folder))

    def export(self, folder: str) -> None:
        export(self.config, self.engine, Path(folder))
