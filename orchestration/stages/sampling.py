"""Sampling replies to contexts, as texts: what the stages that are not PPO need of the rollout engines."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from actors.batch import Rollouts
from actors.sampling import Sampling
from orchestration.data.chat import Chat
from orchestration.data.dialogues import Dialogue
from orchestration.roles import Roles
from orchestration.runtime.dispatch import Pieces, cut
from orchestration.runtime.group import Runtime


@dataclass(frozen=True)
class Sampler:
    """Rollout engines with a chat format around them."""

    runtime: Runtime
    roles: Roles
    chat: Chat
    together: int
    """A multiple of every started role's ranks."""
    micro_batch: int

    def rollouts(self, contexts: Sequence[Dialogue], keys: Sequence[tuple[int, int]], sampling: Sampling) -> Pieces[Rollouts]:
        """One reply for each context; `keys` as in `Prompts`. The number of contexts is filled up to a multiple of `together`."""
        missing = -len(contexts) % self.together
        prompts = self.chat.prompts([*contexts, *[contexts[0]] * missing], [*keys, *[keys[0]] * missing])
        return self.roles.rollout.generate(self.runtime.put(cut(prompts, self.together, self.micro_batch)), sampling)

    def fetch(self, pieces: Pieces[Rollouts], count: int, what: str) -> Rollouts:
        """The first `count` rollouts, in the contexts' order."""
        return Rollouts.join(self.runtime.get(pieces, what)).select(slice(0, count))

    def replies(self, rollouts: Rollouts) -> list[str]:
        """Texts of the replies."""
        return [self.chat.decode(tokens[mask].tolist()) for tokens, mask in zip(rollouts.tokens, rollouts.mask, strict=True)]

    def sample(
        self, contexts: Sequence[Dialogue], keys: Sequence[tuple[int, int]], sampling: Sampling, what: str
    ) -> tuple[list[str], list[bool]]:
        """(texts, whether each ended by itself)."""
        found = self.fetch(self.rollouts(contexts, keys, sampling), len(contexts), what)
        return self.replies(found), found.finished.tolist()
