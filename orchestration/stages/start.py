"""What the first training stage starts from: the tokenizer, the model and its context."""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedModel

from actors.models import load_causal_lm, new_causal_lm, undrawn_causal_lm, write_unfilled
from conf.schema import Config
from conf.sizes import Scale
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
    """Write the model to start from.

    Raises:
        RequestError: as `starting_model`.
    """
    write(config, starting_model(config, chat, dropout), folder)


def write(config: Config, lm: PreTrainedModel, folder: Path) -> None:
    """Write a model as a checkpoint. One that will be partitioned, or is larger than a file of a checkpoint, goes through memory tensor by
    tensor."""
    if any(parameter.is_meta for parameter in lm.parameters()):
        write_unfilled(lm, folder, config.engine.shard_mb * 10**6)
    else:
        lm.save_pretrained(folder)


def starting_model(config: Config, chat: Chat, dropout: float):
    """The named model, or one of the scale's shape with random weights; perhaps without storage (`actors/checkpoint.py`).

    Raises:
        RequestError: no causal LM can be loaded from `model.path`, or the tokenizer has more tokens than it knows.
    """
    if config.model.path is None:
        return _random(config, config.scale, chat, dropout)
    return _named(config, config.model.path, "model", chat)


def own_reward_model(config: Config, chat: Chat):
    """What a reward model of another size than the policy starts from; perhaps without storage.

    Raises:
        RequestError: no causal LM can be loaded from `reward_model.path`, or it knows fewer tokens than the policy.
    """
    if config.reward_model.path is not None:
        return _named(config, config.reward_model.path, "reward_model", chat)
    assert config.reward_scale is not None  # refused with the request
    return _random(config, config.reward_scale, chat, 0.0)


def _random(config: Config, scale: Scale, chat: Chat, dropout: float):
    shape = (scale, len(chat.tokenizer), config.seed, dropout, chat.end, chat.pad)
    undrawn = undrawn_causal_lm(*shape)
    small = sum(4 * parameter.numel() for parameter in undrawn.parameters()) <= config.engine.shard_mb * 10**6
    return new_causal_lm(*shape) if small else undrawn  # by size alone: the ZeRO stage must not change what is started from


def _named(config: Config, path: str, section: str, chat: Chat):
    try:
        lm = load_causal_lm(path, unfilled=config.zero_stage() == 3)
    except (OSError, ValueError) as cause:
        raise RequestError(f"{section}.path={path}: no causal LM can be loaded from there ({str(cause).splitlines()[0][:200]})") from cause
    vocabulary, rows = len(chat.tokenizer), len(next(lm.get_input_embeddings().parameters()))
    if vocabulary > rows:
        remedy = "take the model's own tokenizer" if section == "model" else "take a model with the policy's tokenizer"
        raise RequestError(f"{section}.path={path}: the tokenizer has {vocabulary} tokens, the model's embedding {rows} rows; {remedy}")
    lm.config.eos_token_id = lm.generation_config.eos_token_id = chat.end
    lm.config.pad_token_id = lm.generation_config.pad_token_id = chat.pad
    return lm


def context_length(config: Config) -> int:
    """Longest sequence that the model takes, or fewer tokens if `engine.longest` says so."""
    if config.model.path is None:
        return within(config, config.scale.context)
    from transformers import AutoConfig

    return within(config, int(getattr(AutoConfig.from_pretrained(config.model.path), "max_position_embeddings", config.scale.context)))


def within(config: Config, context: int) -> int:
    """A model's context, or `engine.longest` where that is less."""
    return min(context, config.engine.longest or context)
