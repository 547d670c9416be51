"""Before stage 1, pretraining: the starting model learns to predict plain text, every token of it, to its held-out optimum."""

from __future__ import annotations

import shutil

from actors.language_task import LanguageTask
from orchestration.data.text import blocks, byte_count, validation_and_test
from orchestration.errors import RequestError
from orchestration.metrics import tail
from orchestration.runtime.train import run_training
from orchestration.stages.context import StageContext
from orchestration.stages.start import context_length, starting_chat, write_starting_model


def run(context: StageContext) -> dict[str, float]:
    """Returns held-out loss per token and per byte, and the sizes of what was learned from."""
    config, corpus = context.config, context.corpus
    validation, test = validation_and_test(corpus.held_out_texts)
    if not corpus.texts or not validation:
        raise RequestError(
            f"data: {len(corpus.texts)} documents to pretrain on and {len(corpus.held_out_texts)} held out; at least one and two are "
            "needed: give more text, or set pretrain.steps=0"
        )
    chat, length = starting_chat(config, corpus), context_length(config)
    scratch = context.directory.path / "start"
    write_starting_model(config, chat, config.pretrain.dropout, scratch)
    rows = blocks(corpus.texts, chat, length)
    task = LanguageTask(
        config, str(scratch), rows, blocks(validation, chat, length), blocks(test, chat, length), byte_count(test),
        unit="byte", section="pretrain",
    )  # fmt: skip
    context.start_runtime()
    context.metrics.begin("pretrain", config.pretrain.steps)
    result = run_training(config, task, context.directory, tail(context.directory.metrics, context.metrics.record))
    context.directory.extend(chat.save)
    shutil.rmtree(scratch)
    return result | {"documents": len(corpus.texts), "tokens": int(rows.mask.sum())}
