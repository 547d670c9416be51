"""The policy (the actor): gives log-probs, turns scored rollouts into experience, and learns from it by PPO."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from actors.algorithms.gae import gae, shape_rewards
from actors.algorithms.kl import k1
from actors.algorithms.masking import masked_mean, masked_sum, moments, whiten
from actors.algorithms.ppo import policy_loss
from actors.algorithms.running import Moments, normalised
from actors.algorithms.supervised import language_loss
from actors.batch import Batch, Dialogues, Experience, Rollouts, join_rows
from actors.engine import Optimizer
from actors.learning import minibatches, optimizer_step
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
        self, rollouts: list[Rollouts], scores: list[Tensor], reference: list[Tensor], values: list[Tensor], beta: float,
        so_far: Moments | None = None,
    ) -> list[Experience]:  # fmt: skip
        """Rewards, advantages and returns for this rank's share; advantages are whitened over the share of all ranks.

        Args:
            so_far: of all scores of the run, which these are normalised by before they are clipped; None: they are not.
        """
        scored = [Scored(*piece) for piece in zip(rollouts, scores, reference, values, strict=True)]
        old = self.logprobs(rollouts)
        shaped = [replace(piece, scores=normalised(piece.scores, so_far)) for piece in scored]
        learned = [self._advantages(piece, logprobs, beta) for piece, logprobs in zip(shaped, old, strict=True)]
        advantages = self._whitened([a for a, _ in learned], rollouts)
        self._describe(scored, old)
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

    def _describe(self, scored: list[Scored], old: list[Tensor]) -> None:
        """Figures of the samples themselves, over all ranks; kept for `describe`."""
        rollouts = Rollouts.join([piece.rollouts for piece in scored])
        mask, reduce = rollouts.mask, self.engine.sum_over_ranks
        kl = torch.where(mask, k1(join_rows(old), join_rows([piece.reference for piece in scored])), torch.zeros(()))
        every = torch.ones(len(rollouts), dtype=torch.bool)
        scores = torch.cat([piece.scores for piece in scored])
        gap = (join_rows(old) - rollouts.behaviour).abs()
        mean, variance = moments(scores, every, reduce)
        self.described = {
            "score": float(mean),
            "score_std": float(variance.sqrt()),
            "kl": float(masked_mean(kl.sum(dim=1), every, reduce)),
            "kl_per_token": float(masked_mean(kl, mask, reduce)),
            "reply_tokens": float(masked_mean(mask.sum(dim=1).float(), every, reduce)),
            "finished_share": float(masked_mean(rollouts.finished.float(), every, reduce)),
            "engine_gap_mean": float(masked_mean(gap, mask, reduce)),
            "tokens": float(reduce(rollouts.lengths.sum().float())),
        }

    def describe(self) -> dict[str, float]:
        """Figures of the samples that `experience` saw last: score, KL to the reference, length."""
        return self.described

    def update(self, experience: list[Experience], pretraining: list[Dialogues], step: int) -> dict[str, float]:
        """PPO's epochs over this rank's share. `pretraining` holds one batch per optimizer step when `ppo.ptx` is above 0."""
        ppo = self.config.ppo
        share = Experience.join(experience)
        totals: dict[str, float] = {}
        first: dict[str, float] = {}
        batches = minibatches(share, ppo.epochs, ppo.minibatches, (self.config.seed, step, self.spec.rank))
        for number, minibatch in enumerate(batches):
            extra = pretraining[number] if ppo.ptx > 0 else None
            found = self._learn(minibatch, extra, warmed_up(ppo.lr, step, ppo.warmup))
            if number == 0:  # before any update of this step: the ratio must still be 1
                first = {"first_clip_share": found["clip_share"], "first_kl": found["update_kl"]}
            totals = {name: totals.get(name, 0.0) + value for name, value in found.items()}
        steps = ppo.epochs * ppo.minibatches
        return first | {name: value / steps for name, value in totals.items()}

    def _learn(self, minibatch: Experience, extra: Dialogues | None, lr: float) -> dict[str, float]:
        ppo, device = self.config.ppo, self.engine.device
        tokens = float(self.engine.sum_over_ranks(minibatch.mask.sum().float()))
        sums = torch.zeros(4)

        def loss(rows: Experience) -> Tensor:
            rows = rows.to(device)
            logprobs, entropy = self._current(rows)
            found = policy_loss(logprobs, rows.old_logprobs, rows.advantages, rows.mask, ppo.clip, tokens)
            described = [found.loss.detach(), found.clipped, found.kl, masked_sum(entropy, rows.mask) / tokens]
            sums.add_(torch.stack(described).cpu())
            return found.loss

        losses: list[tuple[Callable[[Any], Tensor], Batch]] = [(loss, minibatch)]
        if extra is not None:
            losses.append((self._ptx(float(self.engine.sum_over_ranks(extra.mask.sum().float()))), extra))
        norm = optimizer_step(self.engine, losses, self.config.engine.micro_batch, lr)
        names = ("policy_loss", "clip_share", "update_kl", "entropy")
        return dict(zip(names, self.engine.sum_over_ranks(sums).tolist(), strict=True)) | {"policy_grad_norm": norm, "policy_lr": lr}

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
