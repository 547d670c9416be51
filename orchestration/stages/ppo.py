"""Stage 4, PPO: the loop.

    prompts -> rollout.generate -> rollouts -+-> reward.score --------+
                                             +-> reference.logprobs --+-> policy.experience -> policy.update || critic.update
                                             +-> critic.values -------+          |
                                             +-> (policy's own log-probs) -------+
    then policy.send_weights -> rollout.receive_weights, and a commit every `commit.every` steps, and when the run is asked to stop

    ahead    with `ppo.staleness` the engines are asked for the next batches before this one is learned from
    waves    with `ppo.waves` a part of the batch is scored while the next is sampled
    watch    checks of each step's samples and of the first update, illnesses, the curve of the held-out judge
    guard    above the KL budget: stop with the weights before, or go back to a commit and on with a higher beta

The critic is there for `ppo.advantage=gae` alone.

The driver passes references to pieces of a micro-batch's size; it never holds a tensor of them. What runs in parallel is whatever has
its inputs: scores, reference log-probs and values together, then both updates together.
"""

from __future__ import annotations

import math
import time
from dataclasses import asdict, dataclass, replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from actors.algorithms.kl import KLController
from actors.algorithms.running import Moments
from actors.batch import Dialogues, Experience, Prompts, Rollouts
from actors.language_task import step_rows
from actors.sampling import Sampling
from orchestration import roles, stopping
from orchestration.data.dialogues import Dialogue
from orchestration.data.fitting import fitting_prompts
from orchestration.data.text import blocks, validation_and_test
from orchestration.errors import RequestError
from orchestration.roles import CriticGroup, PolicyGroup, Roles
from orchestration.run_directory import ResumePoint
from orchestration.runtime.balancing import balanced, balanced_order
from orchestration.runtime.dispatch import Pieces, by_rank, cut, gathered, waves_of
from orchestration.stages.ahead import Ahead
from orchestration.stages.context import StageContext
from orchestration.stages.guarding import KLGuard
from orchestration.stages.judging import Judge, demonstration_score, judge_prompts
from orchestration.stages.rewarding import Rewarding, moments_of_scores
from orchestration.stages.syncing import WeightSync
from orchestration.stages.tracing import Tracing
from orchestration.stages.watching import Watch

MEASURED_BLOCKS = 256
"""Blocks of held-out pretraining text that the SFT model and the result are measured on."""


def run(context: StageContext) -> dict[str, Any]:
    """Returns the last step's figures, and why the loop ended; with held-out text, both models' loss on it."""
    sft, rewarding = str(context.input("sft")), Rewarding(context)
    prompts, fitting, lost = _prompts(context)
    judged_on = judge_prompts(context)
    checkpoints = {"policy": sft, "reference": sft, "reward": rewarding.checkpoint, "rollout": sft}
    checkpoints |= {"critic": rewarding.critic} if context.config.ppo.has_critic() else {}
    context.metrics.begin("ppo", context.config.ppo.steps)
    started = roles.start(context.runtime, context.config, checkpoints)
    try:
        rewarding.prepare(started, [*fitting, *judged_on])
        with stopping.commits_first():
            return Loop(context, started, prompts, judged_on, _pretraining(context), _held_out_text(context)).run() | lost
    finally:
        context.runtime.stop()


@dataclass(frozen=True)
class Sampled:
    """A step's replies, and what the roles that do not learn say of them."""

    rollouts: Pieces[Rollouts]
    scores: Pieces[Tensor]
    reference: Pieces[Tensor]
    """Log-probs under the reference."""
    values: Pieces[Tensor]
    """The critic's; empty without one."""


