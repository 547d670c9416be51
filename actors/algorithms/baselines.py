"""Advantages without a critic: the reward of a whole reply less a baseline, the same for each of its tokens.

The reward of a reply is the sum of its rewards per token (gae.py): the shaped score less beta times the KL, with k1 as its estimator.
Args, of each: rewards [B], prompts [B] long (which prompt a reply answers). Returns [B].
"""

from __future__ import annotations

import torch
from torch import Tensor

from actors.algorithms.masking import Reduce, alone, masked_mean

EPSILON = 1e-6
"""Added to a group's standard deviation: replies of equal reward have an advantage of 0, not 0 / 0."""


def rloo(rewards: Tensor, prompts: Tensor) -> Tensor:
    """The baseline is the mean of the *other* replies to the prompt (leave-one-out; Ahmadian et al. 2402.14740, section 3.3)."""
    same, size = groups(rewards, prompts)
    return rewards - (same @ rewards - rewards) / (size - 1)


def grpo(rewards: Tensor, prompts: Tensor) -> Tensor:
    """The baseline is the mean of the prompt's replies, and the difference is divided by their standard deviation (of a sample: n - 1).

    Shao et al. 2402.03300, section 4.1.2. Departure from the paper: its k3 KL term in the loss is not here; the KL stays in the reward, as
    for the others, so that beta and its controller mean the same for all four.
    """
    same, size = groups(rewards, prompts)
    mean = same @ rewards / size
    variance = (same * (rewards[None, :] - mean[:, None]) ** 2).sum(dim=1) / (size - 1)
    return (rewards - mean) / (variance.sqrt() + EPSILON)


def reinforce(rewards: Tensor, reduce: Reduce = alone) -> Tensor:
    """The baseline is the mean reward of the whole batch on all ranks, whatever the prompts (Williams 1992)."""
    return rewards - masked_mean(rewards, torch.ones_like(rewards, dtype=torch.bool), reduce)


def groups(rewards: Tensor, prompts: Tensor) -> tuple[Tensor, Tensor]:
    """([B, B] 1 where two replies answer the same prompt, else 0; [B] how many replies answer the row's).

    Raises:
        ValueError: a reply is alone, so there is nothing to compare it with.
    """
    same = (prompts[:, None] == prompts[None, :]).to(rewards.dtype)
    size = same.sum(dim=1)
    if bool((size < 2).any()):
        lonely = int(prompts[size < 2][0])
        raise ValueError(
            f"prompt {lonely} has a single reply on this rank, and rloo and grpo compare the replies to one prompt: set "
            "ppo.samples_per_prompt to 2 or more, or ppo.advantage=reinforce; all replies to a prompt must reach one policy rank"
        )
    return same, size


def on_tokens(advantages: Tensor, mask: Tensor) -> Tensor:
    """[B], [B, T] -> [B, T]: a reply's advantage at each of its tokens, 0 elsewhere."""
    return torch.where(mask, advantages[:, None], torch.zeros((), dtype=advantages.dtype, device=advantages.device))
