"""Stage 1, supervised fine-tuning: the starting model, then language modelling on dialogues to its held-out optimum."""

from __future__ import annotations

import shutil

from actors.language_task import LanguageTask
from actors.models import load_causal_lm, new_causal_lm
from conf.schema import Config
from orchestration.data.chat import Chat, learn_tokenizer, load_tokenizer
from orchestration.data.dialogues import Dialogue
from orchestration.data.fitting import fitting_dialogues
from orchestration.errors import RequestError
from orchestration.metrics import tail
from orchestration.runtime.train import run_training
from orchestration.stages.context import StageContext


def run(context: StageContext) -> dict[str, float]:
    """Returns held-out loss per token and per character, and what was left out."""
    config, corpus = context.config, context.corpus
    chat = starting_chat(config, corpus.demonstrations)
    dialogues, dropped = fitting_dialogues(corpus.demonstrations, chat, context_length(config))
    held_out, held_out_dropped = fitting_dialogues(corpus.held_out, chat, context_length(config))
    middle = len(held_out) // 2
    if not dialogues or not middle:
        raise RequestError(
            f"data: {len(dialogues)} dialogues to learn from and {len(held_out)} held out fit in a context of "
            f"{context_length(config)} tokens; at least one and two are needed: give more data, or a larger scale.context"
        )
    start = context.directory.path / "start"
    starting_model(config, chat).save_pretrained(start)
    task = LanguageTask(
        config, str(start), chat.dialogues(dialogues), chat.dialogues(held_out[:middle]), chat.dialogues(held_out[middle:]),
        assistant_chars(held_out[middle:]),
    )  # fmt: skip
    context.start_runtime()
    context.metrics.begin("sft", config.sft.steps)
    result = run_training(config, task, context.directory, tail(context.directory.metrics, context.metrics.record))
    context.directory.extend(chat.save)
    shutil.rmtree(start)
    return result | {"dialogues": len(dialogues), "dialogues_too_long": dropped + held_out_dropped}


def starting_chat(config: Config, demonstrations: list[Dialogue]) -> Chat:
    """The chat format to train with: the named tokenizer, the model's own, or one learned from the demonstrations."""
    named = config.model.tokenizer or config.model.path
    if named:
        return Chat(load_tokenizer(named, "model.tokenizer" if config.model.tokenizer else "model.path"))
    return Chat(learn_tokenizer(demonstrations, config.scale.vocabulary))


def starting_model(config: Config, chat: Chat):
    """The named model, or one of the scale's shape with random weights."""
    vocabulary = len(chat.tokenizer)
    if config.model.path is None:
        return new_causal_lm(config.scale, vocabulary, config.seed, config.sft.dropout, chat.end, chat.pad)
    try:
        lm = load_causal_lm(config.model.path)
    except (OSError, ValueError) as cause:
        raise RequestError(
            f"model.path={config.model.path}: no causal LM can be loaded from there ({str(cause).splitlines()[0][:200]})"
        ) from cause
    rows = len(next(lm.get_input_embeddings().parameters()))
    if vocabulary > rows:
        raise RequestError(
            f"model.tokenizer: it has {vocabulary} tokens, the model's embedding {rows} rows; take the model's own tokenizer"
        )
    lm.config.eos_token_id = lm.generation_config.eos_token_id = chat.end
    lm.config.pad_token_id = lm.generation_config.pad_token_id = chat.pad
    return lm


def context_length(config: Config) -> int:
    """Longest sequence the model takes."""
    if config.model.path is None:
        return config.scale.context
    from transformers import AutoConfig

    return int(getattr(AutoConfig.from_pretrained(config.model.path), "max_position_embeddings", config.scale.context))


def assistant_chars(dialogues: list[Dialogue]) -> int:
    """Characters the assistant wrote."""
    return sum(len(dialogue.messages[turn].content) for dialogue in dialogues for turn in dialogue.assistant_turns())
