"""What PPO measures on text that it does not learn from: replies to held-out prompts during the run, and the reward model's zero.

Nothing is learned from these figures and nothing is selected on them: an exact grade may be among them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from actors.batch import Comparisons, Rollouts
from actors.sampling import Sampling
from orchestration.data.comparisons import demonstrated
from orchestration.data.dialogues import Dialogue
from orchestration.data.fitting import fitting_prompts
from orchestration.errors import RequestError
from orchestration.roles import Roles
from orchestration.runtime.dispatch import cut
from orchestration.stages.context import StageContext
from orchestration.stages.rewarding import Rewarding, moments_of_scores
from orchestration.stages.sampling import Sampler

JUDGED = 2**31 + 800_001
"""Number for the sampling key that no other stage uses; the same at every measurement, so that only the weights differ."""


@dataclass(frozen=True)
class Judge:
    """Held-out prompts and who scores the replies."""

    context: StageContext
    roles: Roles
    together: int
    prompts: list[Dialogue]
    first_key: int
    """Number of the first prompt in the keys of its rollouts: those before are PPO's own."""

    def measure(self, step: int) -> dict[str, float]:
        """A point of the curve, for the weights that the engines hold: KL to the reference in nats per reply and its square root, the
        reward model's mean score, reply length; with `ppo.rewards` each source's mean, `score_<name>`; with an exact grade its mean,
        `gold`, and that mean's standard error."""
        context, ppo = self.context, self.context.config.ppo
        runtime, count = context.runtime, len(self.prompts)
        sampler = Sampler(runtime, self.roles, context.chat, self.together, context.config.engine.micro_batch)
        sampling = Sampling(ppo.temperature, ppo.max_new_tokens, context.config.seed, JUDGED)
        pieces = sampler.rollouts(self.prompts, [(self.first_key + number, 0) for number in range(count)], sampling)
        given = self.roles.reward.score(pieces), self.roles.policy.logprobs(pieces), self.roles.reference.logprobs(pieces, ppo.temperature)
        rollouts = sampler.fetch(pieces, count, "replies to the judge's prompts")
        scores, policy, reference = (runtime.get(piece, "scores and log-probs of the judge's replies") for piece in given)
        kl = float(_per_reply(policy, count).sub(_per_reply(reference, count)).mean())
        found = {"step": float(step), "kl": kl, "sqrt_kl": math.sqrt(max(kl, 0.0)), "score": float(torch.cat(scores)[:count].mean())}
        if ppo.rewards:  # over all ranks' rows, those that fill up the last piece included
            found |= moments_of_scores(runtime, self.roles)[1]
        found["reply_tokens"] = float(rollouts.mask.sum(dim=1).float().mean())
        if context.shared.grades is not None:
            grades = np.array(context.shared.grades(self.prompts, sampler.replies(rollouts), rollouts.finished.tolist()))
            found |= {"gold": float(grades.mean()), "gold_error": float(grades.std() / math.sqrt(count))}
        return found


def _per_reply(pieces: list[torch.Tensor], count: int) -> torch.Tensor:
    return torch.cat([piece.sum(dim=1) for piece in pieces])[:count]


def judge_prompts(context: StageContext) -> list[Dialogue]:
    """Unseen prompts, where possible none of those that the result is evaluated on; none without a judge.

    Raises:
        RequestError: there are none, or none leaves room for a reply.
    """
    ppo, corpus = context.config.ppo, context.corpus
    wanted = (corpus.comparison_prompts or corpus.judge_prompts) if ppo.judge.every else []
    fitting, _, _ = fitting_prompts(wanted, context.chat, context.longest - ppo.max_new_tokens)
    if ppo.judge.every and not fitting:
        raise RequestError(
            f"ppo.judge.every={ppo.judge.every}: of {len(wanted)} held-out prompts none leaves room for ppo.max_new_tokens="
            f"{ppo.max_new_tokens}; hold some out (data.heldout), lower ppo.max_new_tokens, or set ppo.judge.every=0"
        )
    return fitting[: ppo.judge.prompts]


def demonstration_score(context: StageContext, roles: Roles, together: int) -> float | None:
    """Mean score, as PPO's reward ranks give it, of the demonstrations that set the reward model's zero.

    None where there is no such zero: rewards of other kinds, reward models that this run has not trained, and those of another tokenizer,
    which are asked by prompt and not by tokens.
    """
    longest = context.run.results().get("reward_model", {}).get("demonstrations_up_to")
    if longest is None or context.config.reward_checkpoint or context.config.ppo.rewards or Rewarding(context).encoders:
        return None
    shown = demonstrated(context.corpus.demonstrations, context.chat, longest)
    filled = as_rollouts(shown.select([*range(len(shown)), *[0] * (-len(shown) % together)]))
    pieces = context.runtime.put(cut(filled, together, context.config.engine.micro_batch))
    scores = context.runtime.get(roles.reward.score(pieces), "scores of demonstrations")
    return float(torch.cat(scores)[: len(shown)].mean())


def as_rollouts(rows: Comparisons) -> Rollouts:
    """Answers as if they had been sampled, for roles that take rollouts."""
    count = len(rows)
    keys = torch.stack([torch.arange(count), torch.zeros(count, dtype=torch.long)], dim=1)
    ended, version = torch.ones(count, dtype=torch.bool), torch.zeros(count, dtype=torch.long)
    return Rollouts(rows.tokens, rows.lengths, rows.mask, torch.zeros(rows.tokens.shape), ended, keys, version)
