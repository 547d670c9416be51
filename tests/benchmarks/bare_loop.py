"""The floor: the arithmetic of one PPO iteration in a plain PyTorch loop, in one process, without Ray, DeepSpeed or any of chatray's roles.

    python -m tests.benchmarks.bare_loop <prepared folder> fp32 --steps 3

Generation with the same sampler and its key-value cache, one pass each for scores, reference log-probs and values (the engine's log-probs
are the old ones, as in TRL), GAE, and epochs x minibatches with AdamW for policy, then critic, over micro-batches of similar length. Logits
are made for replies alone and kept for the backward pass.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from actors.algorithms.gae import gae, shape_rewards
from actors.algorithms.kl import k1
from actors.algorithms.masking import alone, whiten
from actors.algorithms.ppo import policy_loss, value_loss
from actors.batch import Experience, Prompts, Rollouts, join_rows, pad_rows
from actors.language_task import step_rows
from actors.learning import minibatches
from actors.models import ScalarModel, at_last, before_each, load_causal_lm, load_scalar_model
from actors.rollout_transformers import TransformersEngine
from actors.sampling import Sampling
from actors.sharding import BETAS
from tests.benchmarks.step_time.settings import Setting, load
from tests.benchmarks.step_time.turns import EndedError, Turns

Loss = Callable[[Experience, float], Tensor]
"""Of a micro-batch, over the minibatch's tokens."""


