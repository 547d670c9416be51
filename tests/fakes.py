"""What tests share: the smoke configuration, tiny models, and random batches whose masks have gaps."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from hypothesis import settings
from torch import Tensor

from actors.batch import Comparisons, Dialogues, Experience, Rollouts
from actors.models import LanguageModel, ScalarModel, initial_spread, new_causal_lm, save_model
from actors.rewards.source import Texts
from conf.schema import Config
from conf.sources import FilesData, Part
from orchestration import config as configuration

VOCABULARY, END, PAD = 40, 1, 0
quickly = settings(derandomize=True, deadline=None, max_examples=40, database=None)
"""Property tests: the same examples every time."""


@functools.cache
def smoke(*overrides: str) -> Config:
    """The smoke experiment in fp32, in this process, with a two-layer model of width 16."""
    tiny = ("scale.layers=2", "scale.width=16", "scale.heads=2", "scale.feed_forward=32", "scale.context=64")
    return configuration.load(["experiment=smoke", "runtime=local", "model.dtype=fp32", *tiny, *overrides], Path("/tmp"))


def with_section(config: Config, name: str, **values: Any) -> Config:
    """The configuration with some settings of one section replaced."""
    return dataclasses.replace(config, **{name: dataclasses.replace(getattr(config, name), **values)})


def files_data(*parts: dict[str, Any], **changes: Any) -> FilesData:
    """Settings of file sources that refuse bad rows and hold two dialogues out."""
    given: dict[str, Any] = {
        "path": None, "heldout": 2, "heldout_preferences": 0, "on_bad_row": "refuse", "longest_row_mb": 1.0, "near_duplicate": 0.8,
        "drop_duplicates": False, "tool_response_chars": 160,
    }  # fmt: skip
    return FilesData("files", mix=tuple(Part(**part) for part in parts), **given | changes)


class Letters:
    """A tokenizer: a letter for each id."""

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(chr(97 + i % 26) for i in ids)


def texts(rows: int) -> Texts:
    """One question for each row of `rollouts`."""
    return Texts([[{"role": "user", "content": f"question {n}"}] for n in range(rows)], Letters(), {})


def replies_of(rows: Rollouts) -> list[str]:
    return [Letters().decode(tokens[mask].tolist()) for tokens, mask in zip(rows.tokens, rows.mask, strict=True)]


def brief(conversations: list[list[dict[str, str]]], replies: list[str]) -> list[float]:
    """A reward as people write one: short replies."""
    return [-len(reply) / 10 for reply in replies]


def asked(conversations: list[list[dict[str, str]]], replies: list[str]) -> list[float]:
    """A reward that depends on the conversation alone."""
    return [float(len(conversation[-1]["content"])) for conversation in conversations]


def tiny_lm(seed: int = 0, spread: float = 0.12):
    """A causal LM whose weights have a standard deviation of `spread`: large enough that its distributions are far from uniform."""
    scale = smoke().scale
    lm = new_causal_lm(scale, VOCABULARY, seed, 0.0, END, PAD).eval()
    with torch.no_grad():
        for parameter in lm.parameters():
            if parameter.dim() > 1:
                parameter.mul_(spread / initial_spread(scale.width))
    return lm


def saved_lm(folder: Path, seed: int = 0) -> str:
    """`tiny_lm` as a Hugging Face folder."""
    model = LanguageModel(tiny_lm(seed))
    save_model(model, model.state_dict(), folder)
    return str(folder)


def saved_scalar(folder: Path, seed: int = 0) -> str:
    """A scalar model on `tiny_lm`'s transformer, as a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    model = ScalarModel(tiny_lm(seed).base_model, seed)
    save_model(model, model.state_dict(), folder)
    return str(folder)


def floats(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Standard normal numbers."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def mask_with_gaps(seed: int, rows: int, width: int, share: float = 0.6, at_least: int = 1) -> Tensor:
    """[rows, width] bool; every row has `at_least` true entries where it is that wide."""
    generator = torch.Generator().manual_seed(seed + 77)
    mask = torch.rand(rows, width, generator=generator) < share
    for row in mask:
        row[torch.randperm(width, generator=generator)[:at_least]] = True
    return mask


def sequences(seed: int, rows: int, shortest: int = 4, longest: int = 12) -> tuple[Tensor, Tensor, Tensor]:
    """(tokens, lengths, mask): right-padded rows, their last token unmasked, gaps among the tokens that count."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(shortest, longest + 1, (rows,), generator=generator)
    width = int(lengths.max())
    inside = torch.arange(width)[None, :] < lengths[:, None]
    tokens = torch.randint(2, VOCABULARY, (rows, width), generator=generator) * inside
    mask = (torch.rand(rows, width, generator=generator) < 0.6) & inside
    mask[:, 0] = False
    mask[torch.arange(rows), lengths - 1] = True
    return tokens, lengths, mask


def dialogues(seed: int, rows: int) -> Dialogues:
    return Dialogues(*sequences(seed, rows))


def rollouts(seed: int, rows: int, reply: int = 5) -> Rollouts:
    """Prompts of several lengths, each with a reply of 1 to `reply` tokens."""
    tokens, lengths, _ = sequences(seed, rows, shortest=reply + 2, longest=reply + 7)
    generator = torch.Generator().manual_seed(seed + 1)
    sizes = torch.randint(1, reply + 1, (rows,), generator=generator)
    columns = torch.arange(tokens.shape[1])[None, :]
    mask = (columns >= (lengths - sizes)[:, None]) & (columns < lengths[:, None])
    behaviour = torch.where(mask, -torch.rand(tokens.shape, generator=generator), torch.zeros(()))
    finished = torch.rand(rows, generator=generator) < 0.7
    keys = torch.stack([torch.arange(rows), torch.zeros(rows, dtype=torch.long)], dim=1)
    return Rollouts(tokens, lengths, mask, behaviour, finished, keys, torch.zeros(rows, dtype=torch.long))


def experience(seed: int, rows: int) -> Experience:
    """Old log-probs near those of `tiny_lm(0)`, so that some ratios are clipped and some are not."""
    tokens, lengths, mask = sequences(seed, rows)
    zero = torch.zeros(())
    with torch.no_grad():
        logprobs, _ = LanguageModel(tiny_lm())(tokens, mask)
    noise = [floats(seed + i, *tokens.shape, dtype=torch.float32) for i in range(5)]
    old = logprobs + 0.3 * noise[0]
    found = (old, 0.3 * noise[1], noise[2], noise[3], old + 0.3 * noise[4])
    return Experience(tokens, lengths, mask, *(torch.where(mask, x, zero) for x in found))


def comparisons(seed: int, sizes: tuple[int, ...] = (4, 2, 5, 3)) -> Comparisons:
    """Ranked answers in groups of the given sizes, with ties."""
    tokens, lengths, mask = sequences(seed, sum(sizes))
    group = torch.cat([torch.full((size,), number) for number, size in enumerate(sizes)])
    generator = torch.Generator().manual_seed(seed + 5)
    rank = torch.cat([torch.randint(0, size, (size,), generator=generator) for size in sizes]).float()
    start = 0
    for size in sizes:
        rank[start], rank[start + 1] = 0.0, 1.0  # at least one pair of each group is untied
        start += size
    return Comparisons(tokens, lengths, mask, group, rank)


def learned(figures: dict[str, Any]) -> dict[str, Any]:
    """Without the shares of padding, which say how rows were put into passes and not what was learned from them."""
    return {name: value for name, value in figures.items() if "padding" not in name}
