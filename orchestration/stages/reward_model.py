"""Stage 3, the reward model: learned from rankings or judgements, started from the SFT model with a scalar head."""

from __future__ import annotations

import dataclasses

from actors.batch import Comparisons
from actors.preference_task import PreferenceTask
from orchestration.data import baselines, comparisons
from orchestration.data.chat import Chat
from orchestration.data.dialogues import Dialogue
from orchestration.data.fitting import fitting_dialogues, fitting_judgements
from orchestration.errors import RequestError
from orchestration.metrics import tail
from orchestration.runtime.train import run_training
from orchestration.stages.context import StageContext

DEMONSTRATIONS = 256
"""Demonstrations whose mean score sets the reward's zero."""


def run(context: StageContext) -> dict[str, float]:
    """Returns held-out accuracy or AUC, beside a TF-IDF model's on the same rows and the labeller's ceiling."""
    config, chat = context.config, context.chat
    start = context.input("sft")
    folder = context.input("compare")
    ranked = config.labeler.kind == "simulated"
    if ranked:
        rows, tests, simple = _rankings(context, chat)
    else:
        rows, tests, simple = _judgements(context, chat)
    groups = int(rows.group.max()) + 1
    if groups < 2:
        raise RequestError(
            f"stage=reward_model: {folder / comparisons.TRAIN_FILE} holds {groups} comparison(s), two are needed; raise compare.prompts"
        )
    kept, apart = comparisons.kept_apart(groups, config.reward_model.validation_share, config.seed)
    if len(kept) < config.placement.train.ranks:
        raise RequestError(
            f"placement.train.ranks={config.placement.train.ranks}: there are only {len(kept)} comparisons to learn from; "
            "raise compare.prompts"
        )
    shown = fitting_demonstrations(context.corpus.demonstrations, chat, longest=max(int(rows.lengths.max()), 64))
    steps = min(config.reward_model.steps, config.reward_model.epochs * max(len(kept) // config.reward_model.batch, 1))
    settings = dataclasses.replace(config, reward_model=dataclasses.replace(config.reward_model, steps=steps))
    task = PreferenceTask(settings, str(start), of_groups(rows, kept), of_groups(rows, apart), tests, chat.dialogues(shown), ranked)
    context.start_runtime()
    context.metrics.begin("reward_model", steps)
    result = run_training(settings, task, context.directory, tail(context.directory.metrics, context.metrics.record))
    context.directory.extend(chat.save)
    return result | simple


def _rankings(context: StageContext, chat: Chat) -> tuple[Comparisons, Comparisons, dict[str, float]]:
    folder = context.input("compare")
    train, tests = comparisons.read(folder / comparisons.TRAIN_FILE), comparisons.read(folder / comparisons.HELD_OUT_FILE)
    simple = {"baseline_pairwise_accuracy": baselines.tfidf_pairwise_accuracy(train, tests, context.config.seed)}
    ceiling = context.run.results().get("compare", {}).get("labeler_ceiling")
    if ceiling is not None:
        simple["labeler_ceiling"] = ceiling
    return comparisons.encode_rankings(chat, train), comparisons.encode_rankings(chat, tests), simple


def _judgements(context: StageContext, chat: Chat) -> tuple[Comparisons, Comparisons, dict[str, float]]:
    folder = context.input("compare")
    train, tests = (
        comparisons.read_judgements(folder / comparisons.TRAIN_FILE),
        comparisons.read_judgements(folder / comparisons.HELD_OUT_FILE),
    )
    simple = {"baseline_auc": baselines.tfidf_judgement_auc(train, tests)}  # on the whole contexts
    train, shortened = fitting_judgements(train, chat, context.longest)
    tests, shortened_tests = fitting_judgements(tests, chat, context.longest)
    simple["contexts_shortened"] = shortened + shortened_tests
    return comparisons.encode_judgements(chat, train), comparisons.encode_judgements(chat, tests), simple


def of_groups(rows: Comparisons, groups: list[int]) -> Comparisons:
    """The rows of the named groups."""
    wanted = set(groups)
    return rows.select([i for i, group in enumerate(rows.group.tolist()) if group in wanted])


def fitting_demonstrations(demonstrations: list[Dialogue], chat: Chat, longest: int) -> list[Dialogue]:
    """A fixed sample of demonstrations for the reward's zero, each up to its last assistant turn, not longer than what is compared."""
    cut = [d.before(turns[-1] + 1) for d in demonstrations[: 4 * DEMONSTRATIONS] if (turns := d.assistant_turns())]
    fitting, _ = fitting_dialogues(cut, chat, longest)
    return (fitting or cut)[:DEMONSTRATIONS]