@dataclass
class BareLoop:
    """Models, optimizers and prompts."""

    setting: Setting
    folder: Path
    dtype: str
    phases: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        torch.set_num_threads(self.setting.threads)
        self.device = torch.device(self.setting.device)
        lm, rm = str(self.folder / "lm"), str(self.folder / "rm")
        self.policy, self.reference, self.sampler = (load_causal_lm(lm).eval().to(self.device) for _ in range(3))
        self.critic, self.reward = (load_scalar_model(rm, 0).eval().to(self.device) for _ in range(2))
        for frozen in (self.reference, self.reward):
            frozen.requires_grad_(False)
        end = self.sampler.generation_config.eos_token_id
        self.engine = TransformersEngine(self.sampler, int(end), self.device)
        how: dict[str, Any] = {"lr": self.setting.lr, "betas": BETAS, "eps": 1e-5, "weight_decay": 0.0}
        self.optimizers = [torch.optim.AdamW(model.parameters(), **how) for model in (self.policy, self.critic)]
        prompts = json.loads((self.folder / "prompts.json").read_text(encoding="utf-8"))
        tokens, lengths = pad_rows([prompt["tokens"] for prompt in prompts])
        self.prompts = Prompts(tokens, lengths, torch.tensor([(number, 0) for number in range(len(prompts))]))

    def step(self, number: int) -> dict[str, float]:
        """One iteration; returns its figures and the seconds of each phase."""
        began = time.perf_counter()
        with self.timed("rollout"):
            rollouts = self._replies(number)
        with self.timed("scoring"):
            experience, figures = self._experience(rollouts)
        with self.timed("policy"):
            self._learn(self._policy_loss, self.optimizers[0], experience, number)
        with self.timed("critic"):
            self._learn(self._value_loss, self.optimizers[1], experience, number)
        with self.timed("sync"):
            self._copy()
        return figures | {"seconds": time.perf_counter() - began} | {f"seconds_{name}": spent for name, spent in self.phases.items()}

    @contextlib.contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.phases[phase] = time.perf_counter() - began

    @torch.no_grad()
    def _copy(self) -> None:
        for mine, learned in zip(self.sampler.parameters(), self.policy.parameters(), strict=True):
            mine.copy_(learned)

    def _precision(self) -> contextlib.AbstractContextManager:
        return torch.autocast(self.device.type, torch.bfloat16) if self.dtype == "bf16" else contextlib.nullcontext()

    def _replies(self, number: int) -> Rollouts:
        index = step_rows(self.prompts.lengths, self.setting.prompts, number, 0, pool=1)  # in ours' order: then minibatches are the same
        return self.engine.generate(self.prompts.select(index), Sampling(1.0, self.setting.limit, 0, number))

    @torch.no_grad()
    def _experience(self, rollouts: Rollouts) -> tuple[Experience, dict[str, float]]:
        order = rollouts.lengths.argsort(stable=True)
        scores, reference, values = [], [], []
        for part in order.split(self.setting.micro_batch):
            piece = rollouts.select(part).trimmed().to(self.device)
            with self._precision():
                scores.append(at_last(self.reward(piece.tokens), piece.lengths).cpu())
                reference.append(self._logprobs(self.reference, piece)[0].cpu())
                values.append(self._values(piece).cpu())
        back = order.argsort()
        score, reference_logprobs, value = torch.cat(scores)[back], join_rows(reference)[back], join_rows(values)[back]
        kl = k1(rollouts.behaviour, reference_logprobs)
        penalty = 1.0 if self.setting.ends else 0.0
        rewards = shape_rewards(score, kl, rollouts.mask, self.setting.beta, 10.0, rollouts.finished, penalty)
        advantages, returns = gae(rewards, value, rollouts.mask, 1.0, 0.95)
        advantages = whiten(advantages, rollouts.mask, alone)
        experience = Experience(
            rollouts.tokens, rollouts.lengths, rollouts.mask, rollouts.behaviour, value, advantages, returns, rollouts.behaviour
        )
        replies = rollouts.mask.sum(dim=1).float()
        kl_per_reply = (kl * rollouts.mask).sum(dim=1).mean()
        return experience, {"score": float(score.mean()), "kl": float(kl_per_reply), "reply_tokens": float(replies.mean())}

    def _logprobs(self, lm: nn.Module, rows: Rollouts | Experience) -> tuple[Tensor, Tensor]:
        """[B, T] log-probs of the replies' tokens, and [N] entropies."""
        places = torch.arange(rows.tokens.shape[1], device=self.device).expand_as(rows.tokens)
        hidden = lm.base_model(input_ids=rows.tokens, position_ids=places, use_cache=False).last_hidden_state  # type: ignore[operator]
        logits = lm.get_output_embeddings()(hidden[:, :-1][rows.mask[:, 1:]]).float()  # type: ignore[operator]
        logprobs = torch.log_softmax(logits, dim=-1)
        picked = logprobs.gather(-1, rows.tokens[:, 1:][rows.mask[:, 1:]][:, None])[:, 0]
        with torch.no_grad():
            entropy = -(logprobs.exp() * logprobs).sum(-1)
        return torch.zeros(rows.tokens.shape, device=self.device).masked_scatter(rows.mask, picked), entropy

    def _values(self, rows: Rollouts | Experience) -> Tensor:
        critic: ScalarModel = self.critic
        return before_each(critic(rows.tokens), rows.mask)

    def _policy_loss(self, rows: Experience, tokens: float) -> Tensor:
        with self._precision():
            logprobs, _ = self._logprobs(self.policy, rows)
        return policy_loss(logprobs, rows.old_logprobs, rows.advantages, rows.mask, 0.2, tokens).loss

    def _value_loss(self, rows: Experience, tokens: float) -> Tensor:
        with self._precision():
            values = self._values(rows)
        return value_loss(values, rows.old_values, rows.returns, rows.mask, 0.2, tokens)

    def _learn(self, loss: Loss, optimizer: torch.optim.Optimizer, experience: Experience, number: int) -> None:
        for minibatch in minibatches(experience, self.setting.epochs, self.setting.minibatches, (0, number, 0)):
            tokens = float(minibatch.mask.sum())
            for part in minibatch.lengths.argsort(stable=True).split(self.setting.micro_batch):
                rows = minibatch.select(part).trimmed()
                loss(rows.to(self.device), tokens).backward()
            optimizer.step()
            optimizer.zero_grad()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="as `step_time.prepared` leaves it")
    parser.add_argument("dtype", choices=("fp32", "bf16"))
    parser.add_argument("--steps", type=int, default=0, help="print so many steps; 0: take turns over pipes")
    wanted = parser.parse_args()
    turns = Turns() if not wanted.steps else None
    loop = BareLoop(load(wanted.folder), wanted.folder, wanted.dtype)
    try:
        for number in range(wanted.steps or 1_000_000):
            found = loop.step(number)
            if turns:
                turns.hand_over(found)
            else:
                print(json.dumps({name: round(value, 4) for name, value in found.items()}), flush=True)
    except EndedError:
        pass


if __name__ == "__main__":
    main()
