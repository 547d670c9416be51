"""Replies as a reward model of another tokenizer reads them: its own chat template, its own tokens, its own context."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from actors.rewards.source import Messages, RewardError
from orchestration.data.chat import Chat
from orchestration.data.dialogues import Dialogue, from_list
from orchestration.data.fitting import last_turns


@dataclass(frozen=True)
class ReplyEncoder:
    """The `Encoder` that the driver sends to the reward ranks."""

    name: str
    """The source, for errors."""
    chat: Chat
    longest: int
    """Tokens that the model takes."""
    classifier: bool
    """A Hugging Face classifier is given the whole conversation as its template renders it. A model of the stage `reward_model` is given
    what it learned from: the reply's end token is there only if the reply ended by itself, and nothing after it."""

    def encode(self, contexts: Sequence[Messages], replies: Sequence[str], finished: Sequence[bool]) -> list[tuple[list[int], int]]:
        """Ids of each conversation with its reply, and how many of the last of them are the reply's. What is too long loses its oldest
        turns, but nothing of the reply.

        Raises:
            RewardError: a reply alone is longer than the model's context.
        """
        dialogues = [from_list("", context) for context in contexts]
        found = self._encode_all(dialogues, replies, finished)
        return [
            (ids, count) if len(ids) <= self.longest else self._shortened(*row)
            for (ids, count), row in zip(found, zip(dialogues, replies, finished, strict=True), strict=True)
        ]

    def _encode_all(
        self, contexts: Sequence[Dialogue], replies: Sequence[str], finished: Sequence[bool]
    ) -> list[tuple[list[int], int]]:  # fmt: skip
        if self.classifier:
            return [(self.chat.whole(context.answered(reply).as_list()), 0) for context, reply in zip(contexts, replies, strict=True)]
        rows = zip(self.chat.prompt_all(contexts), self.chat.texts(replies), finished, strict=True)
        whole = [(prompt, [*text, self.chat.end] if done or not text else text) for prompt, text, done in rows]
        return [(prompt + reply, len(reply)) for prompt, reply in whole]

    def _shortened(self, context: Dialogue, reply: str, done: bool) -> tuple[list[int], int]:
        def ids(shorter: Dialogue) -> tuple[list[int], int]:
            return self._encode_all([shorter], [reply], [done])[0]

        kept = last_turns(context, lambda shorter: len(ids(shorter)[0]) <= self.longest) or replace(context, messages=())
        found = ids(kept)
        if len(found[0]) > self.longest:
            raise RewardError(
                f"ppo.rewards: {self.name}: a reply alone is {len(found[0])} of this model's tokens, and it takes {self.longest}; lower "
                "ppo.max_new_tokens, or choose a model with a larger context"
            )
        return found
