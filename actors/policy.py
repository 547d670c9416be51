"""The policy (the actor): gives log-probs, turns scored rollouts into experience, and learns from it by PPO."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from actors.algorithms.gae import gae, shape_rewards
from actors.algorithms.kl import k1
from actors.algorithms.masking import masked_sum, whiten
from actors.algorithms.ppo import policy_loss
from actors.algorithms.supervised import language_loss
from actors.batch import Batch, Dialogues, Experience, Rollouts, join_rows
from actors.engine import Optimizer
from actors.learning import minibatches, optimizer_step
from actors.sample_figures import Ranks, sample_figures
from actors.weight_sync import WeightUpdate, pack, unpack
from actors.worker import Worker, export, language_model, make_engine, warmed_up

BEFORE_FILE = "before.pt"
"""The weights sent to the engines before those in the saved engine state."""


@dataclass(frozen=True)
class Scored:
    """What the other roles said of one piece of rollouts."""

    rollouts: Rollouts
    scores: Tensor
    """[B]."""
    reference: Tensor
    """[B, T]."""
    values: Tensor
    """[B, T]."""


class Policy(Worker):
    """One rank of the policy."""

    def load(self) -> None:
        ppo = self.config.ppo
        optimizer = Optimizer(ppo.lr, ppo.weight_decay, ppo.max_grad_norm, ppo.adam_epsilon)
        self.engine = make_engine(self.config, language_model(self.checkpoint), optimizer)
        self.engine.train(False)  # no dropout in PPO: it would make the first ratio differ from 1
        self.described: dict[str, float] = {}
        self.sent: list[WeightUpdate] = []

    @torch.no_grad()
    def logprobs(self, pieces: Sequence[Rollouts | Dialogues]) -> list[Tensor]:
        """[B, T] for each piece: rollouts at the sampling temperature, text at 1."""
        return [self._current(piece)[0].cpu() for piece in pieces]

    def _current(self, rows: Rollouts | Experience | Dialogues) -> tuple[Tensor, Tensor]:
        temperature = 1.0 if isinstance(rows, Dialogues) else self.config.ppo.temperature
        return self.engine(rows.tokens.to(self.engine.device), rows.mask.to(self.engine.device), temperature)

    def experience(
        self, rollouts: list[Rollouts], scores: list[Tensor], reference: list[Tensor], values: list[Tensor], beta: float
    ) -> list[Experience]:
        """Rewards, advantages and returns for this rank's share; advantages are whitened over the share of all ranks."""
        scored = [Scored(*piece) for piece in zip(rollouts, scores, reference, values, strict=True)]
        old = self.logprobs(rollouts)
        learned = [self._advantages(piece, logprobs, beta) for piece, logprobs in zip(scored, old, strict=True)]
        advantages = self._whitened([a for a, _ in learned], rollouts)
        whole = Rollouts.join(rollouts), torch.cat(scores), join_rows(old), join_rows(reference)
        self.described = sample_figures(*whole, self._ranks())
        return [
            Experience(r.tokens, r.lengths, r.mask, logprobs, piece.values, advantage, returns)
            for r, piece, logprobs, advantage, (_, returns) in zip(rollouts, scored, old, advantages, learned, strict=True)
        ]

    def _advantages(self, piece: Scored, old: Tensor, beta: float) -> tuple[Tensor, Tensor]:
        ppo, rollouts = self.config.ppo, piece.rollouts
        kl = k1(old, piece.reference)
        rewards = shape_rewards(piece.scores, kl, rollouts.mask, beta, ppo.reward_clip, rollouts.finished, ppo.missing_end_penalty)
        return gae(rewards, piece.values, rollouts.mask, ppo.gamma, ppo.lam)

    def _whitened(self, advantages: list[Tensor], rollouts: list[Rollouts]) -> list[Tensor]:
        if not self.config.ppo.whiten:
            return advantages
        whole = whiten(join_rows(advantages), join_rows([r.mask for r in rollouts]), self.engine.sum_over_ranks)
        rows = whole.split([len(a) for a in advantages])
        return [row[:, : a.shape[1]].clone() for row, a in zip(rows, advantages, strict=True)]

    def describe(self) -> dict[str, float]:
        """Figures of the samples that `experience` saw last (`sample_figures.py`)."""
        return self.described

    def _ranks(self) -> Ranks:
        return Ranks(self.engine.sum_over_ranks, self.spec.rank, self.spec.world_size)

    def update(self, experience: list[Experience], pretraining: list[Dialogues], step: int, lr_scale: float = 1.0) -> dict[str, float]:
        """PPO's epochs over this rank's share. `pretraining` holds one batch per optimizer step when `ppo.ptx` is above 0.

        Args:
            lr_scale: of the learning rate; below 1 after rollbacks.
        """
        ppo = self.config.ppo
        share = Experience.join(experience)
        totals: dict[str, float] = {}
        first: dict[str, float] = {}
        batches = minibatches(share, ppo.epochs, ppo.minibatches, (self.config.seed, step, self.spec.rank))
        for number, minibatch in enumerate(batches):
            extra = pretraining[number] if ppo.ptx > 0 else None
            found = self._learn(minibatch, extra, lr_scale * warmed_up(ppo.lr, step, ppo.warmup))
            if number == 0:  # before any update of this step: the ratio must still be 1
                first = {f"first_{name.removeprefix('update_')}": found[name] for name in ("clip_share", "update_kl", "log_ratio_max")}
            totals = {name: totals.get(name, 0.0) + value for name, value in found.items()}
        steps = ppo.epochs * ppo.minibatches
        return first | {name: value / steps for name, value in totals.items()}

    def _learn(self, minibatch: Experience, extra: Dialogues | None, lr: float) -> dict[str, float]:
        ppo, device = self.config.ppo, self.engine.device
        tokens = float(self.engine.sum_over_ranks(minibatch.mask.sum().float()))
        sums, largest = torch.zeros(4), torch.zeros(1)

        def loss(rows: Experience) -> Tensor:
            rows = rows.to(device)
            logprobs, entropy = self._current(rows)
            found = policy_loss(logprobs, rows.old_logprobs, rows.advantages, rows.mask, ppo.clip, tokens)
            described = [found.loss.detach(), found.clipped, found.kl, masked_sum(entropy, rows.mask) / tokens]
            sums.add_(torch.stack(described).cpu())
            largest.copy_(torch.maximum(largest, torch.where(rows.mask, (logprobs.detach() - rows.old_logprobs).abs(), 0).max().cpu()))
            return found.loss

        losses: list[tuple[Callable[[Any], Tensor], Batch]] = [(loss, minibatch)]
        if extra is not None:
            losses.append((self._ptx(float(self.engine.sum_over_ranks(extra.mask.sum().float()))), extra))
        norm = optimizer_step(self.engine, losses, self.config.engine.micro_batch, lr)
        names = ("policy_loss", "clip_share", "update_kl", "entropy")
        found = dict(zip(names, self.engine.sum_over_ranks(sums).tolist(), strict=True))
        return found | {"log_ratio_max": self._ranks().largest(largest), "policy_grad_norm": norm, "policy_lr": lr}

    def _ptx(self, tokens: float):
        """PPO-ptx (InstructGPT, equation 2): gamma times the language-modelling loss, in the same accumulated gradient."""

        def loss(rows: Dialogues) -> Tensor:
            rows = rows.to(self.engine.device)
            return self.config.ppo.ptx * language_loss(self._current(rows)[0], rows.mask, tokens)

        return loss

    def weights(self, version: int) -> WeightUpdate:
        """All weights for the rollout engines; every rank must call. The last two are kept, to be able to go back."""
        self.sent = [*self.sent[-1:], pack(self.engine.weights(), version)]
        return self.sent[-1]

    def go_back(self) -> int:
        """Take back the weights sent before the last ones, for export and not for training on; returns their version."""
        self.engine.set_weights(unpack(self.sent[0]))
        return self.sent[0].version

    def save_state(self, folder: str) -> None:
        """Resume state: the engine's, and the weights to go back to."""
        self.engine.save_state(Path(folder))
        if self.spec.rank == 0 and self.sent:
            torch.save({"version": self.sent[0].version, "weights": unpack(self.sent[0])}, Path(folder) / BEFORE_FILE)

    def load_state(self, folder: str) -> None:
        """The inverse of `save_state`."""
        self.engine.load_state(Path(folder))
        if (Path(folder) / BEFORE_FILE).exists():
            before = torch.load(Path(folder) / BEFORE_FILE, weights_only=True)
            self.sent = [pack(before["weights"], before["version"])]

    def export(self, folder: str) -> None:
        export(self.engine, Path(folder), self.spec.rank)
