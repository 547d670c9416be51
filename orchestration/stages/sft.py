"""Stage 1, supervised fine-tuning: from the pretrained or starting model to its held-out optimum on dialogues."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from actors.attention import can_remove_padding
from actors.language_task import LanguageTask
from actors.models import load_causal_lm
from conf.schema import Config
from orchestration.data.chat import Chat, load_tokenizer
from orchestration.data.dialogues import Dialogue
from orchestration.data.fitting import fitting_dialogues
from orchestration.data.mixture import mixed
from orchestration.errors import RequestError
from orchestration.metrics import tail
from orchestration.runtime.train import run_training
from orchestration.stages.context import StageContext
from orchestration.stages.start import context_length, starting_chat, write_starting_model


def run(context: StageContext) -> dict[str, Any]:
    """Returns held-out loss per token and per character, and what was left out."""
    config, corpus = context.config, context.corpus
    scratch = context.directory.path / "start"
    chat, start = starting_point(context, scratch)
    fitted = fitting_dialogues(corpus.demonstrations, chat, context_length(config), config.sft.too_long)
    held_out, _, held_out_left_out = fitting_dialogues(corpus.held_out, chat, context_length(config))
    dialogues, mixture = mixed(fitted.kept, corpus.weights, config.seed)
    middle = len(held_out) // 2
    if not dialogues or not middle:
        raise RequestError(
            f"data: {len(dialogues)} dialogues to learn from and {len(held_out)} held out fit in a context of "
            f"{context_length(config)} tokens; at least one and two are needed: give more data, or a larger scale.context"
        )
    task = LanguageTask(
        config, str(start), chat.dialogues(dialogues), chat.dialogues(held_out[:middle]), chat.dialogues(held_out[middle:]),
        assistant_chars(held_out[middle:]), pack_length=pack_length(config, start),
    )  # fmt: skip
    context.start_runtime()
    context.metrics.begin("sft", config.sft.steps)
    result = run_training(config, task, context.directory, tail(context.directory.metrics, context.metrics.record))
    context.directory.extend(chat.save)
    shutil.rmtree(scratch, ignore_errors=True)
    counts = {
        "dialogues": len(dialogues),
        "dialogues_shortened": fitted.shortened,
        "dialogues_too_long": fitted.left_out + held_out_left_out,
    }
    return result | counts | ({"mixture": mixture} if mixture else {})


def starting_point(context: StageContext, scratch: Path) -> tuple[Chat, Path]:
    """Chat format and folder of the weights to start from: the pretrained ones, or new ones that are written to `scratch`."""
    if context.config.pretrain.steps:
        folder = context.input("pretrain")
        return Chat(load_tokenizer(str(folder), "pretrain")), folder
    chat = starting_chat(context.config, context.corpus)
    write_starting_model(context.config, chat, context.config.sft.dropout, scratch)
    return chat, scratch


def pack_length(config: Config, start: Path) -> int | None:
    """Tokens of a packed row at most; None without packing.

    Raises:
        RequestError: the model does not keep the dialogues of a packed row apart.
    """
    if not config.sft.packing:
        return None
    if not config.engine.remove_padding:
        raise RequestError("sft.packing=true: dialogues of a row are kept apart only with engine.remove_padding=true")
    lm = load_causal_lm(str(start), unfilled=True)
    if not can_remove_padding(lm):
        raise RequestError(
            f"sft.packing=true: in this model ({lm.config.model_type}) the dialogues of a packed row see each other; set sft.packing=false"
        )
    longest = context_length(config)
    return min(config.sft.pack_length or longest, longest)


def assistant_chars(dialogues: list[Dialogue]) -> int:
    """Characters the assistant wrote."""
    return sum(len(dialogue.messages[turn].content) for dialogue in dialogues for turn in dialogue.assistant_turns())
