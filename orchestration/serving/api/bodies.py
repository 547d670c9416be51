"""What clients are sent, as OpenAI's API has it."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from pydantic_core import to_json
from starlette.responses import Response

from orchestration.serving.moderation.verdict import Verdict
from orchestration.serving.replies import Token

DEPTH = 4
"""How deep what may be long stands in an answer: choices, a choice, its log-probs, their tokens."""
ENTRIES = 64
"""Entries of a list, or parts of an answer, that are written between two looks at other requests."""


def new_id(prefix: str) -> str:
    return f"{prefix}-{uuid.uuid4().hex}"


@dataclass(frozen=True)
class Head:
    """What all chunks of a reply have in common."""

    id: str
    kind: str
    model: str
    created: int = field(default_factory=lambda: int(time.time()))

    def body(self, choices: list[dict[str, Any]], **further: Any) -> dict[str, Any]:
        return {"id": self.id, "object": self.kind, "created": self.created, "model": self.model, "choices": choices, **further}


def usage(prompt: int, completion: int) -> dict[str, int]:
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def verdict_body(verdict: Verdict) -> dict[str, Any]:
    return {"action": verdict.action, "categories": list(verdict.categories), "scores": verdict.scores}


def told(tokens: list[Token]) -> int:
    """How many tokens' texts are told with the log-probs of these."""
    return sum(1 + len(token.likeliest) for token in tokens)


def chat_logprobs(tokens: list[Token], text_of: Any) -> dict[str, Any]:
    """Log-probs of a chat reply's tokens; `text_of(id)` is a token's own text."""

    def entry(token: int, logprob: float) -> dict[str, Any]:
        text = text_of(token)
        return {"token": text, "logprob": max(logprob, -9999.0), "bytes": list(text.encode("utf-8", "replace"))}

    return {
        "content": [
            entry(token.id, token.logprob) | {"top_logprobs": [entry(other, value) for other, value in token.likeliest]} for token in tokens
        ],
        "refusal": None,
    }


def completion_logprobs(tokens: list[Token], text_of: Any, offset: int) -> dict[str, Any]:
    """Log-probs in the older form of `/v1/completions`; `offset` is where the first token's text begins."""
    starts = [offset, *(offset + token.end - (tokens[0].end - len(text_of(tokens[0].id))) for token in tokens[:-1])] if tokens else []
    return {
        "tokens": [text_of(token.id) for token in tokens],
        "token_logprobs": [max(token.logprob, -9999.0) for token in tokens],
        "top_logprobs": [{text_of(other): max(value, -9999.0) for other, value in token.likeliest} for token in tokens],
        "text_offset": starts,
    }


async def answer(body: dict[str, Any]) -> Response:
    """A body as an answer. A long one (log-probs, a conversation) is written bit by bit, since nobody else is served meanwhile."""
    written = []
    for number, part in enumerate(_json(body, DEPTH), start=1):
        written.append(part)
        if number % ENTRIES == 0:
            await asyncio.sleep(0)
    return Response(b"".join(written), media_type="application/json")


def _json(value: Any, depth: int) -> Iterator[bytes]:
    if depth and isinstance(value, dict) and value:
        for number, (name, one) in enumerate(value.items()):
            yield (b"," if number else b"{") + to_json(name) + b":"
            yield from _json(one, depth - 1)
        yield b"}"
    elif isinstance(value, list) and len(value) > (0 if depth else ENTRIES):
        for start in range(0, len(value), 1 if depth else ENTRIES):
            yield b"," if start else b"["
            if depth:
                yield from _json(value[start], depth - 1)
            else:
                yield to_json(value[start : start + ENTRIES])[1:-1]
        yield b"]"
    else:
        yield to_json(value)