@dataclass
class Loop:
    """State of the loop: everything else lives in the roles."""

    context: StageContext
    roles: Roles
    prompts: Prompts
    judged_on: list[Dialogue]
    """Held-out prompts that replies are sampled for during the run."""
    pretraining: Dialogues | None
    """Blocks of text for PPO-ptx."""
    held_out_text: Dialogues | None
    """Blocks of text that are only measured."""

    def __post_init__(self) -> None:
        self.config, self.ppo, self.runtime = self.context.config, self.context.config.ppo, self.context.runtime
        kl = self.ppo.kl
        self.controller = KLController(kl.beta, kl.controller == "adaptive", kl.target, kl.horizon)
        self.seen = self.seen_before = Moments()  # of all scores so far, and of those before this step's
        self.phases: dict[str, float] = {}
        self.together = math.lcm(*roles.rank_counts(self.config))
        self.learners: dict[str, PolicyGroup | CriticGroup] = {"policy": self.roles.policy}
        if self.ppo.has_critic():
            self.learners["critic"] = self.roles.critic
        self.weights = WeightSync(self.runtime, self.config, self.roles)
        self.ahead = Ahead(self.runtime, self.generate, self.ppo.staleness, self.ppo.steps)
        self.guard, self.watch = KLGuard(self.ppo), Watch(self.context)
        self.judge = Judge(self.context, self.roles, self.together, self.judged_on, len(self.prompts))
        self.tracing = Tracing(self.context, self.roles)

    def run(self) -> dict[str, Any]:
        within: dict[str, float] = {}
        judged: dict[str, Any] = {}
        stopped_by = "steps"
        step = start = self.resume()
        zero = demonstration_score(self.context, self.roles, self.together) if self.config.checks != "off" else None
        while True:
            self.tracing.turn_to(step + 1)
            began = time.perf_counter()
            experience, figures = self.score(self.sample(step), step)
            checked = self.watch.sampled(step, figures, zero if step == start else None)
            if self.guard.exceeded(figures["kl"]):
                back = self.go_back(step, figures["kl"])
                if back is None:
                    stopped_by = "kl_budget"
                    break
                step = start = back
                continue
            within = figures
            judged = self.judged(step)
            if step == self.ppo.steps:  # the last weights are measured as well: what is exported is what is reported
                break
            ending = stopping.asked()
            due = step % self.config.commit.every == 0 or ending
            if (step > start and due) or self.guard.needs_start(step):
                self.commit(step)  # not before its samples were seen: what is committed is within the KL budget
            if judged:
                self.context.shared.measured(judged["judge"])
            if ending:
                raise stopping.stopped("ppo", step)
            figures = figures | self.learn(experience, step)
            self.sync(step + 1)
            checked |= self.watch.updated(figures)
            step += 1
            self.record(step, figures, judged | {"checks": checked}, time.perf_counter() - began)
        self.tracing.turn_to(None)
        self.export()
        if stopped_by == "steps" and judged:
            self.context.shared.measured(judged["judge"])
        result: dict[str, Any] = {"kl": within.get("kl"), "kl_budget": self.ppo.kl.budget, "score": within.get("score")}
        return result | {"stopped_by": stopped_by, "rollbacks": self.guard.rollbacks} | self.watch.result() | self.text_losses()

    def sample(self, step: int) -> Sampled:
        """This step's replies, spread over ranks by their tokens, and what the other roles say of them; replies of the next
        `ppo.staleness` steps are asked for as well."""
        rollouts = self.ahead.take(step)
        scored = self.scored(rollouts) if self.ppo.waves > 1 else None  # each wave is scored as soon as its replies are there
        self.timed("rollout", f"replies of PPO step {step + 1}", rollouts)
        order = self.order_of(rollouts)
        rollouts = rollouts.chosen(order)
        return Sampled(rollouts, *([each.chosen(order) for each in scored] if scored else self.scored(rollouts)))

    def order_of(self, rollouts: Pieces[Rollouts]) -> list[int]:
        """The pieces in the order in which ranks that learn have about as many tokens."""
        if self.together == 1 or self.ppo.staleness:  # engines that sample ahead would tell the lengths of a later step
            return list(range(len(rollouts)))
        counts = self.runtime.get(self.roles.rollout.token_counts(), "lengths of the replies")
        tokens = [0] * len(rollouts)
        for index, count in zip(by_rank(self.waves_of(rollouts), self.roles.rollout.group.size), chain(*counts), strict=True):
            tokens[index] = count
        whole = self.ppo.batch // len(rollouts) % self.ppo.samples_per_prompt == 0  # a piece has all replies to its prompts
        return balanced_order(tokens, self.together, whole)

    def generate(self, step: int) -> Pieces[Rollouts]:
        """Ask for a step's replies; those to one prompt are next to each other: so they reach the same rank."""
        samples = self.ppo.samples_per_prompt
        index = step_rows(self.prompts.lengths, self.ppo.batch // samples, step, self.config.seed, pool=1)
        if self.together > 1 and len(index) % self.together == 0:
            index = index[torch.tensor(list(chain(*balanced(self.prompts.lengths[index].tolist(), self.together))))]
        batch = self.prompts.select(index).repeated(samples)
        prompts = self.runtime.put(cut(batch, self.together, self.config.engine.micro_batch, samples, self.ppo.waves))
        sampling = Sampling(self.ppo.temperature, self.ppo.max_new_tokens, self.config.seed, step)
        first, *more = order = self.waves_of(prompts)
        coming = prompts.chosen(by_rank(more, self.roles.rollout.group.size)) if more else None
        found = [self.roles.rollout.generate(prompts.chosen(first), sampling, coming)]
        found += [self.roles.rollout.generate(prompts.chosen(wave), sampling, first=False) for wave in more]
        return gathered(found, order)

    def waves_of(self, pieces: Pieces[Any]) -> list[list[int]]:
        return waves_of(len(pieces), self.together, self.ppo.waves)

    def scored(self, rollouts: Pieces[Rollouts]) -> tuple[Pieces[Tensor], Pieces[Tensor], Pieces[Tensor]]:
        """Scores, reference log-probs and values, wave by wave."""
        order = self.waves_of(rollouts)
        waves = [rollouts.chosen(wave) for wave in order]
        scores = [self.roles.reward.score(wave, first=number == 0) for number, wave in enumerate(waves)]
        reference = [self.roles.reference.logprobs(wave, self.ppo.temperature) for wave in waves]
        values = gathered([self.roles.critic.values(wave) for wave in waves], order) if self.ppo.has_critic() else self.runtime.put([])
        return gathered(scores, order), gathered(reference, order), values

    def score(self, sampled: Sampled, step: int) -> tuple[Pieces[Experience], dict[str, float]]:
        """From scores, reference log-probs and values: rewards, advantages and the samples' figures."""
        rollouts, scores, reference, values = sampled.rollouts, sampled.scores, sampled.reference, sampled.values
        self.timed("reward", f"scores of PPO step {step + 1}", scores)
        batch, by_source = moments_of_scores(self.runtime, self.roles)
        self.seen_before, self.seen = self.seen, self.seen.merged(batch)
        so_far = self.seen if self.ppo.reward_normalise == "running" else None
        experience = self.roles.policy.experience(rollouts, scores, reference, values, self.controller.beta, so_far)
        self.timed("scoring", f"scores, log-probs and values of PPO step {step + 1}", scores, reference, values, experience)
        figures = self.runtime.get(self.roles.policy.describe(), "the samples' figures")[0]
        return experience, figures | (by_source if self.ppo.rewards else {}) | self.scale()

    def scale(self) -> dict[str, float]:
        """What scores are normalised by."""
        running = self.ppo.reward_normalise == "running"
        return {"running_score_mean": self.seen.mean, "running_score_std": self.seen.std()} if running else {}

    def learn(self, experience: Pieces[Experience], step: int) -> dict[str, float]:
        """Policy and critic learn from the experience, at the same time."""
        text = self.runtime.put(self.pretraining_of(step))
        updates = [self.roles.policy.update(experience, text, step, self.guard.lr_scale())]
        if self.ppo.has_critic():
            updates.append(self.roles.critic.update(experience, step))
        self.timed("learning", f"{' and '.join(self.learners)} to learn in PPO step {step + 1}", *updates)
        return {name: value for found in updates for name, value in self.runtime.get(found, "the updates' figures")[0].items()}

    def sync(self, version: int) -> None:
        """The policy's weights to every rollout engine, when it has done what was asked of it before."""
        if self.ppo.staleness:
            self.timed("ahead", f"replies asked for before weights of version {version}", *self.ahead.batches.values())
        began = time.perf_counter()
        sent = self.weights.send(version)
        self.phases |= {"seconds_sync": time.perf_counter() - began, "sync_bytes": float(sent)}

    def timed(self, phase: str, what: str, *pieces: Pieces[Any]) -> None:
        """Wait, and note the seconds as this step's share of a phase."""
        began = time.perf_counter()
        self.runtime.wait(*pieces, what=what)
        self.phases[f"seconds_{phase}"] = time.perf_counter() - began

    def judged(self, step: int) -> dict[str, Any]:
        """The held-out judge's measurement of the weights of this step, when one is due."""
        every = self.ppo.judge.every
        self.phases.pop("seconds_judge", None)
        if not every or (step % every and step != self.ppo.steps):
            return {}
        began = time.perf_counter()
        found = {"judge": self.judge.measure(step)}
        self.phases["seconds_judge"] = time.perf_counter() - began
        if step == self.ppo.steps:  # no update follows, whose row it could be in
            self.context.directory.append(self.watch.recorded({"step": step, **found}))
        return found

    def record(self, step: int, figures: dict[str, float], seen: dict[str, Any], seconds: float) -> None:
        """Write and show a finished step, and let beta follow its KL."""
        figures |= {"beta": self.controller.beta, "seconds": seconds, "tokens_per_second": figures["tokens"] / seconds} | self.phases
        row = self.watch.recorded({"step": step, **figures, **seen})
        self.context.directory.append(row)
        judge = {f"judge_{name}": value for name, value in seen.get("judge", {}).items()}
        self.context.metrics.record(step, figures | judge | self.seen_by_operators(step, figures, row))
        self.controller = self.controller.updated(figures["kl"], self.ppo.batch)

    def seen_by_operators(self, step: int, figures: dict[str, float], row: dict[str, Any]) -> dict[str, float]:
        """What is shown and sent besides what is written."""
        return {
            "warnings": float(len(row.get("warnings", []))),
            "rollbacks": float(len(self.guard.rollbacks)),
            "weight_lag": step - 1 - figures["weight_version_min"],
            "queued_batches": float(self.ahead.waiting(step)),
        }

    def pretraining_of(self, step: int) -> list[Dialogues]:
        """One batch of text blocks per optimizer step for each policy rank, rank by rank; none without PPO-ptx."""
        if self.pretraining is None:
            return []
        ranks, updates = self.config.placement.policy.ranks, self.ppo.epochs * self.ppo.minibatches
        rows = [
            step_rows(self.pretraining.lengths, self.ppo.ptx_batch, step * updates + update, self.config.seed) for update in range(updates)
        ]
        return [self.pretraining.select(index[rank::ranks]).trimmed() for rank in range(ranks) for index in rows]

    def text_losses(self) -> dict[str, float]:
        """Nats per token of held-out pretraining text, of the policy as exported and of the SFT model; none without such text.

        PPO makes a model forget what it was pretrained on; PPO-ptx is there to lower this loss (InstructGPT, 3.5 and 4.2)."""
        if self.held_out_text is None:
            return {}
        text = filled_up(self.held_out_text, self.together)
        tokens = int(text.mask.sum())
        pieces = self.runtime.put(cut(text, self.together, self.config.engine.micro_batch))
        found = {"pretraining_loss": self.roles.policy.logprobs(pieces), "pretraining_loss_sft": self.roles.reference.logprobs(pieces, 1.0)}
        return {
            name: -sum(float(piece.sum()) for piece in self.runtime.get(logprobs, "log-probs of held-out text")) / tokens
            for name, logprobs in found.items()
        }

    def resume(self) -> int:
        """Go on from the last commit; returns the step to run next."""
        point = self.context.directory.last()
        self.context.directory.forget_after(point.step if point else 0)
        if point is None:
            self.sync(0)
            return 0
        self.guard.rollbacks = point.memory.get("rollbacks", [])
        self.load(point, point.memory["beta"])
        return point.step

    def load(self, point: ResumePoint, beta: float) -> None:
        """Learners and engines as they were at a commit."""
        loaded = [role.load_state(str(point.folder / name)) for name, role in self.learners.items()]
        self.runtime.wait(*loaded, what=f"{' and '.join(self.learners)} to load the commit of step {point.step}")
        self.controller = replace(self.controller, beta=beta)
        self.seen = Moments(**point.memory["scores"])
        self.watch.go_back(point.step)
        self.sync(point.step)
        self.ahead.restore(
            point.folder, lambda batch: cut(batch, self.together, self.config.engine.micro_batch, self.ppo.samples_per_prompt)
        )

    def go_back(self, step: int, kl: float) -> int | None:
        """Within the KL budget again: None, to stop with the weights before these, or the step of a commit to go on from, more gently.

        The higher beta is written into the commit, so that a run killed from here on goes on with it."""
        point = self.guard.point_to_go_back_to(self.context.directory)
        if point is None:
            self.context.metrics.say(f"  [yellow]{self.guard.last_word(step, kl)}[/yellow]")
            self.runtime.wait(self.roles.policy.go_back(), what="the policy to go back within the KL budget")
            return None
        beta = self.controller.beta * self.ppo.guard.beta_factor
        self.guard.rollbacks.append({"from": step, "to": point.step, "kl": kl, "beta": beta})
        self.context.metrics.say(f"  [yellow]{self.guard.sentence()}[/yellow]")
        self.context.directory.seal_state(point.step, self.memory(beta, Moments(**point.memory["scores"])))
        self.context.directory.forget_after(point.step)
        self.load(point, beta)
        return point.step

    def commit(self, step: int) -> None:
        """Everything a resume needs: the engines with their optimizers, beta, and the scores' moments. Prompts and samples follow from
        seed and step; samples of older weights are saved."""
        folder = self.context.directory.begin_state(step)
        saved = [role.save_state(str(folder / name)) for name, role in self.learners.items()]
        self.ahead.save(step, folder)
        self.runtime.wait(*saved, what=f"the commit of PPO step {step}")
        self.context.directory.seal_state(step, self.memory(self.controller.beta, self.seen_before))

    def memory(self, beta: float, scores: Moments) -> dict[str, Any]:
        return {"beta": beta, "rollbacks": self.guard.rollbacks, "scores": asdict(scores)}

    def export(self) -> None:
        """The policy in Hugging Face form, with its tokenizer and template."""

        def save(folder: Any) -> None:
            self.runtime.wait(self.roles.policy.export(str(folder)), what="the policy's export")
            self.context.chat.save(folder)

        self.context.directory.export(save)


def _prompts(context: StageContext) -> tuple[Prompts, list[Dialogue], dict[str, int]]:
    """All prompts that leave room for a reply, encoded once; the same as dialogues; and what that took. Their keys are their places."""
    config, chat = context.config, context.chat
    room = context.longest - config.ppo.max_new_tokens
    fitting, shortened, left_out = fitting_prompts(context.corpus.prompts, chat, room)
    if len(fitting) < config.ppo.batch // config.ppo.samples_per_prompt:
        raise RequestError(
            f"ppo.batch={config.ppo.batch}: only {len(fitting)} of {len(context.corpus.prompts)} prompts leave room for "
            f"ppo.max_new_tokens={config.ppo.max_new_tokens}; lower ppo.batch, or give more prompts"
        )
    lost = {"prompts_shortened": shortened, "prompts_left_out": left_out}
    return chat.prompts(fitting, [(number, 0) for number in range(len(fitting))]), fitting, lost


def _pretraining(context: StageContext) -> Dialogues | None:
    """All pretraining text in blocks, for PPO-ptx; demonstrations are never used."""
    if context.config.ppo.ptx == 0:
        return None
    if not context.corpus.texts:
        raise RequestError(f"ppo.ptx={context.config.ppo.ptx:g}: the data hold no pretraining text; give some, or set ppo.ptx=0")
    return blocks(context.corpus.texts, context.chat, context.longest)


def _held_out_text(context: StageContext) -> Dialogues | None:
    _, test = validation_and_test(context.corpus.held_out_texts)
    return blocks(test, context.chat, context.longest).select(slice(0, MEASURED_BLOCKS)) if test else None


def filled_up(rows: Dialogues, multiple: int) -> Dialogues:
    """With as many rows without a token that counts as it takes for their number to be a multiple."""
    missing = -len(rows) % multiple
    if not missing:
        return rows
    empty = rows.select([0] * missing)
    return Dialogues.join([rows, Dialogues(empty.tokens, empty.lengths, empty.mask & False)])
