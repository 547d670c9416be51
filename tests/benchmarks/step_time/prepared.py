"""What all contestants start from: `lm` and `rm` as chatray saves models, and `prompts.json`, as conversations and as tokens."""

from __future__ import annotations

import argparse
import json
import random
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from transformers import PreTrainedModel

from actors.models import ScalarModel, load_causal_lm, new_causal_lm, save_model
from orchestration import config as configuration
from orchestration.data.chat import Chat, learn_tokenizer, load_tokenizer
from orchestration.data.dialogues import Dialogue, Message
from orchestration.data.source import open_source
from orchestration.data.world import scenarios
from tests.benchmarks import runs
from tests.benchmarks.step_time.settings import SETTINGS, Setting

COFFEE = [
    "experiment=taskmaster_coffee", "stage=sft", "sft.steps=200", "sft.eval_every=100", "commit.every=20", "data.near_duplicate=1.0",
    "runtime=local", "placement=cpu", "logging.progress=false",
]  # fmt: skip
"""The trained policy: our own SFT stage, in one process; rows that are nearly the same need not be counted."""


def prepare(setting: Setting, out: Path, data: str) -> Path:
    """The folder of a setting, made if it is not there.

    Args:
        data: folder of Taskmaster-4; `natural` alone reads it.
    """
    folder = (out / setting.name).resolve()
    if (folder / "setting.json").exists():
        setting.save(folder)
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    dialogues = _trained(setting, folder, out, data) if setting.ends else _random(setting, folder)
    chat = Chat(load_tokenizer(str(folder / "lm"), "policy_checkpoint"))
    backbone = _of_scale([f"scale={setting.reward_scale}"], chat) if setting.reward_scale else load_causal_lm(str(folder / "lm"))
    reward = ScalarModel(backbone.base_model, seed=1)  # type: ignore[arg-type]
    (folder / "rm").mkdir()
    save_model(reward, reward.state_dict(), folder / "rm")
    prompts = [{"messages": d.as_list(), "tokens": ids} for d, ids in zip(dialogues, chat.prompt_all(dialogues), strict=True)]
    (folder / "prompts.json").write_text(json.dumps(prompts), encoding="utf-8")
    setting.save(folder)
    return folder


def _random(setting: Setting, folder: Path) -> list[Dialogue]:
    """A model of random weights that no token stops, and prompts of one length."""
    config = configuration.load(["data=world", *setting.scale])
    demonstrations = scenarios.demonstrations(200, 0, config.data.flaws)  # type: ignore[union-attr]
    chat = Chat(learn_tokenizer(demonstrations, min(config.scale.vocabulary, 1024)))
    lm = _of_scale(setting.scale, chat)
    lm.generation_config.eos_token_id = config.scale.vocabulary  # no token has this number
    lm.save_pretrained(folder / "lm")
    chat.save(folder / "lm")
    said = {word for dialogue in demonstrations for message in dialogue.messages for word in message.content.split() if word.isalpha()}
    return [_asked(chat, sorted(said), setting.prompt_tokens, random.Random(number)) for number in range(setting.prompts)]


def _of_scale(words: Sequence[str], chat: Chat) -> PreTrainedModel:
    """Random weights, of the scale's whole vocabulary."""
    scale = configuration.load(["data=world", *words]).scale
    return new_causal_lm(scale, scale.vocabulary, 0, 0.0, chat.end, chat.pad)


def _asked(chat: Chat, words: list[str], length: int, draw: random.Random) -> Dialogue:
    """A question that makes a prompt of exactly so many tokens."""
    chosen: list[str] = []
    while True:
        question = Dialogue("", (Message("user", " ".join(chosen)),))
        tokens = len(chat.prompt(question))
        if tokens == length:
            return question
        chosen = [*chosen, draw.choice(words)] if tokens < length else chosen[: len(chosen) // 2]


def _trained(setting: Setting, folder: Path, out: Path, data: str) -> list[Dialogue]:
    """The coffee policy, and contexts of its training split that are short enough."""
    run = (out / "coffee").resolve()
    words = [*COFFEE, f"data.path={Path(data).resolve()}", f"run_dir={run}"]
    if not (run / "round_01" / "sft" / "checkpoint").is_dir():
        runs.chatray(words, run / "bench-sft.log")
    shutil.copytree(run / "round_01" / "sft" / "checkpoint", folder / "lm")
    chat = Chat(load_tokenizer(str(folder / "lm"), "policy_checkpoint"))
    contexts = open_source(configuration.load(words)).load().prompts
    fits = _at_most(chat, setting.prompt_tokens)
    chosen = [context for context in random.Random(0).sample(contexts, len(contexts)) if fits(context)]
    return chosen[: setting.prompts]


def _at_most(chat: Chat, length: int) -> Callable[[Dialogue], bool]:
    return lambda context: len(chat.prompt(context)) <= length


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("setting", choices=SETTINGS)
    parser.add_argument("--out", type=Path, default=Path("runs/bench"))
    parser.add_argument("--data", default="../shared/data/taskmaster-4")
    wanted = parser.parse_args()
    print(prepare(SETTINGS[wanted.setting], wanted.out, wanted.data))


if __name__ == "__main__":
    main()
