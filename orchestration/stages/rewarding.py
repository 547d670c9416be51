"""What scores replies in `ppo` and `evaluate`: which weights it starts from, what the ranks are told, and what its figures come to."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, reduce
from pathlib import Path

from transformers import AutoConfig, PreTrainedTokenizerBase

from actors.algorithms.running import Moments
from actors.reward import TOTAL
from actors.rewards.model import kind_of
from actors.rewards.source import RewardError, Texts
from conf.rewards import HttpReward, ModelReward
from orchestration.data.chat import Chat, load_tokenizer
from orchestration.data.dialogues import Dialogue
from orchestration.data.scoring import ReplyEncoder
from orchestration.errors import RequestError
from orchestration.roles import Roles
from orchestration.runtime.group import Runtime
from orchestration.stages.context import StageContext


@dataclass(frozen=True)
class Rewarding:
    """The reward of this run, seen from a stage."""

    context: StageContext

    @cached_property
    def checkpoint(self) -> str:
        """Folder of the run's own reward model; of the SFT model where nothing needs one."""
        return str(self.context.input("reward_model" if self.context.config.ppo.uses_reward_model() else "sft"))

    @cached_property
    def critic(self) -> str:
        """What the critic starts from: the first reward model that reads the policy's tokens, else the SFT model (with a fresh head).

        InstructGPT (2203.02155, C.4) starts it from the reward model, whose scores it is to foretell.
        """
        for source in self.models:
            if source.name not in self.encoders and source.weight > 0:
                return source.path or self.checkpoint
        return str(self.context.input("sft"))

    @property
    def models(self) -> list[ModelReward]:
        return [source for source in self.context.config.ppo.sources() if isinstance(source, ModelReward)]

    @cached_property
    def encoders(self) -> dict[str, ReplyEncoder]:
        """By source: the encoders of the models that do not score the policy's own tokens.

        Raises:
            RequestError: no reward model stands where one is named, or no tokenizer with it that it needs.
        """
        found = {source.name: self._encoder(source) for source in self.models}
        return {name: encoder for name, encoder in found.items() if encoder is not None}

    def _encoder(self, source: ModelReward) -> ReplyEncoder | None:
        path = source.path or self.checkpoint
        setting = f"ppo.rewards: {source.name}: path" if source.path else "reward_checkpoint"
        try:
            kind = kind_of(path, setting)
        except RewardError as cause:
            raise RequestError(str(cause)) from cause
        longest = int(getattr(AutoConfig.from_pretrained(path), "max_position_embeddings", None) or 1 << 30)
        if kind == "scalar" and not (Path(path) / "tokenizer.json").exists():
            return None  # weights alone: there is nothing to compare
        tokenizer = load_tokenizer(path, setting)
        if kind == "scalar" and longest >= self.context.longest and same_tokens(tokenizer, self.context.chat.tokenizer):
            return None
        return ReplyEncoder(source.name, Chat(tokenizer), min(longest, tokenizer.model_max_length), kind == "classifier")

    def prepare(self, started: Roles, contexts: Sequence[Dialogue]) -> None:
        """Tell the reward's ranks what replies will be given to; `contexts` by the number that rollouts' keys name."""
        sources = self.context.config.ppo.sources()
        tokens = {s.name: os.environ.get(s.token_env, "") for s in sources if isinstance(s, HttpReward) and s.token_env}
        texts = Texts([c.as_list() for c in contexts], self.context.chat, dict(self.encoders), tokens)
        runtime = self.context.runtime
        runtime.wait(started.reward.prepare(runtime.put([texts])), what="the reward's ranks to learn the conversations")


def same_tokens(one: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase) -> bool:
    """Whether both mean the same by the ids of a conversation."""
    return one.get_vocab() == other.get_vocab() and one.chat_template == other.chat_template


def moments_of_scores(runtime: Runtime, started: Roles) -> tuple[Moments, dict[str, float]]:
    """(moments of the last scores over all ranks, mean of each source as `score_<name>`)."""
    ranks = runtime.get(started.reward.describe(), "the figures of the scores")
    merged = {name: reduce(Moments.merged, (rank[name] for rank in ranks)) for name in ranks[0]}
    return merged.pop(TOTAL), {f"score_{name}": found.mean for name, found in merged.items()}
