"""Stage 4, PPO: the loop.

    prompts -> rollout.generate -> rollouts -+-> reward.score --------+
                                             +-> reference.logprobs --+-> policy.experience -> policy.update || critic.update
                                             +-> critic.values -------+          |
                                             +-> (policy's own log-probs) -------+
    then policy.weights -> rollout.load_weights, and a commit every `commit.every` steps

The driver passes references to pieces of a micro-batch's size; it never holds a tensor of them. What runs in parallel is whatever has
its inputs: scores, reference log-probs and values together, then both updates together.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace
from typing import Any


from actors.algorithms.kl import KLController
from actors.batch import Dialogues, Prompts, Rollouts
from actors.language_task import step_rows
from actors.rollout import Sampling
from actors.weight_sync import WeightUpdate
from orchestration import roles
from orchestration.data.fitting import fitting_prompts
from orchestration.errors import RequestError
from orchestration.roles import Roles
from orchestration.runtime.dispatch import Pieces, cut
from orchestration.stages.context import StageContext


def run(context: StageContext) -> dict[str, Any]:
    """Returns the last step's figures, and why the loop ended."""
    sft, reward = str(context.input("sft")), str(context.input("reward_model"))
    prompts, pretraining = _prompts(context), _pretraining(context)
    checkpoints = {"policy": sft, "critic": reward, "reference": sft, "reward": reward, "rollout": sft}
    context.metrics.begin("ppo", context.config.ppo.steps)
    started = roles.start(context.runtime, context.config, checkpoints)
    try:
        return Loop(context, started, prompts, pretraining).run()
    finally:
        context.runtime.stop()


