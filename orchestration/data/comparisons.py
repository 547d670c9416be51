"""Comparisons: K answers to one context and how people ranked them; with single judgements, the reward model's training data."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch

from actors.batch import Comparisons, pad_rows
from orchestration.data.chat import Chat
from orchestration.data.dialogues import Dialogue, from_list
from orchestration.data.preferences import Comparison, Judgement

TRAIN_FILE, HELD_OUT_FILE = "comparisons.jsonl", "heldout.jsonl"
"""What the stage `compare` leaves, and `reward_model` learns from."""

DEMONSTRATIONS = 256
"""Demonstrations whose mean score sets the reward model's zero."""


def write(path: Path, comparisons: Sequence[Comparison]) -> None:
    """One JSON line each."""
    with open(path, "w", encoding="utf-8") as file:
        for c in comparisons:
            row = {"id": c.context.id, "context": c.context.as_list(), "answers": c.answers, "finished": c.finished, "ranks": c.ranks}
            file.write(json.dumps(row) + "\n")


def read(path: Path) -> list[Comparison]:
    """The inverse of `write`."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [
        Comparison(from_list(row["id"], row["context"]), tuple(row["answers"]), tuple(row["finished"]), tuple(row["ranks"])) for row in rows
    ]


def write_judgements(path: Path, judgements: Sequence[Judgement]) -> None:
    """One JSON line each."""
    with open(path, "w", encoding="utf-8") as file:
        for j in judgements:
            file.write(json.dumps({"id": j.context.id, "context": j.context.as_list(), "reply": j.reply, "good": j.good}) + "\n")


def read_judgements(path: Path) -> list[Judgement]:
    """The inverse of `write_judgements`."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [Judgement(from_list(row["id"], row["context"]), row["reply"], row["good"]) for row in rows]


def encode_rankings(chat: Chat, comparisons: Sequence[Comparison]) -> Comparisons:
    """All answers of all comparisons as one batch; answers that did not end carry no end-of-turn token."""
    prompts = chat.prompt_all([c.context for c in comparisons])
    rows = [
        (*_answer(chat, prompt, answer, finished), number, float(rank))
        for number, (c, prompt) in enumerate(zip(comparisons, prompts, strict=True))
        for answer, finished, rank in zip(c.answers, c.finished, c.ranks, strict=True)
    ]
    return _batch(rows)


def encode_judgements(chat: Chat, judgements: Sequence[Judgement]) -> Comparisons:
    """Each judged reply as a group of its own."""
    return _batch([(*_answer(chat, chat.prompt(j.context), j.reply, True), n, float(j.good)) for n, j in enumerate(judgements)])


def demonstrated(demonstrations: Sequence[Dialogue], chat: Chat, longest: int) -> Comparisons:
    """A fixed sample of demonstrations for the reward's zero: the last assistant turn of each as the reply to what stands before it, not
    longer than what was compared."""
    ends = [(d, turns[-1]) for d in demonstrations[: 4 * DEMONSTRATIONS] if (turns := d.assistant_turns())]
    shown = [Judgement(d.before(turn), d.messages[turn].content, True) for d, turn in ends]
    kept = [j for j in shown if len(chat.prompt(j.context)) + len(chat.text(j.reply)) < longest] or shown
    return encode_judgements(chat, kept[:DEMONSTRATIONS])


def _answer(chat: Chat, prompt: list[int], answer: str, finished: bool) -> tuple[list[int], list[bool]]:
    reply = chat.text(answer) + ([chat.end] if finished else [])
    reply = reply or [chat.end]  # an unfinished reply has tokens; an empty text that ended is its end token alone
    return prompt + reply, [False] * len(prompt) + [True] * len(reply)


def _batch(rows: Sequence[tuple[list[int], list[bool], int, float]]) -> Comparisons:
    tokens, lengths = pad_rows([row[0] for row in rows])
    mask, _ = pad_rows([row[1] for row in rows], torch.bool)
    group, label = torch.tensor([row[2] for row in rows]), torch.tensor([row[3] for row in rows])
    return Comparisons(tokens, lengths, mask, group, label)


def kept_apart(count: int, share: float, seed: int) -> tuple[list[int], list[int]]:
    """Indices 0..count-1 in two random parts, the second of about `share` of them (at least one each)."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
    apart = min(max(round(count * share), 1), count - 1)
    return order[apart:], order[:apart]
