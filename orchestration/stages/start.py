"""What the first training stage starts from: the tokenizer, the model and its context."""

from __future__ import annotations

from actors.models import load_causal_lm, new_causal_lm
from conf.schema import Config
from orchestration.data.chat import Chat, learn_tokenizer, load_tokenizer
from orchestration.data.source import Corpus
from orchestration.errors import RequestError


def starting_chat(config: Config, corpus: Corpus) -> Chat:
    """The chat format to train with: the named tokenizer, the model's own, or one learned from the demonstrations."""
    named = config.model.tokenizer or config.model.path
    if named:
        return Chat(load_tokenizer(named, "model.tokenizer" if config.model.tokenizer else "model.path"))
    return Chat(learn_tokenizer(corpus.demonstrations, config.scale.vocabulary))


def starting_model(config: Config, chat: Chat, dropout: float):
    """The named model, or one of the scale's shape with random weights.

    Raises:
        RequestError: no causal LM can be loaded from `model.path`, or the tokenizer has more tokens than it knows.
    """
    vocabulary = len(chat.tokenizer)
    if config.model.path is None:
        return new_causal_lm(config.scale, vocabulary, config.seed, dropout, chat.end, chat.pad)
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
