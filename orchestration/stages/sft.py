"""Stage 1, supervised fine-tuning: the starting model, then language modelling on dialogues to its held-out optimum."""

from __future__ import annotations

import shutil
from typing import Any

from actors.language_task import LanguageTask
from orchestration.data.dialogues import Dialogue
from orchestration.data.fitting import fitting_dialogues
from orchestration.data.mixture import mixed
from orchestration.errors import RequestError
from orchestration.metrics import tail
from orchestration.runtime.train import run_training
from orchestration.stages.context import StageContext
from orchestration.stages.start import context_length, starting_chat, starting_model


def run(context: StageContext) -> dict[str, Any]:
    """Returns held-out loss per token and per character, and what was left out."""
    config, corpus = context.config, context.corpus
    chat = starting_chat(config, corpus)
    fitted = fitting_dialogues(corpus.demonstrations, chat, context_length(config), config.sft.too_long)
    held_out, _, held_out_left_out = fitting_dialogues(corpus.held_out, chat, context_length(config))
    dialogues, mixture = mixed(fitted.kept, corpus.weights, config.seed)
    middle = len(held_out) // 2
    if not dialogues or not middle:
        raise RequestError(
            f"data: {len(dialogues)} dialogues to learn from and {len(held_out)} held out fit in a context of "
            f"{context_length(config)} tokens; at least one and two are needed: give more data, or a larger scale.context"
        )
    start = context.directory.path / "start"
    starting_model(config, chat, config.sft.dropout).save_pretrained(start)
    task = LanguageTask(
        config, str(start), chat.dialogues(dialogues), chat.dialogues(held_out[:middle]), chat.dialogues(held_out[middle:]),
        assistant_chars(held_out[middle:]),
    )  # fmt: skip
    context.start_runtime()
    context.metrics.begin("sft", config.sft.steps)
    result = run_training(config, task, context.directory, tail(context.directory.metrics, context.metrics.record))
    context.directory.extend(chat.save)
    shutil.rmtree(start)
    counts = {
        "dialogues": len(dialogues),
        "dialogues_shortened": fitted.shortened,
        "dialogues_too_long": fitted.left_out + held_out_left_out,
    }
    return result | counts | ({"mixture": mixture} if mixture else {})


def assistant_chars(dialogues: list[Dialogue]) -> int:
    """Characters the assistant wrote."""
    return sum(len(dialogue.messages[turn].content) for dialogue in dialogues for turn in dialogue.assistant_turns())
