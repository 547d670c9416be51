"""Stage 3, the reward model: learned from rankings or judgements, started from the SFT model with a scalar head.

Recorded preferences are taken from the data themselves, so the stage can run without `compare`; with `reward_model.start=model` it needs
no SFT model either. With `own` it is of another size than the policy.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

from actors.batch import Comparisons
from actors.preference_task import SCORES_FILE, PreferenceTask
from conf.schema import Config, RewardModel
from orchestration.data import comparisons, versus
from orchestration.data.chat import Chat
from orchestration.data.fitting import Fitted, fitting_comparisons, fitting_judgements
from orchestration.data.preferences import Comparison, Judgement
from orchestration.errors import RequestError
from orchestration.metrics import tail
from orchestration.runtime.train import run_training
from orchestration.stages.context import StageContext
from orchestration.stages.start import context_length, own_reward_model, starting_chat, write, write_starting_model


def run(context: StageContext) -> dict[str, float]:
    """Returns held-out accuracy or AUC, beside a TF-IDF model's on the same rows and the labeller's ceiling."""
    config = context.config
    start, chat, longest = _start(context)
    found = _preferences(context, chat, longest)
    rows, learning = found.rows, config.reward_model
    groups = int(rows.group.max()) + 1
    if groups < 2:
        raise RequestError(f"stage=reward_model: {groups} comparison(s) or judgement(s) to learn from, two are needed; {_more(config)}")
    kept, apart = comparisons.kept_apart(groups, learning.validation_share, config.seed)
    if len(kept) < config.placement.train.ranks:
        raise RequestError(
            f"placement.train.ranks={config.placement.train.ranks}: there are only {len(kept)} comparisons or judgements to learn from; "
            + _more(config)
        )
    longest_shown = max(int(rows.lengths.max()), 64)
    zero = comparisons.demonstrated(context.corpus.demonstrations, chat, longest_shown)
    steps = steps_of(learning, len(kept))
    settings = dataclasses.replace(config, reward_model=dataclasses.replace(learning, steps=steps))
    task = PreferenceTask(settings, str(start), of_groups(rows, kept), of_groups(rows, apart), found.held_out, zero, found.ranked)
    context.start_runtime()
    context.metrics.begin("reward_model", steps)
    result = run_training(settings, task, context.directory, tail(context.directory.metrics, context.metrics.record))
    context.directory.extend(chat.save)
    if learning.start != "sft":
        shutil.rmtree(start)
    scores = json.loads((context.directory.checkpoint / SCORES_FILE).read_text(encoding="utf-8"))
    return result | found.figures | found.beside(scores) | {"demonstrations_up_to": longest_shown}


def steps_of(learning: RewardModel, groups: int) -> int:
    """Optimizer steps for this many comparisons or judgements; none where only the head is fitted."""
    return 0 if learning.train == "head" else min(learning.steps, learning.epochs * max(groups // learning.batch, 1))


def _more(config: Config) -> str:
    return "raise compare.prompts" if config.labeler.kind == "simulated" else "give more data, or lower data.heldout_preferences"


def _start(context: StageContext) -> tuple[Path, Chat, int]:
    """(folder of the model to start from, its chat format, its longest sequence)."""
    config = context.config
    if config.reward_model.start == "sft":
        return context.input("sft"), context.chat, context.longest
    folder = context.directory.path / "start"
    if config.reward_model.start == "model":
        chat = starting_chat(config, context.corpus)
        write_starting_model(config, chat, 0.0, folder)
        return folder, chat, context_length(config)
    lm = own_reward_model(config, context.chat)
    longest = int(getattr(lm.config, "max_position_embeddings", context.longest))
    if longest < context.longest:
        raise RequestError(
            f"reward_model.start=own: the reward model takes {longest} tokens and the policy {context.longest}; choose a reward_scale or "
            "reward_model.path with at least the policy's context"
        )
    write(config, lm, folder)
    return folder, context.chat, context.longest


@dataclasses.dataclass(frozen=True)
class Preferences:
    """What is learned from and measured on, and how the result is compared with TF-IDF."""

    rows: Comparisons
    held_out: Comparisons
    ranked: bool
    figures: dict[str, float]
    beside: Callable[[list[float]], dict[str, float]]
    """Held-out scores -> the baseline's figure on the same rows, and the difference."""


def _preferences(context: StageContext, chat: Chat, longest: int) -> Preferences:
    """Rankings or judgements: what the data hold decides."""
    corpus = context.corpus
    if context.config.labeler.kind == "simulated":
        folder = context.input("compare")
        train, tests = comparisons.read(folder / comparisons.TRAIN_FILE), comparisons.read(folder / comparisons.HELD_OUT_FILE)
        return _rankings(context, chat, train, tests, longest)
    if corpus.ranked():
        return _rankings(context, chat, corpus.comparisons, corpus.held_out_comparisons, longest)
    return _judgements(context, chat, corpus.judgements, corpus.held_out_judgements, longest)


def _rankings(context: StageContext, chat: Chat, train: list[Comparison], tests: list[Comparison], longest: int) -> Preferences:
    seen, held_out = fitting_comparisons(train, chat, longest), fitting_comparisons(tests, chat, longest)
    _check_fitting(seen, held_out, longest)
    ceiling = context.run.results().get("compare", {}).get("labeler_ceiling")
    figures = _lost(seen, held_out) | ({} if ceiling is None else {"labeler_ceiling": ceiling})
    rows, apart = comparisons.encode_rankings(chat, seen.kept), comparisons.encode_rankings(chat, held_out.kept)
    beside = partial(versus.on_rankings, train=seen.kept, test=held_out.kept, seed=context.config.seed)
    return Preferences(rows, apart, True, figures, beside)


def _judgements(context: StageContext, chat: Chat, train: list[Judgement], tests: list[Judgement], longest: int) -> Preferences:
    seen, held_out = fitting_judgements(train, chat, longest), fitting_judgements(tests, chat, longest)
    _check_fitting(seen, held_out, longest)
    rows, apart = comparisons.encode_judgements(chat, seen.kept), comparisons.encode_judgements(chat, held_out.kept)
    beside = partial(versus.on_judgements, train=seen.kept, test=held_out.kept, seed=context.config.seed)
    return Preferences(rows, apart, False, _lost(seen, held_out), beside)


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