@dataclass
class Loop:
    """State of the loop: everything else lives in the roles."""

    context: StageContext
    roles: Roles
    prompts: Prompts
    pretraining: Dialogues | None
    current: Pieces[WeightUpdate] | None = None
    """The weights that the rollout engines sample with."""
    previous: Pieces[WeightUpdate] | None = None
    """Those before."""

    def __post_init__(self) -> None:
        self.config, self.ppo, self.runtime = self.context.config, self.context.config.ppo, self.context.runtime
        kl = self.ppo.kl
        self.controller = KLController(kl.beta, kl.controller == "adaptive", kl.target, kl.horizon)
        self.together = math.lcm(*roles.rank_counts(self.config))

    def run(self) -> dict[str, Any]:
        figures: dict[str, float] = {}
        stopped_by = "steps"
        start = self.resume()
        for step in range(start, self.ppo.steps):
            began = time.perf_counter()
            rollouts = self.sample(step)
            figures, within = self.learn(rollouts, step)
            if not within:
                stopped_by = "kl_budget"
                break
            figures |= {"seconds": time.perf_counter() - began}
            figures["tokens_per_second"] = figures["tokens"] / figures["seconds"]
            self.context.directory.append({"step": step + 1, **figures})
            self.context.metrics.record(step + 1, figures)
            if (step + 1) % self.config.commit.every == 0 and step + 1 < self.ppo.steps:
                self.commit(step + 1)
        self.export()
        return {"kl": figures.get("kl", 0.0), "kl_budget": self.ppo.kl.budget, "score": figures.get("score", 0.0), "stopped_by": stopped_by}

    def sample(self, step: int) -> Pieces[Rollouts]:
        """This step's prompts and one reply to each."""
        index = step_rows(self.prompts.lengths, self.ppo.batch, step, self.config.seed, pool=1)
        pieces = cut(self.prompts.select(index), self.together, self.config.engine.micro_batch)
        sampling = Sampling(self.ppo.temperature, self.ppo.max_new_tokens, self.config.seed, step)
        return self.roles.rollout.generate(self.runtime.put(pieces), sampling)

    def learn(self, rollouts: Pieces[Rollouts], step: int) -> tuple[dict[str, float], bool]:
        """Score the rollouts, shape rewards, update both models, and give the engines the new weights.

        Returns:
            The step's figures, and whether the samples' KL was within the budget. If it was not, the policy is back at the weights before
            those that made the samples.
        """
        began = time.perf_counter()
        self.runtime.wait(rollouts, what=f"replies of PPO step {step + 1}")
        sampled = time.perf_counter()
        scores = self.roles.reward.score(rollouts)
        reference = self.roles.reference.logprobs(rollouts, self.ppo.temperature)
        values = self.roles.critic.values(rollouts)
        experience = self.roles.policy.experience(rollouts, scores, reference, values, self.controller.beta)
        self.runtime.wait(scores, reference, values, experience, what=f"scores, log-probs and values of PPO step {step + 1}")
        scored = time.perf_counter()
        policy = self.roles.policy.update(experience, self.runtime.put(self.pretraining_of(step)), step)
        critic = self.roles.critic.update(experience, step)
        figures = self.runtime.get(policy, f"the policy's update of PPO step {step + 1}")[0]
        figures |= self.runtime.get(critic, f"the critic's update of PPO step {step + 1}")[0]
        if figures["kl"] > self.ppo.kl.budget:
            within = self.previous or self.current
            assert within is not None
            self.runtime.wait(self.roles.policy.restore(within), what="the policy to go back within the KL budget")
            return figures, False
        figures["beta"] = self.controller.beta
        self.controller = self.controller.updated(figures["kl"], self.ppo.batch)
        learned = time.perf_counter()
        self.sync(step + 1)
        seconds = {"rollout": sampled - began, "scoring": scored - sampled, "learning": learned - scored, "sync": time.perf_counter() - learned}
        return figures | {f"seconds_{phase}": value for phase, value in seconds.items()}, True

    def sync(self, version: int) -> None:
        """The policy's weights to every rollout engine. Those before are kept until the new ones' KL is known."""
        self.previous, self.current = self.current, self.roles.policy.weights(version)
        self.runtime.wait(self.roles.rollout.load_weights(self.current), what=f"rollout engines to load weights of version {version}")

    def pretraining_of(self, step: int) -> list[list[Dialogues]]:
        """For each policy rank, one batch of dialogues per optimizer step (PPO-ptx)."""
        ranks = self.config.placement.policy.ranks
        if self.pretraining is None:
            return [[] for _ in range(ranks)]
        found: list[list[Dialogues]] = [[] for _ in range(ranks)]
        updates = self.ppo.epochs * self.ppo.minibatches
        for update in range(updates):
            index = step_rows(self.pretraining.lengths, self.ppo.ptx_batch, step * updates + update, self.config.seed)
            for rank in range(ranks):
                found[rank].append(self.pretraining.select(index[rank::ranks]).trimmed())
        return found

    def resume(self) -> int:
        """Go on from the last commit; returns the step to run next."""
        point = self.context.directory.last()
        self.context.directory.forget_after(point.step if point else 0)
        if point is None:
            self.sync(0)
            return 0
        loaded = (self.roles.policy.load_state(str(point.folder / "policy")), self.roles.critic.load_state(str(point.folder / "critic")))
        self.runtime.wait(*loaded, what=f"policy and critic to load the commit of step {point.step}")
        self.controller = replace(self.controller, beta=point.memory["beta"])
        self.sync(point.step)
        return point.step

    def commit(self, step: int) -> None:
        """Everything a resume needs: both engines with their optimizers, and beta. Prompts and samples follow from seed and step."""
        folder = self.context.directory.begin_state(step)
        saved = (self.roles.policy.save_state(str(folder / "policy")), self.roles.critic.save_state(str(folder / "critic")))
        self.runtime.wait(*saved, what=f"the commit of PPO step {step}")
        self.context.directory.seal_state(step, {"beta": self.controller.beta})

    def export(self) -> None:
        """The policy in Hugging Face form, with its tokenizer and template."""

        def save(folder: Any) -> None:
            self.runtime.wait(self.roles.policy.export(str(folder)), what="the policy's export")
            self.context.chat.save(folder)

        self.context.directory.export(save)


def _prompts(context: StageContext) -> Prompts:
    """All prompts that leave room for a reply, encoded once; the key of a prompt is its place among them."""
    config, chat = context.config, context.chat
    room = context.longest - config.ppo.max_new_tokens
    fitting, _ = fitting_prompts(context.corpus.prompts, chat, room)
    if len(fitting) < config.ppo.batch:
        raise RequestError(
            f"ppo.batch={config.ppo.batch}: only {len(fitting)} of {len(context.corpus.prompts)} prompts leave room for "
            f"ppo.max_new_tokens={config.ppo.max_new_tokens}; lower ppo.batch, or give more prompts"
        )
    return chat.prompts(fitting, [(number, 0) for number in range(len(fitting))])


def _pretraining(context: StageContext) -> Dialogues | None:
    if context.config.ppo.ptx == 0:
        return None
    longest = context.longest
    fitting = [d for d in context.corpus.demonstrations[:4096] if len(context.chat.encode(d)[0]) <= longest]
    return context.chat.dialogues(fitting)

