"""Stage 3, the reward model: learned from rankings or judgements, started from the SFT model with a scalar head.

Recorded preferences are taken from the data themselves, so the stage can run without `compare`; with `reward_model.start=model` it needs
no SFT model either.
"""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

from actors.batch import Comparisons
from actors.preference_task import PreferenceTask
from conf.schema import Config
from orchestration.data import baselines, comparisons
from orchestration.data.chat import Chat
from orchestration.data.fitting import Fitted, fitting_comparisons, fitting_demonstrations, fitting_judgements
from orchestration.data.preferences import Comparison, Judgement
from orchestration.errors import RequestError
from orchestration.metrics import tail
from orchestration.runtime.train import run_training
from orchestration.stages.context import StageContext
from orchestration.stages.start import context_length, starting_chat, starting_model


def run(context: StageContext) -> dict[str, float]:
    """Returns held-out accuracy or AUC, beside a TF-IDF model's on the same rows and the labeller's ceiling."""
    config = context.config
    start, chat, longest = _start(context)
    rows, tests, simple, ranked = _preferences(context, chat, longest)
    groups = int(rows.group.max()) + 1
    if groups < 2:
        raise RequestError(f"stage=reward_model: {groups} comparison(s) or judgement(s) to learn from, two are needed; {_more(config)}")
    kept, apart = comparisons.kept_apart(groups, config.reward_model.validation_share, config.seed)
    if len(kept) < config.placement.train.ranks:
        raise RequestError(
            f"placement.train.ranks={config.placement.train.ranks}: there are only {len(kept)} comparisons or judgements to learn from; "
            + _more(config)
        )
    longest_shown = max(int(rows.lengths.max()), 64)
    shown = fitting_demonstrations(context.corpus.demonstrations, chat, longest_shown)
    steps = min(config.reward_model.steps, config.reward_model.epochs * max(len(kept) // config.reward_model.batch, 1))
    settings = dataclasses.replace(config, reward_model=dataclasses.replace(config.reward_model, steps=steps))
    task = PreferenceTask(settings, str(start), of_groups(rows, kept), of_groups(rows, apart), tests, chat.dialogues(shown), ranked)
    context.start_runtime()
    context.metrics.begin("reward_model", steps)
    result = run_training(settings, task, context.directory, tail(context.directory.metrics, context.metrics.record))
    context.directory.extend(chat.save)
    if config.reward_model.start == "model":
        shutil.rmtree(start)
    return result | simple | ({"demonstrations_up_to": longest_shown} if ranked else {})


def _more(config: Config) -> str:
    return "raise compare.prompts" if config.labeler.kind == "simulated" else "give more data, or lower data.heldout_preferences"


def _start(context: StageContext) -> tuple[Path, Chat, int]:
    """(folder of the model to start from, its chat format, its longest sequence)."""
    config = context.config
    if config.reward_model.start == "sft":
        return context.input("sft"), context.chat, context.longest
    chat = starting_chat(config, context.corpus)
    folder = context.directory.path / "start"
    starting_model(config, chat, 0.0).save_pretrained(folder)
    return folder, chat, context_length(config)


def _preferences(context: StageContext, chat: Chat, longest: int) -> tuple[Comparisons, Comparisons, dict[str, float], bool]:
    """(rows to learn from, held-out rows, figures, whether they are rankings); what the data hold decides."""
    corpus = context.corpus
    if context.config.labeler.kind == "simulated":
        folder = context.input("compare")
        train, tests = comparisons.read(folder / comparisons.TRAIN_FILE), comparisons.read(folder / comparisons.HELD_OUT_FILE)
        return (*_rankings(context, chat, train, tests, longest), True)
    if corpus.ranked():
        return (*_rankings(context, chat, corpus.comparisons, corpus.held_out_comparisons, longest), True)
    return (*_judgements(chat, corpus.judgements, corpus.held_out_judgements, longest), False)


def _rankings(
    context: StageContext, chat: Chat, train: list[Comparison], tests: list[Comparison], longest: int
) -> tuple[Comparisons, Comparisons, dict[str, float]]:
    simple = {"baseline_pairwise_accuracy": baselines.tfidf_pairwise_accuracy(train, tests, context.config.seed)}
    ceiling = context.run.results().get("compare", {}).get("labeler_ceiling")
    if ceiling is not None:
        simple["labeler_ceiling"] = ceiling
    fitted, fitted_tests = fitting_comparisons(train, chat, longest), fitting_comparisons(tests, chat, longest)
    _check_fitting(fitted, fitted_tests, longest)
    figures = simple | _lost(fitted, fitted_tests)
    return comparisons.encode_rankings(chat, fitted.kept), comparisons.encode_rankings(chat, fitted_tests.kept), figures


def _judgements(
    chat: Chat, train: list[Judgement], tests: list[Judgement], longest: int
) -> tuple[Comparisons, Comparisons, dict[str, float]]:
    simple = {"baseline_auc": baselines.tfidf_judgement_auc(train, tests)}  # on the whole contexts
    fitted, fitted_tests = fitting_judgements(train, chat, longest), fitting_judgements(tests, chat, longest)
    _check_fitting(fitted, fitted_tests, longest)
    figures = simple | _lost(fitted, fitted_tests)
    return comparisons.encode_judgements(chat, fitted.kept), comparisons.encode_judgements(chat, fitted_tests.kept), figures


def _check_fitting(train: Fitted, tests: Fitted, longest: int) -> None:
    if not train.kept or not tests.kept:
        raise RequestError(
            f"data: the replies of all comparisons or judgements to learn from, or of all held-out ones, are longer than the context of "
            f"{longest} tokens; choose a model or scale with a larger context"
        )


def _lost(train: Fitted, tests: Fitted) -> dict[str, float]:
    return {"contexts_shortened": train.shortened + tests.shortened, "replies_too_long": train.left_out + tests.left_out}


def of_groups(rows: Comparisons, groups: list[int]) -> Comparisons:
    """The rows of the named groups."""
    wanted = set(groups)
    return rows.select([i for i, group in enumerate(rows.group.tolist()) if group in wanted])
