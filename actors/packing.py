"""Packing: several dialogues in one row, so that a pass holds tokens instead of padding.

Positions start again at 0 with each dialogue, and attention does not reach across such a start, so a dialogue's log-probs are those
it has in a row of its own. Only the rows of one optimizer step are packed with each other: what is learned does not depend on it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from actors.batch import Batch, Dialogues, pad_rows


@dataclass
class Packed(Batch):
    """Rows of whole dialogues, one after the other."""

    tokens: Tensor
    """[B, T] long."""
    lengths: Tensor
    """[B] long: of all dialogues of a row together."""
    mask: Tensor
    """[B, T] bool, as in `Dialogues`; false at each dialogue's first token, which nothing may predict."""
    positions: Tensor
    """[B, T] long: place in its own dialogue; 0 in the padding."""


def first_fit(lengths: list[int], longest: int) -> list[list[int]]:
    """Indices in rows: the longest first, each into the first row that has room for it (first-fit decreasing).

    Args:
        longest: tokens of a row at most; what is longer by itself has a row of its own.
    """
    rows: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        row = next((number for number, left in enumerate(room) if left >= lengths[index]), len(rows))
        if row == len(rows):
            rows.append([])
            room.append(longest)
        rows[row].append(index)
        room[row] -= lengths[index]
    return rows


def pack(dialogues: Dialogues, longest: int) -> Packed:
    """The same dialogues in as few rows as `first_fit` finds."""
    lengths = dialogues.lengths.tolist()
    rows = first_fit(lengths, longest)

    def joined(values: Tensor) -> Tensor:
        return pad_rows([torch.cat([values[i, : lengths[i]] for i in row]).tolist() for row in rows], values.dtype)[0]

    positions = torch.arange(dialogues.tokens.shape[1]).expand_as(dialogues.tokens)
    mask = dialogues.mask & (positions > 0)
    filled = torch.tensor([sum(lengths[i] for i in row) for row in rows])
    return Packed(joined(dialogues.tokens), filled, joined(mask), joined(positions))
