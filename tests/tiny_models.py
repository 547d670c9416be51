"""A tiny language model and a reward model of its shape, with their tokenizer, that learned nothing."""

from __future__ import annotations

from pathlib import Path

from actors.models import ScalarModel, load_causal_lm, new_causal_lm, save_model
from conf.schema import Config
from orchestration.data.chat import Chat, learn_tokenizer
from orchestration.data.world import scenarios


def save_tiny_models(folder: Path, config: Config) -> None:
    """Into `folder`/lm and `folder`/rm."""
    chat = Chat(learn_tokenizer(scenarios.demonstrations(200, 0, config.data.flaws), config.scale.vocabulary))
    new_causal_lm(config.scale, len(chat.tokenizer), 0, 0.0, chat.end, chat.pad).save_pretrained(folder / "lm")
    chat.save(folder / "lm")
    (folder / "rm").mkdir()
    reward = ScalarModel(load_causal_lm(str(folder / "lm")).base_model, seed=1)
    save_model(reward, reward.state_dict(), folder / "rm")
