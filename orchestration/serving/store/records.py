"""What the store gives back and takes, as plain frozen records, and what it raises."""

from __future__ import annotations

import hashlib
import json
import re
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

Kind = Literal["thumbs", "comment", "choice", "edit"]
KINDS = ("thumbs", "comment", "choice", "edit")
ROLES = ("system", "user", "assistant", "tool")
HALF = re.compile("[\ud800-\udfff]")


class NotFound(LookupError):
    """There is no such thing, or it belongs to somebody else: the two are not told apart."""

    def __init__(self, what: str, identifier: str) -> None:
        super().__init__(what, identifier)
        self.what = what

    def __str__(self) -> str:
        return f"no {self.what} {self.args[1]!r}"


class Refused(ValueError):
    """What was asked makes no sense; says why. The caller's mistake."""


class StoreBusy(Exception):
    """The database stayed locked or away for as long as the store waits. Nothing was written; the same call may be made again."""


@dataclass(frozen=True)
class Conversation:
    id: str
    owner: str
    title: str
    consent: bool
    """Whether what is said in it may be learned from."""
    created: float
    """Seconds since 1970, UTC; of all records."""


@dataclass(frozen=True)
class Message:
    id: str
    conversation_id: str
    position: int
    role: str
    content: str
    model: str | None
    """The model version that wrote it."""
    extra: dict[str, Any] | None
    created: float


@dataclass(frozen=True)
class Feedback:
    id: str
    owner: str
    kind: str
    value: str
    """thumbs: `up` or `down`. comment, edit: a text. choice: the identifier of the better answer, or `tie`."""
    answers: tuple[str, ...]
    """Identifiers of the answers it is about."""
    consent: bool
    created: float


@dataclass(frozen=True)
class Audit:
    """One decision of moderation."""

    owner: str
    direction: Literal["input", "output"]
    action: Literal["allow", "warn", "block"]
    categories: tuple[str, ...]
    scores: dict[str, float]
    moderator: str
    conversation_id: str | None = None
    request_id: str | None = None
    model: str | None = None
    id: str = field(default_factory=lambda: new_name("audit"))
    created: float | None = None
    """None: now."""


@dataclass(frozen=True)
class Learned:
    """A piece of feedback with all that it is about, for the export."""

    feedback: Feedback
    prompt: tuple[dict[str, str], ...]
    digest: str
    texts: tuple[str, ...]
    """The answers, in the order of `feedback.answers`."""
    models: tuple[str, ...]
    """The model version that wrote each."""
    conversation_id: str | None


@dataclass(frozen=True)
class Deleted:
    """What a deletion took away."""

    feedback: tuple[str, ...]
    """Identifiers of the feedback that is gone, or that may no longer be learned from."""
    folders: tuple[str, ...]
    """Exported folders that hold rows made from it; see `export.tell`."""


def new_name(kind: str) -> str:
    return f"{kind}_{uuid.uuid4().hex}"


def text_of(value: Any, what: str, empty: bool = False) -> str:
    """The text, if a database can hold it.

    Raises:
        Refused: no text, empty, a NUL, or half of a character.
    """
    if not isinstance(value, str):
        raise Refused(f"{what} is not text but {type(value).__name__}")
    if "\0" in value or HALF.search(value):
        raise Refused(f"{what} holds a NUL or half of a character (a lone surrogate)")
    if not empty and not value.strip():
        raise Refused(f"{what} is empty")
    return value


def visible(messages: Sequence[Any]) -> list[dict[str, str]]:
    """Messages as role and content alone, whatever else stood in them.

    Raises:
        Refused: none, or one of another form.
    """
    found = []
    for number, message in enumerate(messages, start=1):
        role, content = (message.get("role"), message.get("content")) if isinstance(message, dict) else (None, None)
        if role not in ROLES:
            raise Refused(f"message {number}: the role {role!r:.40} is none of {', '.join(ROLES)}")
        found.append({"role": str(role), "content": text_of(content, f"message {number}", empty=True)})
    if not found:
        raise Refused("a prompt has at least one message")
    return found


def digest_of(messages: Sequence[dict[str, str]]) -> str:
    return hashlib.sha256(json.dumps(messages, ensure_ascii=False, sort_keys=True).encode()).hexdigest()[:32]
