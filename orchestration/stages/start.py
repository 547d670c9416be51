"""What the first training stage starts from: the tokenizer, the model and its context."""

from __future__ import annotations

from actors.models import load_causal_lm, new_causal_lm
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


def starting_model(config: Config, chat: Chat, dropout: float):
    """The named model, or one of the scale's shape with random weights.

    Raises:
        RequestError: no causal LM can be loaded from `model.path`, or the tokenizer has more tokens than it knows.
    """
    if config.model.path is None:
        return new_causal_lm(config.scale, len(chat.tokenizer), config.seed, dropout, chat.end, chat.pad)
    return _named(config.model.path, "model", chat)


def own_reward_model(config: Config, chat: Chat):
    """What a reward model of another size than the policy starts from.

    Raises:
        RequestError: no causal LM can be loaded from `reward_model.path`, or it knows fewer tokens than the policy.
    """
    if config.reward_model.path is not None:
        return _named(config.reward_model.path, "reward_model", chat)
    assert config.reward_scale is not None  # refused with the request
    return new_causal_lm(config.reward_scale, len(chat.tokenizer), config.seed, 0.0, chat.end, chat.pad)


def _named(path: str, section: str, chat: Chat):
    try:
        lm = load_causal_lm(path)
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
    """Longest sequence the model takes."""
    if config.model.path is None:
        return config.scale.context
    from transformers import AutoConfig

    return int(getattr(AutoConfig.from_pretrained(config.model.path), "max_position_embeddings", config.scale.context))
