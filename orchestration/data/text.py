"""Plain text as training rows: documents joined by the end token and cut into blocks as long as the context."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import torch
from torch.nn.functional import pad

from actors.batch import Dialogues
from orchestration.data.chat import Chat


def blocks(texts: Sequence[str], chat: Chat, length: int) -> Dialogues:
    """Rows of `length` tokens, the last one shorter; the mask holds every token but a row's first.

    Each row begins with the last token of the row before (the first with an end token), so that every token of every document, and the
    end token behind it, is predicted exactly once.
    """
    stream = torch.tensor([chat.end, *chain.from_iterable([*ids, chat.end] for ids in chat.texts(texts))])
    stride = length - 1
    rows = -(-(len(stream) - 1) // stride)
    tokens = pad(stream, (0, rows * stride + 1 - len(stream))).unfold(0, length, stride).clone()
    lengths = (len(stream) - torch.arange(rows) * stride).clamp(max=length)
    columns = torch.arange(length)[None, :]
    return Dialogues(tokens, lengths, (columns > 0) & (columns < lengths[:, None]))


def validation_and_test(texts: Sequence[str]) -> tuple[list[str], list[str]]:
    """Two halves of the held-out documents: one decides on early stopping, the other is only measured."""
    middle = len(texts) // 2
    return list(texts[:middle]), list(texts[middle:])


def byte_count(texts: Sequence[str]) -> int:
    """Bytes of the texts in UTF-8."""
    return sum(len(text.encode()) for text in texts)
