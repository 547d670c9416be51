"""`chatray chat`: talk to a trained model on the terminal, in one process."""

from __future__ import annotations

from pathlib import Path

import torch

from actors.models import load_causal_lm
from actors.rollout_transformers import TransformersEngine
from actors.sampling import Sampling
from orchestration.data.chat import Chat, load_tokenizer
from orchestration.data.dialogues import Dialogue, Message
from orchestration.data.fitting import fitting_prompts
from orchestration.errors import RequestError
from orchestration.run_directory import RunDirectory, sealed

REPLY_TOKENS = 64


def talk(run: Path, stage: str, temperature: float, seed: int) -> None:
    """Read the user's turns from standard input until it ends; the conversation so far is the context.

    Raises:
        RequestError: the run has no finished model of that stage.
    """
    folder = RunDirectory(run, 1).path / "round_01" / stage / "checkpoint"
    if sealed(folder) is None or not (folder / "config.json").exists():
        raise RequestError(f"run={run}, stage={stage}: no finished language model in {folder}; try stage=ppo or stage=sft")
    chat = Chat(load_tokenizer(str(folder), "run"))
    engine = TransformersEngine(load_causal_lm(str(folder)), chat.end, torch.device("cpu"))
    room = int(engine.lm.config.max_position_embeddings) - REPLY_TOKENS
    history: tuple[Message, ...] = ()
    print("Type a message; an empty line starts over, end of input leaves.")
    for turn in range(2**31):
        try:
            text = input("> ").strip()
        except EOFError:
            print()
            return
        if not text:
            history = ()
            continue
        fitting, _, _ = fitting_prompts([Dialogue("chat", (*history, Message("user", text)))], chat, room)
        if not fitting:
            print(f"(too long for this model: at most {room} tokens)")
            continue
        sampling = Sampling(temperature, REPLY_TOKENS, seed, turn)
        rollouts = engine.generate(chat.prompts(fitting, [(0, 0)]), sampling)
        reply = chat.decode(rollouts.tokens[0][rollouts.mask[0]].tolist())
        print(reply)
        history = fitting[0].answered(reply).messages
