"""The policy (the actor): gives log-probs, turns scored rollouts into experience, and learns from it by PPO."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from actors import lora
from actors.algorithms.baselines import grpo, on_tokens, reinforce, rloo
from actors.algorithms.gae import gae, shape_rewards
from actors.algorithms.importance import engine_gap, importance_weights
from actors.algorithms.kl import k1, k3
from actors.algorithms.masking import masked_mean, masked_sum, whiten
from actors.algorithms.ppo import policy_loss
from actors.algorithms.running import Moments, normalised
from actors.algorithms.supervised import language_loss
from actors.batch import Batch, Dialogues, Experience, Rollouts, join_rows
from actors.learning import in_passes, minibatches, optimizer_step
from actors.micro_batches import limit, padding_share, spent
from actors.rank import off_device
from actors.sample_figures import Ranks, sample_figures
from actors.sharded_state import Snapshot, save_snapshot
from actors.sharding import Optimizer
from actors.stream import Route, send_all, total_bytes
from actors.weight_sync import BUCKET_BYTES, WeightUpdate, pack
from actors.weights import Weight, grouped, plain_weights
from actors.worker import Worker, export, language_model, make_engine, warmed_up

BEFORE_FOLDER = "before"
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
    """[B, T]; 0 without a critic."""


class Policy(Worker):
    """One rank of the policy."""

    def load(self) -> None:
        ppo = self.config.ppo
        optimizer = Optimizer(ppo.lr, ppo.weight_decay, ppo.max_grad_norm, ppo.adam_epsilon)
        model = lora.adapted(self.config, "policy", language_model(self.config, self.checkpoint))
        self.engine = make_engine(self.config, model, optimizer)
        self.engine.train(False)  # no dropout in PPO: it would make the first ratio differ from 1
        self.described: dict[str, float] = {}
        self.most = limit(self.config.engine, self.engine)
        self._describe_weights()

    def _describe_weights(self) -> None:
        """What weight sync needs to know of them."""
        self.plain = plain_weights(self.engine.module)
        self.buckets = grouped(self.plain, BUCKET_BYTES)
        self.sent: list[Snapshot] = []
        """What was sent before the weights as they are now; while these have not been sent, the last two that were."""
        self.version: int | None = None
        """Version of the weights as they are now; None once they have learned, until they are sent again."""

    @torch.no_grad()
    def logprobs(self, pieces: Sequence[Rollouts | Dialogues]) -> list[Tensor]:
        """[B, T] for each piece: rollouts at the sampling temperature, text at 1."""
        temperature = 1.0 if pieces and isinstance(pieces[0], Dialogues) else self.config.ppo.temperature
        return self._scored(pieces, temperature)

    @torch.no_grad()
    def reference_logprobs(self, pieces: Sequence[Rollouts | Dialogues], temperature: float) -> list[Tensor]:
        """What `Reference.logprobs` would give: the policy of before any training, which is this one with its adapters off."""
        with lora.switched_off(self.engine.module):
            return self._scored(pieces, temperature)

    def _scored(self, pieces: Sequence[Rollouts | Dialogues], temperature: float) -> list[Tensor]:
        device = self.engine.device

        def run(rows: Dialogues) -> Tensor:
            return self.engine(rows.tokens.to(device), rows.mask.to(device), temperature, rows.lengths.to(device))[0]

        return in_passes(self.engine, pieces, run, self.most)

    def _current(self, rows: Rollouts | Experience | Dialogues) -> tuple[Tensor, Tensor]:
        temperature = 1.0 if isinstance(rows, Dialogues) else self.config.ppo.temperature
        device = self.engine.device
        return self.engine(rows.tokens.to(device), rows.mask.to(device), temperature, rows.lengths.to(device))

    def experience(
        self, rollouts: list[Rollouts], scores: list[Tensor], reference: list[Tensor], values: list[Tensor], beta: float,
        so_far: Moments | None = None,
    ) -> list[Experience]:  # fmt: skip
        """Rewards, advantages and returns for this rank's share; advantages are whitened over the share of all ranks.

        Args:
            values: empty without a critic.
            so_far: of all scores of the run, which these are normalised by before they are clipped; None: they are not.
        """
        values = values or [torch.zeros_like(piece.behaviour) for piece in rollouts]
        scored = [Scored(*piece) for piece in zip(rollouts, scores, reference, values, strict=True)]
        old, gap = self._old_logprobs(rollouts)
        shaped = [replace(piece, scores=normalised(piece.scores, so_far)) for piece in scored]
        learned = self._advantages(shaped, [self._rewards(piece, o, beta) for piece, o in zip(shaped, old, strict=True)])
        advantages = self._whitened([a for a, _ in learned], rollouts)
        whole = Rollouts.join(rollouts), torch.cat(scores), join_rows(old), join_rows(reference)
        padding = {"scoring_padding": padding_share(self.engine.sum_over_ranks(spent(whole[0], self.most)))}
        self.described = sample_figures(*whole, self._ranks()) | gap | self._k3_per_token(scored, old) | padding
        return [
            Experience(r.tokens, r.lengths, r.mask, logprobs, piece.values, advantage, returns, r.behaviour)
            for r, piece, logprobs, advantage, (_, returns) in zip(rollouts, scored, old, advantages, learned, strict=True)
        ]

    def _old_logprobs(self, rollouts: list[Rollouts]) -> tuple[list[Tensor], dict[str, float]]:
        """The old log-probs, and how far the engine's are from the trainer's.

        With `ppo.old_logprobs=behaviour` the trainer computes its own for the first piece alone, which measures the gap; the engine's stand
        in for all if no sample is stale and the gap is small. All ranks decide alike: each figure is a sum over them.
        """
        ppo, reduce = self.config.ppo, self.engine.sum_over_ranks
        measured = rollouts if ppo.old_logprobs == "trainer" else rollouts[:1]
        own = self.logprobs(measured)
        rows = Rollouts.join(measured)
        gap = float(engine_gap(join_rows(own), rows.behaviour, rows.mask, reduce))
        current = -1 if self.version is None else self.version
        stale = float(reduce((torch.cat([piece.version for piece in rollouts]) != current).sum().float()))
        stand_in = ppo.old_logprobs == "behaviour" and stale == 0 and gap <= ppo.engine_gap_limit
        rest = [] if stand_in else self.logprobs(rollouts[len(measured) :])
        figures = {"engine_gap_mean": gap, "stale_replies": stale, "old_from_behaviour": float(stand_in)}
        return [piece.behaviour for piece in rollouts] if stand_in else own + rest, figures

    def _rewards(self, piece: Scored, old: Tensor, beta: float) -> Tensor:
        ppo, rollouts = self.config.ppo, piece.rollouts
        kl = k1(old, piece.reference)
        return shape_rewards(piece.scores, kl, rollouts.mask, beta, ppo.reward_clip, rollouts.finished, ppo.missing_end_penalty)

    def _advantages(self, scored: list[Scored], rewards: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
        """(advantages, returns) of each piece; a prompt's replies may lie in several pieces, and are all on this rank."""
        ppo, masks = self.config.ppo, [piece.rollouts.mask for piece in scored]
        if ppo.advantage == "gae":
            return [gae(r, piece.values, mask, ppo.gamma, ppo.lam) for r, piece, mask in zip(rewards, scored, masks, strict=True)]
        totals = torch.cat([r.sum(dim=1) for r in rewards])
        prompts = torch.cat([piece.rollouts.keys[:, 0] for piece in scored])
        if ppo.advantage == "reinforce":
            found = reinforce(totals, self.engine.sum_over_ranks)
        else:
            found = {"rloo": rloo, "grpo": grpo}[ppo.advantage](totals, prompts)
        parts = found.split([len(mask) for mask in masks])
        return [(on_tokens(part, mask), torch.zeros(mask.shape)) for part, mask in zip(parts, masks, strict=True)]

    def _k3_per_token(self, scored: list[Scored], old: list[Tensor]) -> dict[str, float]:
        """KL to the reference by the estimator that is never negative, beside `kl_per_token`, which is k1."""
        reference, mask = join_rows([piece.reference for piece in scored]), join_rows([piece.rollouts.mask for piece in scored])
        return {"kl_k3_per_token": float(masked_mean(k3(join_rows(old), reference), mask, self.engine.sum_over_ranks))}

    def _whitened(self, advantages: list[Tensor], rollouts: list[Rollouts]) -> list[Tensor]:
        if not self.config.ppo.whiten:
            return advantages
        whole = whiten(join_rows(advantages), join_rows([r.mask for r in rollouts]), self.engine.sum_over_ranks)
        rows = whole.split([len(a) for a in advantages])
        return [row[:, : a.shape[1]].clone() for row, a in zip(rows, advantages, strict=True)]

    @off_device
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
        if self.version is not None:
            self.sent = [*self.sent[-1:], self.engine.snapshot(self.version)]
        share = Experience.join(experience)
        totals: dict[str, float] = {}
        first: dict[str, float] = {}
        batches = minibatches(share, ppo.epochs, ppo.minibatches, (self.config.seed, step, self.spec.rank))
        tokens = torch.zeros(2, dtype=torch.float64)
        for number, minibatch in enumerate(batches):
            tokens += spent(minibatch, self.most)
            extra = pretraining[number] if ppo.ptx > 0 else None
            found = self._learn(minibatch, extra, lr_scale * warmed_up(ppo.lr, step, ppo.warmup))
            if number == 0:  # before any update of this step: the ratio must still be 1
                first = {f"first_{name.removeprefix('update_')}": found[name] for name in ("clip_share", "update_kl", "log_ratio_max")}
            totals = {name: totals.get(name, 0.0) + value for name, value in found.items()}
        self.version = None
        steps = ppo.epochs * ppo.minibatches
        padding = {"learning_padding": padding_share(self.engine.sum_over_ranks(tokens))}
        return first | {name: value / steps for name, value in totals.items()} | padding

    def _learn(self, minibatch: Experience, extra: Dialogues | None, lr: float) -> dict[str, float]:
        ppo, device = self.config.ppo, self.engine.device
        tokens = float(self.engine.sum_over_ranks(minibatch.mask.sum().float()))
        names = ("policy_loss", "clip_share", "dual_clip_share", "update_kl", "entropy", "importance_mean", "importance_truncated")
        sums, largest = torch.zeros(1 + len(names)), torch.zeros(1)  # the objective, then the figures

        def loss(rows: Experience) -> Tensor:
            rows = rows.to(device)
            logprobs, spread = self._current(rows)
            weights, truncated = importance_weights(rows.old_logprobs, rows.behaviour, rows.mask, ppo.importance_cap)
            found = policy_loss(logprobs, rows.old_logprobs, rows.advantages, rows.mask, ppo.clip, tokens, ppo.dual_clip, weights)
            entropy, weight, cut = (masked_sum(x, rows.mask) / tokens for x in (spread, weights, truncated.to(weights.dtype)))
            described = [found.loss, found.clipped, found.dual_clipped, found.kl, entropy, weight, cut]
            largest.copy_(torch.maximum(largest, torch.where(rows.mask, (logprobs.detach() - rows.old_logprobs).abs(), 0).max().cpu()))
            objective = found.loss - ppo.entropy * entropy if ppo.entropy > 0 else found.loss
            return torch.stack([objective, *(figure.detach().to(objective) for figure in described)])

        losses: list[tuple[Callable[[Any], Tensor], Batch]] = [(loss, minibatch)]
        if extra is not None:
            losses.append((self._ptx(float(self.engine.sum_over_ranks(extra.mask.sum().float()))), extra))
        norm = optimizer_step(self.engine, losses, self.most, lr, sums)
        found = dict(zip(names, self.engine.sum_over_ranks(sums[1:]).tolist(), strict=True))
        return found | {"log_ratio_max": self._ranks().largest(largest), "policy_grad_norm": norm, "policy_lr": lr}

    def _ptx(self, tokens: float):
        """PPO-ptx (InstructGPT, equation 2): gamma times the language-modelling loss, in the same accumulated gradient."""

        def loss(rows: Dialogues) -> Tensor:
            rows = rows.to(self.engine.device)
            return self.config.ppo.ptx * language_loss(self._current(rows)[0], rows.mask, tokens)

        return loss

    @off_device
    def weight_table(self) -> dict[str, Weight]:
        """What is sent, in its order."""
        return self.plain

    def send_weights(self, version: int, route: Route) -> None:
        """All weights to the rollout engines; every rank must call, and rank 0 sends. What is trained of the version before is kept, to be
        able to go back.

        Raises:
            WeightSyncError: an engine died, or stood still for `route.seconds`.
        """
        stream = self.ends.sender(route, version, total_bytes(self.plain)) if self.spec.rank == 0 else None
        try:
            send_all(self.plain, self.engine.gatherer(on_device=route.way in ("cuda_ipc", "nccl")), stream)
        finally:
            if stream is not None:
                stream.close()
        self._remember(version)

    @off_device
    def bucket_count(self) -> int:
        """In how many buckets the weights go through the object store."""
        return len(self.buckets)

    def weights(self, version: int, bucket: int = 0) -> WeightUpdate | None:
        """One bucket of the weights, for the object store; every rank must call for every bucket, and rank 0 is given it. With the last,
        what `send_weights` keeps is kept."""
        gather = self.engine.gatherer()
        found = {name: self.plain[name].gathered(gather) for name in self.buckets[bucket]}
        if bucket == len(self.buckets) - 1:
            self._remember(version)
        if self.spec.rank > 0:
            return None
        return pack({name: tensor for name, tensor in found.items() if tensor is not None}, version, bucket, len(self.buckets))

    def _remember(self, version: int) -> None:
        """The weights are of this version. Their snapshot waits until they change: engines need not wait for it."""
        self.sent, self.version = self.sent[-1:], version

    def _before(self) -> Snapshot | None:
        """This rank's share of the weights sent before the last ones; the last, where none were; None while those are still in place."""
        return next(iter(self.sent if self.version is None else self.sent[-1:]), None)

    def go_back(self) -> int:
        """Take back the weights sent before the last ones, for export and not for training on; returns their version."""
        before = self._before()
        if before is None:
            assert self.version is not None, "going back is from weights that were sent"
            return self.version
        self.engine.restore(before)
        return before.version

    def save_state(self, folder: str) -> None:
        """Resume state: the engine's, and the weights to go back to."""
        self.engine.save_state(Path(folder))
        if before := self._before():
            save_snapshot(before, Path(folder) / BEFORE_FOLDER)

    def load_state(self, folder: str) -> None:
        """The inverse of `save_state`, by any number of ranks."""
        self.engine.load_state(Path(folder))
        before = self.engine.load_snapshot(Path(folder) / BEFORE_FOLDER)
        self.sent = [before] if before else []

    def export(self, folder: str) -> None:
        export(self.config, self.engine, Path(folder))
