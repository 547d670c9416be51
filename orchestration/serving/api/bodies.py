"""What clients are sent, as OpenAI's API has it."""

from __future__ import annotations

import time
import uuid
from dataclasses import dataclass, field
from typing import Any

from orchestration.serving.moderation.verdict import Verdict
from orchestration.serving.replies import Token


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
