"""The embedded engine of the service: a transformers model whose batch requests join and leave between two tokens."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from actors.devices import own_device
from actors.models import load_causal_lm
from actors.serving.drawing import draw, generator, told
from actors.serving.protocol import Delta, Finish, Request
from actors.serving.slots import slots
from conf.serving import ServingEngine


@dataclass
class Row:
    """A reply under way."""

    request: Request
    noise: np.random.Generator
    written: int = 0
    last: int = 0
    done: bool = False
    """It has ended, or nobody wants it any more."""

    @classmethod
    def of(cls, request: Request) -> Row:
        return cls(request, generator(request.drawing))


@dataclass
class TransformersStepEngine:
    """Replies side by side; a request waits while `sequences` of them are under way."""

    lm: PreTrainedModel
    end: int
    sequences: int
    prefill_tokens: int
    exclusive: bool = False
    waiting: deque[Request] = field(default_factory=deque)
    rows: list[Row] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.slots = slots(self.lm)
        self.device = next(self.lm.parameters()).device

    def add(self, request: Request) -> None:
        self.waiting.append(request)

    def abort(self, name: str) -> None:
        self.waiting = deque(request for request in self.waiting if request.id != name)
        for row in self.rows:
            row.done = row.done or row.request.id == name

    def busy(self) -> bool:
        return bool(self.rows or self.waiting)

    def close(self) -> None:
        self.rows, self.waiting = [], deque()

    @torch.no_grad()
    def step(self) -> list[Delta]:
        self._remove()
        logits = []
        if self.rows:
            logits.append(self.slots.step(torch.tensor([row.last for row in self.rows], device=self.device)))
        if new := self._admitted():
            logits.append(self.slots.join([request.prompt for request in new]))
            self.rows += [Row.of(request) for request in new]
        if not logits:
            return []
        deltas = self._written(torch.cat(logits))
        self._remove()
        return deltas

    def _admitted(self) -> list[Request]:
        """Who joins now: at least one if there is room, more while their prompts are short."""
        found: list[Request] = []
        longest = 0
        while self.waiting and len(self.rows) + len(found) < self.sequences:
            longest = max(longest, len(self.waiting[0].prompt))
            if found and longest * (len(found) + 1) > self.prefill_tokens:
                break
            found.append(self.waiting.popleft())
        return found

    def _written(self, logits: Tensor) -> list[Delta]:
        drawings = [row.request.drawing for row in self.rows]
        tokens = draw(logits, drawings, [row.noise.random() for row in self.rows])
        deltas = []
        for number, (row, token) in enumerate(zip(self.rows, tokens, strict=True)):
            row.written, row.last = row.written + 1, token
            finish: Finish | None = None
            if token == self.end:
                finish = "stop"
            elif row.written >= row.request.drawing.max_tokens:
                finish = "length"
            row.done = finish is not None
            logprobs, likeliest = self._told(logits[number], row, token)
            deltas.append(Delta(row.request.id, [token], logprobs, likeliest, finish))
        return deltas

    def _told(self, logits: Tensor, row: Row, token: int) -> tuple[list[float], list[list[tuple[int, float]]]]:
        count = row.request.drawing.logprobs
        if count is None:
            return [], []
        logprob, best = told(logits, token, count)
        return [logprob], [best]

    def _remove(self) -> None:
        done = [row.done for row in self.rows]
        if any(done):
            self.rows = [self.rows[place] for place in self.slots.leave(done)]


def load(path: str, end: int, settings: ServingEngine) -> TransformersStepEngine:
    """A checkpoint as an engine, on the GPU if this process was given one.

    Raises:
        OSError: nothing loadable stands at `path`.
        ValueError: the model cannot be served by this engine.
    """
    torch.set_num_threads(settings.threads)
    lm = load_causal_lm(path)
    if settings.dtype == "bf16":
        lm = lm.bfloat16()
    module: torch.nn.Module = lm
    module.to(own_device()).eval().requires_grad_(False)
    return TransformersStepEngine(lm, end, settings.sequences, settings.prefill_tokens)
