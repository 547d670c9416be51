"""Settings of stage `ppo`, in the style of schema.py."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Gt, Le
from pydantic import Field

from conf.rewards import ModelReward, RewardSource
from conf.settings import Count, NotNegative, Positive, Settings, Share, Whole


@dataclass(frozen=True)
class KL(Settings):
    """The leash to the reference."""

    controller: Literal["fixed", "adaptive"]
    """`fixed`: beta stays. `adaptive`: beta follows the target (Ziegler et al. 1909.08593, 2.2)."""
    beta: NotNegative
    """Weight of the per-token penalty log pi - log pi_ref in the reward; the adaptive controller starts from it."""
    target: Positive
    """KL per reply, in nats, that the adaptive controller aims at."""
    horizon: Positive
    """Replies over which the adaptive controller corrects."""
    budget: Positive
    """KL per reply, in nats, that a result must stay within; `ppo.guard` says what happens above it."""


@dataclass(frozen=True)
class Guard(Settings):
    """What happens when the KL per reply is above `ppo.kl.budget`."""

    action: Literal["stop", "rollback", "off"]
    """`stop`: the run ends with the last weights within the budget. `rollback`: policy and critic go back to the last commit, optimizers
    included, beta is raised, and the run goes on; after `times` of it, `stop`. `off`: nothing but a warning."""
    beta_factor: Annotated[float, Gt(1)]
    """Beta is multiplied by this at each rollback."""
    lr_factor: Annotated[float, Gt(0), Le(1)]
    """The policy's learning rate too: near the reference KL is 0, and beta alone would change nothing."""
    times: Count
    """Rollbacks in one run at most."""


@dataclass(frozen=True)
class Judge(Settings):
    """Replies to held-out prompts, scored now and then: what the policy is worth where it does not learn."""

    every: Whole
    """Steps between measurements, the first and the last weights included; 0: none."""
    prompts: Count
    """Held-out prompts, the same each time."""


@dataclass(frozen=True)
class PPO(Settings):
    """Proximal policy optimisation against the reward model (Schulman et al. 1707.06347; InstructGPT 2203.02155)."""

    steps: Count
    """Iterations: sample, score, learn."""
    batch: Count
    """Replies per iteration, over all ranks."""
    staleness: Whole
    """Updates that the weights that sample may be behind those that learn. 0: sample, then learn. From 1: engines sample so many batches
    ahead while policy and critic learn; needs `importance_cap`, and roles that do not take turns. Above 1 it evens out long replies."""
    waves: Count
    """Parts that a batch is sampled in: the first is scored while the second is sampled. 1: all replies first. Above 1 needs roles that do
    not take turns; of use where engines and the roles that score have devices of their own. No result depends on it."""
    advantage: Literal["gae", "rloo", "grpo", "reinforce"]
    """`gae`: from the values of a critic. The others need none: a reply's score less its KL penalty is compared with the other replies to
    its prompt (`rloo`, `grpo`) or with the batch (`reinforce`); algorithms/baselines.py."""
    samples_per_prompt: Count
    """Replies to each prompt; divides `batch`. `rloo` and `grpo` need two or more, and whole prompts on each policy rank."""
    minibatches: Count
    """Optimizer steps per epoch; divides `batch`."""
    epochs: Count
    """Passes over each batch (InstructGPT: 1)."""
    lr: Positive
    """Policy learning rate after warm-up; constant."""
    critic_lr: Positive
    """Critic learning rate after warm-up; constant."""
    warmup: Whole
    """Iterations of linear learning-rate warm-up from one tenth."""
    kl: KL
    """The leash to the reference."""
    guard: Guard
    """When the leash does not hold."""
    judge: Judge
    """Measuring on held-out prompts during the run."""
    gamma: Annotated[float, Gt(0), Le(1)]
    """Discount per token (`advantage=gae`)."""
    lam: Share
    """GAE's lambda (`advantage=gae`)."""
    clip: Positive
    """Ratio clip: the objective is flat outside 1 +- clip."""
    dual_clip: Annotated[float, Gt(1)] | None
    """Where the advantage is negative, the ratio counts as this at most (Ye et al. 1912.09729); above 1 + `clip`. null: no limit."""
    entropy: NotNegative
    """Weight of the entropy bonus, nats per token, in the policy loss."""
    old_logprobs: Literal["trainer", "behaviour"]
    """`trainer`: the policy's own, one more forward pass over the batch. `behaviour`: those of the engine that sampled stand in, if its
    weights are the policy's and its gap on each rank's first piece is within `engine_gap_limit`; if not, that step takes the trainer's."""
    engine_gap_limit: NotNegative
    """Mean |old - behaviour|, nats per token, up to which `old_logprobs=behaviour` is followed."""
    importance_cap: Positive | None
    """Truncated importance sampling: a token's loss is weighted by min(exp(old - behaviour), this); algorithms/importance.py. null: 1."""
    value_clip: Positive
    """Clip of the value's move from the value at sampling time."""
    whiten: bool
    """Whiten advantages over all reply tokens of the batch."""
    rewards: tuple[Annotated[RewardSource, Field(discriminator="kind")], ...]
    """What scores the replies: their weighted sum is the score. Empty: this run's own reward model alone."""
    reward_normalise: Literal["none", "running"]
    """`running`: scores minus the mean, over the standard deviation, of all scores of this run so far; before the clip."""
    reward_clip: Positive
    """Scores are clipped to +- this before shaping, after `reward_normalise`."""
    missing_end_penalty: NotNegative
    """Taken from the score of a reply that did not end by itself, after the clip."""
    temperature: Positive
    """Sampling temperature; the same in old, current and reference log-probs."""
    max_new_tokens: Count
    """Longest reply."""
    ptx: NotNegative
    """Weight of the language-modelling loss on pretraining text in each policy step (PPO-ptx; InstructGPT's gamma: 27.8)."""
    ptx_batch: Count
    """Blocks of text, as long as the context, in that loss per optimizer step, over all ranks; counts when `ptx` is above 0."""
    weight_decay: NotNegative
    """AdamW's decay, policy and critic."""
    adam_epsilon: Positive
    """AdamW's epsilon (the reference reproductions use 1e-5)."""
    max_grad_norm: Positive
    """Gradient norm above which gradients are scaled down."""

    def has_critic(self) -> bool:
        """Whether there is a critic: otherwise its role is not started, and its settings do nothing."""
        return self.advantage == "gae"

    def compares_replies(self) -> bool:
        """Whether the replies to one prompt are compared with each other, and so must be several, on one rank."""
        return self.advantage in ("rloo", "grpo")

    def sources(self) -> tuple[RewardSource, ...]:
        """What scores the replies: `rewards`, or the run's own reward model."""
        return self.rewards or (ModelReward("model"),)

    def uses_reward_model(self) -> bool:
        """Whether the run's own reward model is among them."""
        return any(isinstance(source, ModelReward) and source.path is None for source in self.sources())
