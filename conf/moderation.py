"""Moderation of the chat service: who scores texts, and from which scores on something is done."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from annotated_types import Ge
from pydantic import StringConstraints

from conf.settings import Count, Positive, Settings, Share

Thresholds = dict[str, dict[Literal["warn", "block"], Share]]


@dataclass(frozen=True)
class Moderation(Settings):
    """The moderator, and its thresholds."""

    kind: Literal["off", "trained", "huggingface", "openai"] = "trained"
    """`trained`: a classifier that `chatray moderation train` wrote, or the one that chatray comes with. `huggingface`: a model for text
    classification. `openai`: a service with OpenAI's `/v1/moderations`. `off`: nothing is moderated."""
    path: str | None = None
    """trained: the model's file; null takes the one that chatray comes with. huggingface: a folder, or a name on the hub."""
    url: Annotated[str, StringConstraints(pattern=r"^https?://")] | None = None
    """openai: where requests are posted, the whole address with `/v1/moderations`."""
    model: str | None = None
    """openai: the model to name in requests; null names none."""
    key_env: str | None = None
    """openai: environment variable with the service's key, read where the moderator runs; the key itself is written nowhere."""
    labels: dict[str, str] = field(default_factory=dict)
    """huggingface: from the model's labels to categories; labels without one are left out; {} keeps every label as it is."""
    thresholds: Thresholds = field(default_factory=dict)
    """By category, scores from which a text is let through with a notice (`warn`) and from which it is not (`block`); a category without
    them does neither. Empty: those that come with the trained classifier; the other kinds warn at 0.5 and block at 0.9."""
    on_error: Literal["block", "allow"] = "block"
    """openai: what happens to a text that the service gave no scores for. `block` (fail closed): an error, so that the request is refused.
    `allow` (fail open): it passes unmoderated, with a line in the log."""
    batch: Count = 16
    """huggingface, openai: texts per forward pass, or per request, at most."""
    longest: Annotated[int, Ge(16)] = 512
    """huggingface: tokens per window; a longer text is scored window by window, and its highest scores count."""
    threads: Count = 1
    """huggingface: CPU threads."""
    timeout: Positive = 5.0
    """openai: seconds for one try."""
    tries: Count = 3
    """openai: times a request is sent when the connection fails or the service is overloaded (429) or in error (5xx)."""
    backoff: Positive = 0.2
    """openai: seconds before the second try; doubled before each further one."""
