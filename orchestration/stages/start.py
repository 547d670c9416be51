"""What the first training stage starts from: the tokenizer, the model and its context."""

from __future__ import annotations

from pathlib import Path

from actors.models import load_causal_lm, new_causal_lm, undrawn_causal_lm, write_unfilled
from conf.schema import Config
from orchestration.data.chat import Chat, learn_tokenizer, load_tokenizer
from orchestration.data.source import Corpus
from orchestration.errors import RequestError


def starting_chat(config: Config, corpus: Corpus) -> Chat:
    """The chat format to train with: the named tokenizer, the model's own, or one learned from the demonstrations and, when there is
    pretraining, the text."""
    named = config.model.tokenizer or config.model.path
    if named:
        return Chat(load_tokenizer(named, "model.tokenizer" if config.model.tokenizer else "model.path"))
    texts = corpus.texts if config.pretrain.steps else []
    return Chat(learn_tokenizer(corpus.demonstrations, config.scale.vocabulary, texts))


def write_starting_model(config: Config, chat: Chat, dropout: float, folder: Path) -> None:
    """Write the model to start from. One that will be partitioned, or is larger than a file of a checkpoint, goes through memory tensor by
    tensor.

    Raises:
        RequestError: as `starting_model`.
    """
    lm = starting_model(config, chat, dropout)
    if any(parameter.is_meta for parameter in lm.parameters()):
        write_unfilled(lm, folder, config.engine.shard_mb * 10**6)
    else:
        lm.save_pretrained(folder)


def starting_model(config: Config, chat: Chat, dropout: float):
    """The named model, or one of the scale's shape with random weights; perhaps without storage (`actors/checkpoint.py`).

    Raises:
        RequestError: no causal LM can be loaded from `model.path`, or the tokenizer has more tokens than it knows.
    """
    vocabulary = len(chat.tokenizer)
    if config.model.path is None:
        shape = (config.scale, vocabulary, config.seed, dropout, chat.end, chat.pad)
        undrawn = undrawn_causal_lm(*shape)
        small = sum(4 * parameter.numel() for parameter in undrawn.parameters()) <= config.engine.shard_mb * 10**6
        return new_causal_lm(*shape) if small else undrawn  # by size alone: the ZeRO stage must not change what is started from
    try:
        lm = load_causal_lm(config.model.path, unfilled=config.zero_stage() == 3)
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
