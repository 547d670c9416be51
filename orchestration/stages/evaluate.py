"""Stage 5, evaluation: the PPO model beside the SFT model on unseen prompts.

Both answer every prompt, sampled and greedy. What PPO learned from (the reward model, or `ppo.rewards`) scores both; where the data has
an exact grade, it judges: the share of prompts on which PPO's reply is better, ties one half, with a bootstrap interval over prompts.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from actors.batch import Rollouts
from actors.sampling import Sampling
from conf.schema import Config
from conf.sources import WorldData
from orchestration import roles
from orchestration.data.dialogues import Dialogue
from orchestration.data.fitting import fitting_prompts
from orchestration.errors import RequestError
from orchestration.stages.context import Grades, StageContext
from orchestration.stages.rewarding import Rewarding
from orchestration.stages.sampling import Sampler

CONVERSATIONS_FILE = "conversations.jsonl"
SAMPLED, GREEDY = 2**31 + 900_001, 2**31 + 900_002
"""Numbers for the sampling key that no other stage uses."""


@dataclass(frozen=True)
class Answers:
    """One model's replies to all prompts."""

    texts: list[str]
    finished: list[bool]
    scores: torch.Tensor
    """[N] by what PPO learned from."""
    kl: float
    """Mean KL to the reference per reply, nats, from these samples."""
    tokens: float
    """Mean reply length."""


def run(context: StageContext) -> dict[str, Any]:
    """Returns win rates with their interval, scores, KL and length."""
    config, chat = context.config, context.chat
    sft, ppo = str(context.input("sft")), str(context.input("ppo"))
    room = context.longest - config.evaluate.max_new_tokens
    contexts, shortened, left_out = fitting_prompts(context.corpus.judge_prompts, chat, room)
    contexts = contexts[: config.evaluate.prompts]
    if not contexts:
        raise RequestError(f"evaluate.max_new_tokens={config.evaluate.max_new_tokens}: no held-out prompt leaves room for such a reply")
    context.metrics.begin("evaluate", 4)
    rewarding = Rewarding(context)
    _ = rewarding.encoders  # what is wrong with a model is said before anything starts
    started = roles.start(context.runtime, config, {"rollout": sft, "reference": sft, "reward": rewarding.checkpoint})
    try:
        rewarding.prepare(started, contexts)
        judge = _Judge(context, started, contexts)
        answers = {"sft": judge.answers(config.evaluate.temperature, SAMPLED), "sft_greedy": judge.answers(0.0, GREEDY)}
        context.metrics.record(2, {"score": float(answers["sft"].scores.mean())})
        context.runtime.wait(started.rollout.reload(ppo), what="rollout engines to load the PPO model")
        answers |= {"ppo": judge.answers(config.evaluate.temperature, SAMPLED), "ppo_greedy": judge.answers(0.0, GREEDY)}
        context.metrics.record(4, {"score": float(answers["ppo"].scores.mean()), "kl": answers["ppo"].kl})
    finally:
        context.runtime.stop()
    figures = _figures(answers) | {"prompts": len(contexts), "prompts_shortened": shortened, "prompts_left_out": left_out}
    grades = exact_grades(config)
    if grades:
        figures |= _gold_figures(context, contexts, answers, grades)
    context.directory.export(lambda folder: _write_conversations(folder, contexts, answers))
    return figures


@dataclass(frozen=True)
class _Judge:
    context: StageContext
    roles: roles.Roles
    contexts: Sequence[Dialogue]

    def answers(self, temperature: float, step: int) -> Answers:
        """The current engine weights' replies, scored and compared with the reference."""
        config, runtime = self.context.config, self.context.runtime
        place = config.placement
        together = int(np.lcm.reduce([place.rollout.ranks, place.reference.ranks, place.reward.ranks]))
        sampler = Sampler(runtime, self.roles, self.context.chat, together, config.engine.micro_batch)
        sampling = Sampling(temperature, config.evaluate.max_new_tokens, config.seed, step)
        count = len(self.contexts)
        pieces = sampler.rollouts(self.contexts, [(n, 0) for n in range(count)], sampling)
        scores = self.roles.reward.score(pieces)
        reference = self.roles.reference.logprobs(pieces, temperature or 1.0)
        rollouts = sampler.fetch(pieces, count, "replies to the held-out prompts")
        found = torch.cat(runtime.get(scores, "scores of the replies"))[:count]
        per_token = [r for piece in runtime.get(reference, "log-probs under the reference") for r in piece.sum(dim=1).tolist()]
        kl = rollouts.behaviour.sum(dim=1) - torch.tensor(per_token[:count])
        return Answers(sampler.replies(rollouts), rollouts.finished.tolist(), found, float(kl.mean()), _mean_length(rollouts))


def _mean_length(rollouts: Rollouts) -> float:
    return float(rollouts.mask.sum(dim=1).float().mean())


def _figures(answers: dict[str, Answers]) -> dict[str, float]:
    found = {"kl": answers["ppo"].kl}
    for name in ("sft", "ppo"):
        found[f"rm_score_{name}"] = float(answers[name].scores.mean())
        found[f"reply_tokens_{name}"] = answers[name].tokens
        found[f"finished_share_{name}"] = float(np.mean(answers[name].finished))
    found["rm_win_rate_vs_sft"] = float(wins(answers["ppo"].scores.numpy(), answers["sft"].scores.numpy()).mean())
    return found


def exact_grades(config: Config) -> Grades | None:
    """The exact grade of replies, where the data have one."""
    if not isinstance(config.data, WorldData):
        return None
    from orchestration.data.world.gold import grade

    return lambda contexts, replies, finished: [grade(*row) for row in zip(contexts, replies, finished, strict=True)]


def _gold_figures(context: StageContext, contexts: Sequence[Dialogue], answers: dict[str, Answers], grades: Grades) -> dict[str, Any]:
    gold = {name: np.array(grades(contexts, found.texts, found.finished)) for name, found in answers.items()}
    won = wins(gold["ppo"], gold["sft"])
    greedy = wins(gold["ppo_greedy"], gold["sft_greedy"])
    interval = bootstrap_interval(won, context.config.evaluate.bootstrap, context.config.seed)
    means = {f"gold_{name}": float(values.mean()) for name, values in gold.items()}
    return means | {
        "gold_win_rate_vs_sft": float(won.mean()),
        "gold_win_rate_ci95": list(interval),
        "gold_win_rate_greedy": float(greedy.mean()),
    }


def wins(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    """[N]: 1 where ours is higher, 1/2 where both are equal."""
    return (ours > theirs) + 0.5 * (ours == theirs)


def bootstrap_interval(values: np.ndarray, resamples: int, seed: int) -> tuple[float, float]:
    """95% percentile interval of the mean; each value is one prompt, so prompts are what is resampled."""
    rng = np.random.default_rng(seed)
    means = values[rng.integers(0, len(values), (resamples, len(values)))].mean(axis=1)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def _write_conversations(folder: Path, contexts: Sequence[Dialogue], answers: dict[str, Answers]) -> None:
    """Every prompt with the four replies: the record of what was judged."""
    with open(folder / CONVERSATIONS_FILE, "w", encoding="utf-8") as file:
        for n, c in enumerate(contexts):
            replies = {name: found.texts[n] for name, found in answers.items()}
            scores = {name: round(float(found.scores[n]), 4) for name, found in answers.items()}
            file.write(json.dumps({"id": c.id, "context": c.as_list(), "replies": replies, "rm_scores": scores}) + "\n")
